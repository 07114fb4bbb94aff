//! Asks a worker whether it serves: `/health`, then `/v1/models`.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// First pause between two looks. The reference engine is up within tens of milliseconds, and a refused connection on
/// loopback costs microseconds.
const PAUSE_MIN: Duration = Duration::from_millis(20);

/// Longest pause between two looks.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// How long one answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes of an answer that are looked at: its first line is enough.
const HEAD_BYTES: usize = 256;

/// Returns once the worker at `host:port` is healthy and names its models. Waits for ever: the caller has the deadline.
pub async fn until_ready(host: &str, port: u16) {
    for path in ["/health", "/v1/models"] {
        let mut pause = PAUSE_MIN;
        while !status(host, port, path).await.is_some_and(is_ready) {
            sleep(pause).await;
            pause = (pause * 5 / 4).min(PAUSE_MAX);
        }
    }
}

/// A server that asks for a key (`--api-key`) answers 401 to us, which also says that it serves.
fn is_ready(status: u16) -> bool {
    matches!(status, 200..=299 | 401 | 403)
}

/// The status of one `GET`; `None` when nothing that speaks HTTP answered in time.
pub async fn status(host: &str, port: u16, path: &str) -> Option<u16> {
    timeout(ANSWER_TIMEOUT, ask(host, port, path)).await.ok()?.ok()?
}

async fn ask(host: &str, port: u16, path: &str) -> std::io::Result<Option<u16>> {
    let mut stream = TcpStream::connect((host, port)).await?;
    // The header is only there because HTTP wants one; a name spares brackets round IPv6 addresses.
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::with_capacity(HEAD_BYTES);
    while head.len() < HEAD_BYTES && !head.contains(&b'\n') {
        if stream.read_buf(&mut head).await? == 0 {
            break;
        }
    }
    Ok(parse_status(&head))
}

/// `HTTP/1.1 200 OK` → 200.
fn parse_status(head: &[u8]) -> Option<u16> {
    let line = head.split(|byte| *byte == b'\r' || *byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?;
    let (version, rest) = line.split_once(' ')?;
    version.starts_with("HTTP/1.").then(|| rest.split(' ').next()?.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_http_status_line_counts() {
        let cases: &[(&[u8], Option<u16>)] = &[
            (b"HTTP/1.1 200 OK\r\nx: y\r\n", Some(200)),
            (b"HTTP/1.0 503\r\n", Some(503)),
            (b"SSH-2.0-OpenSSH\r\n", None),
            (b"HTTP/1.1 abc\r\n", None),
            (b"", None),
        ];
        for (head, want) in cases {
            assert_eq!(parse_status(head), *want, "case: {:?}", String::from_utf8_lossy(head));
        }
    }

    #[test]
    fn a_server_that_wants_a_key_serves_and_a_starting_one_does_not() {
        assert!([200, 204, 401, 403].into_iter().all(is_ready));
        assert!(![404, 500, 503].into_iter().any(is_ready));
    }
}
