//! A closed-loop load: each connection sends its next request when it has the last answer. Raw HTTP/1.1 on one thread,
//! so that it takes as little of the machine as it can from what it measures.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// What is sent, where, and for how long.
#[derive(Debug, Clone)]
pub struct Load {
    /// One after the other: a proxy or a worker alone, or both workers as a client that does the legs itself.
    pub targets: Vec<SocketAddr>,
    pub connections: usize,
    pub until: Until,
    /// Bytes of the prompt.
    pub prompt_bytes: usize,
    pub stream: bool,
    pub seed: u64,
    /// No answer may take longer.
    pub patience: Duration,
}

/// When a load ends.
#[derive(Debug, Clone, Copy)]
pub enum Until {
    Requests(u64),
    Time(Duration),
}

/// What a load saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    pub requests: u64,
    pub errors: u64,
    /// What the first of them said.
    pub first_error: Option<String>,
    pub seconds: f64,
    pub p50_us: u64,
    pub p90_us: u64,
    pub p99_us: u64,
}

/// The body of every request of a load: JSON with a prompt of `prompt_bytes` bytes of words, a line break here and there.
pub fn body(prompt_bytes: usize, stream: bool, seed: u64) -> Vec<u8> {
    const WORDS: [&str; 8] = ["the", "prompt", "of", "a", "request", "that", "nobody", "reads"];
    let mut state = seed | 1;
    let mut prompt = String::with_capacity(prompt_bytes + 16);
    while prompt.len() < prompt_bytes {
        // xorshift: the same text for the same seed, on any machine.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        prompt.push_str(WORDS[usize::try_from(state % 8).unwrap_or(0)]);
        prompt.push_str(if state.is_multiple_of(12) { "\\n" } else { " " });
    }
    prompt.truncate(prompt_bytes);
    // Never half an escape at the end.
    if prompt.ends_with('\\') {
        prompt.pop();
        prompt.push('.');
    }
    format!(r#"{{"model":"mock","prompt":"{prompt}","max_tokens":16,"temperature":0.0,"stream":{stream}}}"#)
        .into_bytes()
}

/// Runs a load to its end.
pub async fn run(load: &Load) -> anyhow::Result<Seen> {
    let body = body(load.prompt_bytes, load.stream, load.seed);
    let request: Arc<[u8]> = [
        format!(
            "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            body.len()
        )
        .as_bytes(),
        &body,
    ]
    .concat()
    .into();
    let started = Instant::now();
    let quota = Arc::new(Quota::new(load.until, started));
    let mut connections = JoinSet::new();
    for _ in 0..load.connections {
        let (request, quota) = (Arc::clone(&request), Arc::clone(&quota));
        let (targets, patience) = (load.targets.clone(), load.patience);
        connections.spawn(async move { ask_in_turn(&targets, &request, &quota, patience).await });
    }
    // Nanoseconds up to an hour, three digits.
    let mut times = Histogram::<u64>::new_with_bounds(1, 3_600_000_000_000, 3)?;
    let (mut errors, mut first_error) = (0, None);
    while let Some(done) = connections.join_next().await {
        let asked = done?;
        asked.nanos.iter().for_each(|&nanos| times.saturating_record(nanos));
        errors += asked.errors;
        first_error = first_error.or(asked.first_error);
    }
    let at = |quantile| times.value_at_quantile(quantile) / 1000;
    Ok(Seen {
        requests: times.len(),
        errors,
        first_error,
        seconds: started.elapsed().as_secs_f64(),
        p50_us: at(0.5),
        p90_us: at(0.9),
        p99_us: at(0.99),
    })
}

#[derive(Debug)]
struct Quota {
    left: AtomicU64,
    ends: Option<Instant>,
}

impl Quota {
    fn new(until: Until, now: Instant) -> Self {
        match until {
            Until::Requests(count) => Self { left: AtomicU64::new(count), ends: None },
            Until::Time(time) => Self { left: AtomicU64::new(u64::MAX), ends: Some(now + time) },
        }
    }

    fn take(&self) -> bool {
        if self.ends.is_some_and(|ends| Instant::now() >= ends) {
            return false;
        }
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
    }
}

/// What one connection saw.
#[derive(Debug, Default)]
struct Asked {
    /// How long each good answer took.
    nanos: Vec<u64>,
    errors: u64,
    first_error: Option<String>,
}

/// One connection per target, used in turn for each request.
async fn ask_in_turn(targets: &[SocketAddr], request: &[u8], quota: &Quota, patience: Duration) -> Asked {
    let mut seen = Asked::default();
    let mut clients: Vec<Client> = targets.iter().map(|&target| Client::new(target)).collect();
    while quota.take() {
        let started = Instant::now();
        let asked = async {
            for client in &mut clients {
                client.ask(request).await?;
            }
            anyhow::Ok(())
        };
        let error = match tokio::time::timeout(patience, asked).await {
            Ok(Ok(())) => {
                seen.nanos.push(u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX));
                continue;
            }
            Ok(Err(error)) => format!("{error:#}"),
            Err(_) => format!("no answer within {} s", patience.as_secs()),
        };
        seen.errors += 1;
        seen.first_error.get_or_insert(error);
        clients.iter_mut().for_each(|client| client.stream = None);
    }
    seen
}

