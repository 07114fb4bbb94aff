//! The client that posts spans: plain HTTP/1.1, one connection for each batch, of which there is one in a second at most. It blocks,
//! and runs on the exporter's own thread.

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::pin::Pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, Response, Uri};
use opentelemetry_http::{HttpClient, HttpError};

/// Most of a collector's answer that is read.
const ANSWER_BYTES_MAX: usize = 1 << 20;
const HEADERS_MAX: usize = 64;

type Answered<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

#[derive(Debug)]
pub(super) struct Client {
    authority: String,
    address: String,
    timeout: Duration,
}

impl Client {
    /// For a collector at this URL. An error says what is wrong with it.
    pub(super) fn to(url: &str, timeout: Duration) -> Result<Self, &'static str> {
        let uri: Uri = url.parse().map_err(|_| "it is no URL")?;
        if uri.scheme_str() != Some("http") {
            return Err("it must begin with http://; for TLS let a collector on this host pass the spans on");
        }
        let authority = uri.authority().filter(|authority| !authority.host().is_empty()).ok_or("it names no host")?;
        let address = format!("{}:{}", authority.host(), authority.port_u16().unwrap_or(80));
        Ok(Self { authority: authority.to_string(), address, timeout })
    }

    fn send(&self, request: &Request<Bytes>) -> io::Result<Response<Bytes>> {
        let until = Instant::now() + self.timeout;
        let mut stream = self.connect()?;
        let path = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let mut head = format!("{} {path} HTTP/1.1\r\nhost: {}\r\n", request.method(), self.authority).into_bytes();
        for (name, value) in request.headers() {
            head.extend_from_slice(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
        }
        head.extend_from_slice(
            format!("content-length: {}\r\nconnection: close\r\n\r\n", request.body().len()).as_bytes(),
        );
        stream.write_all(&head)?;
        stream.write_all(request.body())?;
        read(&mut stream, until)
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the collector's name has no address");
        for address in self.address.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, self.timeout) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(self.timeout))?;
                    stream.set_write_timeout(Some(self.timeout))?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}

/// The status, and what came of the body by the end of the connection.
fn read(stream: &mut impl Read, until: Instant) -> io::Result<Response<Bytes>> {
    let bad = |why: &'static str| io::Error::new(io::ErrorKind::InvalidData, why);
    let mut answer = Vec::new();
    let mut part = [0; 4096];
    loop {
        let length = stream.read(&mut part)?;
        answer.extend_from_slice(&part[..length]);
        if answer.len() > ANSWER_BYTES_MAX || Instant::now() > until {
            return Err(bad("the collector's answer is too long, or takes too long"));
        }
        let mut lines = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Response::new(&mut lines);
        let parsed = head.parse(&answer).map_err(|_| bad("the collector's answer is no HTTP"))?;
        let httparse::Status::Complete(end) = parsed else {
            if length == 0 {
                return Err(bad("the collector hung up without an answer"));
            }
            continue;
        };
        let told = head.headers.iter().find(|line| line.name.eq_ignore_ascii_case("content-length"));
        let told = told.and_then(|line| std::str::from_utf8(line.value).ok()?.trim().parse::<usize>().ok());
        if length == 0 || told.is_some_and(|told| answer.len() - end >= told) {
            let status = head.code.unwrap_or_default();
            let body = Bytes::copy_from_slice(&answer[end..]);
            return Response::builder().status(status).body(body).map_err(|_| bad("the collector's status is none"));
        }
    }
}

impl HttpClient for Client {
    fn send_bytes<'a, 'b>(&'a self, request: Request<Bytes>) -> Answered<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move { Ok(self.send(&request)?) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_to_their_end_however_it_is_told() {
        let far = Instant::now() + Duration::from_secs(60);
        let status =
            |text: &str| read(&mut text.as_bytes(), far).map(|answer| (answer.status().as_u16(), answer.into_body()));
        let told = status("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}");
        assert_eq!(told.expect("an answer"), (200, Bytes::from_static(b"{}")));
        assert_eq!(status("HTTP/1.1 503 Busy\r\n\r\n").expect("an answer").0, 503);
        for bad in ["", "SSH-2.0\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-le"] {
            assert!(status(bad).is_err(), "{bad}");
        }
    }
}
