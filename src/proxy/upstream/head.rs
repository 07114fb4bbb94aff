//! The head of a worker's answer, and the header lines that go to a worker.

use std::mem::MaybeUninit;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

use super::UpstreamError;

/// Longest head of an answer, in bytes, and most header lines in it.
const HEAD_BYTES_MAX: usize = 64 << 10;
const HEADERS_MAX: usize = 96;

/// How the length of a body is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Framing {
    Length(u64),
    Chunked,
    /// Until the connection ends.
    Close,
}

/// Status and framing of an answer, and its header lines: what only one leg's answer needs is read when it is asked for.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: StatusCode,
    pub(crate) framing: Framing,
    pub(crate) keep_alive: bool,
    /// The head as it came.
    text: Bytes,
}

/// Headers that belong to one connection and are never passed on (RFC 9110, 7.6.1).
fn is_hop_by_hop(name: &HeaderName) -> bool {
    // A match on the standard names is an integer comparison each; `keep-alive` is not among them.
    [
        header::CONNECTION,
        header::TRANSFER_ENCODING,
        header::TE,
        header::TRAILER,
        header::UPGRADE,
        header::PROXY_AUTHENTICATE,
        header::PROXY_AUTHORIZATION,
    ]
    .contains(name)
        || name == "keep-alive"
        || name == "proxy-connection"
}

/// Takes the head of an answer off the front of `buffer`, or `None` while it is not whole. Answers 1xx are skipped.
pub(super) fn take(buffer: &mut BytesMut, may_have_body: bool) -> Result<Option<Head>, UpstreamError> {
    loop {
        if buffer.is_empty() {
            return Ok(None);
        }
        let mut lines = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let mut parsed = httparse::Response::new(&mut []);
        let length = match parse(&mut parsed, buffer, &mut lines) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) if buffer.len() > HEAD_BYTES_MAX => {
                return Err(UpstreamError::BadHead("its head is longer than 64 KiB"));
            }
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(_) => return Err(UpstreamError::BadHead("its head cannot be parsed")),
        };
        let status = parsed.code.and_then(|code| StatusCode::from_u16(code).ok());
        let status = status.ok_or(UpstreamError::BadHead("its status is no status"))?;
        if status.is_informational() {
            if status == StatusCode::SWITCHING_PROTOCOLS {
                return Err(UpstreamError::BadHead("it switches protocols unasked"));
            }
            buffer.advance(length);
            continue;
        }
        let (framing, keep_alive) = framing_of(&parsed, status, may_have_body)?;
        let text = buffer.split_to(length).freeze();
        return Ok(Some(Head { status, framing, keep_alive, text }));
    }
}

type Line<'a> = httparse::Header<'a>;

fn parse<'l, 't>(
    parsed: &mut httparse::Response<'l, 't>,
    text: &'t [u8],
    lines: &'l mut [MaybeUninit<Line<'t>>],
) -> httparse::Result<usize> {
    httparse::ParserConfig::default().parse_response_with_uninit_headers(parsed, text, lines)
}

/// How long the body is, and whether the connection can be used again.
fn framing_of(
    parsed: &httparse::Response<'_, '_>,
    status: StatusCode,
    may_have_body: bool,
) -> Result<(Framing, bool), UpstreamError> {
    let mut length = None;
    let mut chunked = false;
    let mut keep_alive = parsed.version == Some(1);
    for line in parsed.headers.iter() {
        if line.name.eq_ignore_ascii_case("transfer-encoding") {
            chunked = line.value.eq_ignore_ascii_case(b"chunked");
            if !chunked {
                return Err(UpstreamError::BadHead("it uses a transfer coding other than chunked"));
            }
        } else if line.name.eq_ignore_ascii_case("connection") {
            for token in tokens(line.value) {
                if token.eq_ignore_ascii_case(b"close") {
                    keep_alive = false;
                } else if token.eq_ignore_ascii_case(b"keep-alive") {
                    keep_alive = true;
                }
            }
        } else if line.name.eq_ignore_ascii_case("content-length") {
            let value = std::str::from_utf8(line.value).ok().and_then(|value| value.trim().parse::<u64>().ok());
            let value = value.ok_or(UpstreamError::BadHead("its content-length is no number"))?;
            if length.replace(value).is_some_and(|known| known != value) {
                return Err(UpstreamError::BadHead("it has two different content-lengths"));
            }
        }
    }
    let bodiless = !may_have_body || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    let framing = match (bodiless, chunked, length) {
        (true, ..) => Framing::Length(0),
        // With both, the chunks decide (RFC 9112, 6.3).
        (_, true, _) => Framing::Chunked,
        (_, _, Some(length)) => Framing::Length(length),
        (_, _, None) => Framing::Close,
    };
    Ok((framing, keep_alive && framing != Framing::Close))
}

