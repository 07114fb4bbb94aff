//! The socket under hyper on the client's side, where hyper refuses a head that it cannot read: it answers such a request by
//! itself, with a bare status. What is written instead is the same status with an error in OpenAI's form.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::ApiError;

/// How long a refused client's further bytes are read and dropped. A socket closed over bytes that nobody has read is reset,
/// and a reset may overtake the answer.
const LINGER: Duration = Duration::from_secs(2);
/// The most of them.
const LINGER_BYTES_MAX: usize = 4 << 20;
/// Read at once of them.
const LINGER_READ_BYTES: usize = 16 << 10;

/// A client's socket. Bytes pass through as they are, but for hyper's bare refusals.
#[derive(Debug)]
pub struct RefusalIo<S> {
    stream: S,
    refusal: Option<Refusal>,
}

/// An answer on its way in place of hyper's.
#[derive(Debug)]
struct Refusal {
    answer: Vec<u8>,
    written: usize,
    linger: Option<Pin<Box<Sleep>>>,
    dropped: usize,
}

impl<S> RefusalIo<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, refusal: None }
    }
}

impl<S: AsyncWrite + Unpin> RefusalIo<S> {
    /// Writes the refusal that stands for `bytes`, if they are one of hyper's.
    fn poll_refuse(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Option<Poll<io::Result<usize>>> {
        if self.refusal.is_none() {
            let answer = answer_instead_of(bytes)?;
            self.refusal = Some(Refusal { answer, written: 0, linger: None, dropped: 0 });
        }
        let refusal = self.refusal.as_mut()?;
        while refusal.written < refusal.answer.len() {
            match Pin::new(&mut self.stream).poll_write(cx, &refusal.answer[refusal.written..]) {
                Poll::Ready(Ok(0)) => return Some(Poll::Ready(Err(io::ErrorKind::WriteZero.into()))),
                Poll::Ready(Ok(written)) => refusal.written += written,
                not_written => return Some(not_written),
            }
        }
        Some(Poll::Ready(Ok(bytes.len())))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for RefusalIo<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for RefusalIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.poll_refuse(cx, bytes) {
            Some(refused) => refused,
            None => Pin::new(&mut self.stream).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut filled = slices.iter().filter(|slice| !slice.is_empty());
        let first = filled.next().map_or(&[][..], |slice| slice);
        if filled.next().is_none()
            && let Some(refused) = self.poll_refuse(cx, first)
        {
            return refused;
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let Some(refusal) = &mut this.refusal else { return Pin::new(&mut this.stream).poll_shutdown(cx) };
        if refusal.linger.is_none() {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
        }
        let linger = refusal.linger.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        let mut scratch = [0; LINGER_READ_BYTES];
        while refusal.dropped < LINGER_BYTES_MAX {
            let mut read = ReadBuf::new(&mut scratch);
            match Pin::new(&mut this.stream).poll_read(cx, &mut read) {
                Poll::Ready(Ok(())) if !read.filled().is_empty() => refusal.dropped += read.filled().len(),
                Poll::Ready(_) => return Poll::Ready(Ok(())),
                Poll::Pending => return linger.as_mut().poll(cx).map(Ok),
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// What is written in place of `bytes`, if they are a refusal of hyper's: a whole head that says nothing but its status.
fn answer_instead_of(bytes: &[u8]) -> Option<Vec<u8>> {
    let head = bytes.strip_prefix(b"HTTP/1.1 4")?.strip_suffix(b"\r\n\r\n")?;
    let head = std::str::from_utf8(head).ok()?;
    let mut lines = head.split("\r\n");
    let error = match lines.next()?.get(..2)? {
        "00" => ApiError::bad_request("the request cannot be read as HTTP/1.1: check its first line and its headers"),
        "14" => ApiError::new(StatusCode::URI_TOO_LONG, "the address in the request's first line is too long"),
        "31" => ApiError::new(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "the head of the request is too large: send fewer or shorter headers",
        ),
        _ => return None,
    };
    let mut date = "";
    for line in lines {
        match line.split_once(": ")? {
            ("content-length", "0") | ("connection", "close") => {}
            ("date", when) => date = when,
            _ => return None,
        }
    }
    let (status, body) = (error.status, error.to_json());
    let date = if date.is_empty() { String::new() } else { format!("date: {date}\r\n") };
    let answer = format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n{date}\r\n{body}",
        body.len()
    );
    Some(answer.into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_bare_refusal_is_replaced() {
        let refusal = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\
                        date: Mon, 23 Nov 2026 01:02:03 GMT\r\n\r\n";
        let answer = String::from_utf8(answer_instead_of(refusal).expect("a refusal")).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        assert!(head.starts_with("HTTP/1.1 431 Request Header Fields Too Large\r\n"), "{head}");
        assert!(head.ends_with("date: Mon, 23 Nov 2026 01:02:03 GMT"), "{head}");
        assert!(head.contains(&format!("\r\ncontent-length: {}\r\n", body.len())), "{head}");
        let error: super::super::ErrorBody = serde_json::from_str(body).expect("an error");
        assert_eq!(error.error.code, 431);
        let others: [&[u8]; 5] = [
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n",
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n",
            b"data: HTTP/1.1 431\r\n\r\n",
        ];
        for other in others {
            assert_eq!(answer_instead_of(other), None, "{}", String::from_utf8_lossy(other));
        }
    }
}