/// A connection to one target, made when first needed.
pub(super) struct Client {
    target: SocketAddr,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl Client {
    pub(super) fn new(target: SocketAddr) -> Self {
        Self { target, stream: None, buffer: Vec::new() }
    }

    /// The whole answer to the last request.
    pub(super) fn answer(&self) -> &[u8] {
        &self.buffer
    }

    /// Sends the request and reads the whole answer.
    pub(super) async fn ask(&mut self, request: &[u8]) -> anyhow::Result<()> {
        if self.stream.is_none() {
            let stream = TcpStream::connect(self.target).await.context("connecting")?;
            stream.set_nodelay(true)?;
            self.stream = Some(stream);
        }
        let stream = self.stream.as_mut().context("connected above")?;
        stream.write_all(request).await.context("sending")?;
        self.buffer.clear();
        let mut ends = None;
        loop {
            if ends.is_none() {
                ends = ending(&self.buffer)?;
            }
            match ends {
                Some(Ending::At(bytes)) if self.buffer.len() >= bytes => return Ok(()),
                Some(Ending::LastChunk) if self.buffer.ends_with(b"\r\n0\r\n\r\n") => return Ok(()),
                _ => {}
            }
            ensure!(stream.read_buf(&mut self.buffer).await.context("receiving")? > 0, "the answer ended early");
        }
    }
}

/// How the end of an answer is known.
enum Ending {
    At(usize),
    LastChunk,
}

fn ending(buffer: &[u8]) -> anyhow::Result<Option<Ending>> {
    let mut headers = [httparse::EMPTY_HEADER; 48];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(length) = head.parse(buffer)? else { return Ok(None) };
    ensure!(head.code == Some(200), "answered {:?}: {}", head.code, String::from_utf8_lossy(&buffer[length..]));
    for header in head.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let body: usize = std::str::from_utf8(header.value)?.parse()?;
            return Ok(Some(Ending::At(length + body)));
        }
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Ok(Some(Ending::LastChunk));
        }
    }
    bail!("the answer does not say where it ends")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_has_its_size_and_is_json() {
        for prompt_bytes in [1, 199, 200, 20_000] {
            let text = body(prompt_bytes, true, 7);
            let value: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
            let raw = text.len() - body(0, true, 7).len();
            assert_eq!((raw, &value["stream"]), (prompt_bytes, &serde_json::Value::Bool(true)));
            assert_eq!(text, body(prompt_bytes, true, 7));
        }
    }
}