/// The tokens of a `Connection` header.
fn tokens(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii)
}

impl Head {
    /// The end-to-end headers: those that are passed on.
    pub(crate) fn headers(&self) -> HeaderMap {
        let mut lines = [const { MaybeUninit::uninit() }; HEADERS_MAX];
        let mut parsed = httparse::Response::new(&mut []);
        // It was parsed when it was taken.
        let whole = parse(&mut parsed, &self.text, &mut lines).is_ok_and(|status| status.is_complete());
        debug_assert!(whole, "a head that was taken is whole");
        let mut headers = HeaderMap::with_capacity(parsed.headers.len() + 2);
        for line in parsed.headers.iter() {
            let Ok(name) = HeaderName::from_bytes(line.name.as_bytes()) else { continue };
            let Ok(value) = HeaderValue::from_bytes(line.value) else { continue };
            if is_hop_by_hop(&name) {
                continue;
            }
            if name == header::CONTENT_LENGTH {
                // Once is enough, and beside chunks it must not travel on.
                if self.framing != Framing::Chunked {
                    headers.insert(name, value);
                }
                continue;
            }
            headers.append(name, value);
        }
        for line in parsed.headers.iter().filter(|line| line.name.eq_ignore_ascii_case("connection")) {
            for name in tokens(line.value).filter_map(|token| HeaderName::from_bytes(token).ok()) {
                headers.remove(name);
            }
        }
        headers
    }
}

/// Header lines of a client's request as they go to a worker: all end-to-end headers but those that `skip` names.
pub(crate) fn write_headers(headers: &HeaderMap, skip: impl Fn(&HeaderName) -> bool) -> Vec<u8> {
    let mut lines = Vec::with_capacity(256);
    let connection: Vec<&[u8]> =
        headers.get_all(header::CONNECTION).iter().flat_map(|value| tokens(value.as_bytes())).collect();
    for (name, value) in headers {
        let ours = [header::HOST, header::CONTENT_LENGTH, header::EXPECT].contains(name);
        let named = connection.iter().any(|token| token.eq_ignore_ascii_case(name.as_str().as_bytes()));
        if ours || named || is_hop_by_hop(name) || skip(name) {
            continue;
        }
        lines.extend_from_slice(name.as_str().as_bytes());
        lines.extend_from_slice(b": ");
        lines.extend_from_slice(value.as_bytes());
        lines.extend_from_slice(b"\r\n");
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Option<Head>, UpstreamError> {
        take(&mut BytesMut::from(text), true)
    }

    #[test]
    fn framing_follows_the_headers() {
        let cases = [
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", Framing::Length(5), true),
            ("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9\r\n\r\n", Framing::Chunked, true),
            ("HTTP/1.1 200 OK\r\nconnection: Close\r\ncontent-length: 0\r\n\r\n", Framing::Length(0), false),
            ("HTTP/1.0 200 OK\r\n\r\n", Framing::Close, false),
            ("HTTP/1.1 204 No Content\r\n\r\n", Framing::Length(0), true),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n", Framing::Length(1), true),
        ];
        for (text, framing, keep_alive) in cases {
            let head = head(text).expect("a head").expect("whole");
            assert_eq!((head.framing, head.keep_alive), (framing, keep_alive), "case: {text}");
        }
    }

    #[test]
    fn ambiguous_or_broken_heads_are_refused() {
        for text in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\n\r\n",
            "SSH-2.0-x\r\n\r\n",
        ] {
            assert!(head(text).is_err(), "case: {text}");
        }
        assert!(head("HTTP/1.1 200 OK\r\ncontent-le").expect("so far good").is_none());
        assert!(head(&format!("HTTP/1.1 200 OK\r\nx: {}", "y".repeat(70_000))).is_err());
    }

    #[test]
    fn hop_by_hop_headers_stay_behind() {
        let text = "HTTP/1.1 200 OK\r\nconnection: x-secret\r\nx-secret: 1\r\nkeep-alive: timeout=5\r\nx-kept: 2\r\n\
                    content-length: 0\r\n\r\n";
        let headers = head(text).expect("a head").expect("whole").headers();
        // A header map keeps no order among names.
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-length", "x-kept"]);
        let mut sent = HeaderMap::new();
        for (name, value) in
            [("connection", "close, x-one"), ("x-one", "1"), ("te", "trailers"), ("authorization", "B")]
        {
            sent.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        assert_eq!(write_headers(&sent, |_| false), b"authorization: B\r\n");
    }
}
