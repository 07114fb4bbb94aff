//! Mock workers: they read a request, look at nothing in it, and write a canned answer. As cheap as a worker can be, so
//! that what a scenario measures is the proxy.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Longest head of a request that a mock takes.
const HEAD_BYTES_MAX: usize = 64 << 10;

/// What a decode mock answers.
#[derive(Debug, Clone, Copy)]
pub struct DecodeAnswer {
    /// Events of a stream; 0 answers with one JSON object instead.
    pub events: u32,
    /// Wait before the answer.
    pub delay: Duration,
}

/// Serves one prefill and one decode worker on free ports of the loopback until its process is ended. `ready` is called
/// with both addresses.
pub async fn serve(answer: DecodeAnswer, ready: impl FnOnce(SocketAddr, SocketAddr)) -> std::io::Result<()> {
    let prefill = TcpListener::bind("127.0.0.1:0").await?;
    let decode = TcpListener::bind("127.0.0.1:0").await?;
    let (prefill_port, decode_port) = (prefill.local_addr()?, decode.local_addr()?);
    ready(prefill_port, decode_port);
    let prefill_answer = json_answer(&prefill_body(prefill_port));
    let decode_answer = if answer.events == 0 { json_answer(DECODE_BODY) } else { stream_answer(answer.events) };
    let prefill = accept(prefill, prefill_answer, Duration::ZERO);
    let decode = accept(decode, decode_answer, answer.delay);
    tokio::try_join!(prefill, decode).map(|_: ((), ())| ())
}

const DECODE_BODY: &str = r#"{"id":"cmpl-mock","object":"text_completion","created":1,"model":"mock","choices":[{"index":0,"text":" and so it goes on and on until it ends","logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":50,"completion_tokens":16,"total_tokens":66}}"#;

/// What NIXL-aware workers answer to the prefill leg.
fn prefill_body(address: SocketAddr) -> String {
    let blocks: Vec<String> = (0..32).map(|block| block.to_string()).collect();
    format!(
        r#"{{"id":"cmpl-mock","object":"text_completion","created":1,"model":"mock","choices":[{{"index":0,"text":" and","logprobs":null,"finish_reason":"length"}}],"usage":{{"prompt_tokens":50,"completion_tokens":1,"total_tokens":51}},"kv_transfer_params":{{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[{}]],"remote_engine_id":"0b7c2f0e-mock","remote_request_id":"cmpl-mock-0-1a2b3c4d","remote_host":"{}","remote_port":{},"tp_size":1,"remote_num_tokens":500}}}}"#,
        blocks.join(","),
        address.ip(),
        address.port(),
    )
}

fn json_answer(body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

fn stream_answer(events: u32) -> Vec<u8> {
    let head =
        "HTTP/1.1 200 OK\r\nserver: mock\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut answer = head.as_bytes().to_vec();
    let event =
        "data: {\"id\":\"cmpl-mock\",\"object\":\"text_completion\",\"choices\":[{\"index\":0,\"text\":\" so\"}]}\n\n";
    for event in std::iter::repeat_n(event, events as usize).chain(["data: [DONE]\n\n"]) {
        answer.extend_from_slice(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes());
    }
    answer.extend_from_slice(b"0\r\n\r\n");
    answer
}

async fn accept(listener: TcpListener, answer: Vec<u8>, delay: Duration) -> std::io::Result<()> {
    let answer: std::sync::Arc<[u8]> = answer.into();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted?;
                let answer = std::sync::Arc::clone(&answer);
                // A connection that breaks is the other side's business.
                connections.spawn(async move { drop(converse(stream, &answer, delay).await) });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn converse(mut stream: TcpStream, answer: &[u8], delay: Duration) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = vec![0; HEAD_BYTES_MAX];
    let mut filled = 0;
    loop {
        let read = stream.read(&mut buffer[filled..]).await?;
        if read == 0 {
            return Ok(());
        }
        filled += read;
        let Some(end) = memchr::memmem::find(&buffer[..filled], b"\r\n\r\n") else { continue };
        let mut left = (end + 4 + content_length(&buffer[..end])).saturating_sub(filled);
        while left > 0 {
            let read = stream.read(&mut buffer).await?;
            if read == 0 {
                return Ok(());
            }
            left = left.saturating_sub(read);
        }
        filled = 0;
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        stream.write_all(answer).await?;
    }
}

/// The length that a request's head announces; 0 without one.
fn content_length(head: &[u8]) -> usize {
    let mut lines = head.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    let value = lines.find_map(|line| {
        let (name, value) = line.split_at_checked(15)?;
        name.eq_ignore_ascii_case(b"content-length:").then_some(value)
    });
    value.and_then(|value| std::str::from_utf8(value.trim_ascii()).ok()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_heads_length_is_found() {
        assert_eq!(content_length(b"POST / HTTP/1.1\r\nhost: x\r\nContent-Length:  42\r\nx: y"), 42);
        assert_eq!(content_length(b"GET / HTTP/1.1\r\nhost: x"), 0);
    }
}
