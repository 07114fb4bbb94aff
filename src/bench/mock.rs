//! Mock workers: they read a request, look at nothing in it, and write a canned answer. As cheap as a worker can be, so
//! that what a scenario measures is the proxy.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;

/// Longest head of a request that a mock takes.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Connections that wait to be accepted; a scenario may open thousands at once.
const BACKLOG: u32 = 16_384;
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// What a mock is and answers.
#[derive(Debug, Clone, Copy)]
pub enum Mock {
    /// Answers as a prefill worker that holds KV.
    Prefill,
    /// Answers after `delay`: a stream of `events` events, or one JSON object if they are 0.
    Decode { events: u32, delay: Duration },
}

/// Serves on a free port of the loopback until its process is ended. `ready` is called with the address.
pub async fn serve(mock: Mock, ready: impl FnOnce(SocketAddr)) -> std::io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let listener = socket.listen(BACKLOG)?;
    let address = listener.local_addr()?;
    ready(address);
    let (answer, delay) = match mock {
        Mock::Prefill => (json_answer(&prefill_body(address)), Duration::ZERO),
        Mock::Decode { events: 0, delay } => (json_answer(DECODE_BODY), delay),
        Mock::Decode { events, delay } => (stream_answer(events), delay),
    };
    accept(listener, answer, delay).await;
    Ok(())
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

async fn accept(listener: TcpListener, answer: Vec<u8>, delay: Duration) {
    let answer: std::sync::Arc<[u8]> = answer.into();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // Out of sockets: those that wait get theirs when others end.
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                };
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
        let generates = buffer.starts_with(b"POST");
        let mut left = (end + 4 + content_length(&buffer[..end])).saturating_sub(filled);
        while left > 0 {
            let read = stream.read(&mut buffer).await?;
            if read == 0 {
                return Ok(());
            }
            left = left.saturating_sub(read);
        }
        filled = 0;
        // Only generation takes its time; a question about health is answered at once.
        if !delay.is_zero() && generates {
            tokio::time::sleep(delay).await;
        }
        stream.write_all(answer).await?;
    }
}

/// The length that a request's head announces; 0 without one.
pub(super) fn content_length(head: &[u8]) -> usize {
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
