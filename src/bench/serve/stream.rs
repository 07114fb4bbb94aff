//! One streamed answer, timed: when each piece with tokens came.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http::{Method, StatusCode};
use serde::Deserialize;

use crate::bench::client;
use crate::openai::headers::X_PDLINK_TRANSFER_ID;

/// What a client saw of one request.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::bench) struct Answer {
    /// From sending the request to the first token.
    pub(super) first: Duration,
    /// Between tokens that followed each other. Of a piece with several tokens, each has an equal part of the time.
    pub(super) gaps: Vec<Duration>,
    pub(super) tokens: u32,
    pub(super) prompt_tokens: Option<u32>,
    /// Of the transfer behind it, where the server names one.
    pub(super) transfer_id: Option<String>,
}

impl Answer {
    /// The longest time in which no token came, once one had.
    pub(in crate::bench) fn longest_gap(&self) -> Option<Duration> {
        self.gaps.iter().max().copied()
    }
}

/// Sends one request and reads its answer to the end.
pub(in crate::bench) async fn ask(address: &str, body: Bytes, patience: Duration) -> anyhow::Result<Answer> {
    let sent = Instant::now();
    let mut answer = client::send(address, Method::POST, "/v1/completions", Some(body), patience).await?;
    if answer.status != StatusCode::OK {
        let status = answer.status;
        bail!("{status}: {}", answer.text(patience).await?.trim());
    }
    let transfer_id = answer.headers.get(X_PDLINK_TRANSFER_ID).and_then(|id| id.to_str().ok()).map(str::to_owned);
    let mut clock = Clock::new(sent);
    while let Some(piece) = answer.piece(patience).await? {
        clock.take(&piece, Instant::now())?;
    }
    clock.answer(transfer_id)
}

/// An event of a completion, as far as it is needed. vLLM and the reference engine give token ids when asked; of a server
/// that does not, a piece with text counts as one token.
#[derive(Debug, Deserialize)]
struct Event {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<ErrorBody>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    #[serde(default)]
    text: String,
    token_ids: Option<Vec<u32>>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    prompt_tokens: Option<u32>,
    completion_tokens: Option<u32>,
}

#[derive(Debug, Deserialize)]
struct ErrorBody {
    message: Option<String>,
}

/// The stream as far as it has come.
#[derive(Debug)]
struct Clock {
    sent: Instant,
    rest: Vec<u8>,
    first: Option<Instant>,
    last: Instant,
    gaps: Vec<Duration>,
    tokens: u32,
    usage: Option<Usage>,
    done: bool,
}

impl Clock {
    fn new(sent: Instant) -> Self {
        Self { sent, rest: Vec::new(), first: None, last: sent, gaps: Vec::new(), tokens: 0, usage: None, done: false }
    }

    fn take(&mut self, piece: &[u8], now: Instant) -> anyhow::Result<()> {
        self.rest.extend_from_slice(piece);
        while let Some(end) = memchr::memmem::find(&self.rest, b"\n\n") {
            let event: Vec<u8> = self.rest.drain(..end + 2).collect();
            let event = std::str::from_utf8(&event).context("the stream is not UTF-8")?;
            // Lines that begin with a colon are comments, sent to keep a connection alive.
            for line in event.lines().filter_map(|line| line.strip_prefix("data:")) {
                self.take_data(line.trim(), now)?;
            }
        }
        Ok(())
    }

    fn take_data(&mut self, data: &str, now: Instant) -> anyhow::Result<()> {
        if data == "[DONE]" {
            self.done = true;
            return Ok(());
        }
        let event: Event =
            serde_json::from_str(data).with_context(|| format!("not an event of a completion: {data}"))?;
        if let Some(error) = event.error {
            bail!("error in the stream: {}", error.message.unwrap_or_default());
        }
        if event.usage.is_some() {
            self.usage = event.usage;
        }
        for choice in event.choices {
            let tokens = match &choice.token_ids {
                Some(ids) => u32::try_from(ids.len()).unwrap_or(u32::MAX),
                None => u32::from(!choice.text.is_empty()),
            };
            self.take_tokens(tokens, now);
        }
        Ok(())
    }

    fn take_tokens(&mut self, tokens: u32, now: Instant) {
        if tokens == 0 {
            return;
        }
        let mut more = tokens;
        if self.first.is_none() {
            self.first = Some(now);
            // Those that came with the first token came at no time of their own.
            more = 0;
        }
        let each = now.duration_since(self.last).checked_div(more).unwrap_or_default();
        self.gaps.extend((0..more).map(|_| each));
        self.last = now;
        self.tokens = self.tokens.saturating_add(tokens);
    }

    fn answer(self, transfer_id: Option<String>) -> anyhow::Result<Answer> {
        ensure!(self.done, "the stream ended without [DONE]");
        let first = self.first.context("the answer has no token")?.duration_since(self.sent);
        let (prompt_tokens, completion) =
            self.usage.map_or((None, None), |usage| (usage.prompt_tokens, usage.completion_tokens));
        let tokens = completion.unwrap_or(self.tokens);
        Ok(Answer { first, gaps: self.gaps, tokens, prompt_tokens, transfer_id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn tokens_are_timed_however_the_stream_is_cut() {
        let sent = Instant::now();
        let mut clock = Clock::new(sent);
        let event = |ids: &str| format!("data: {{\"choices\":[{{\"text\":\"x\",\"token_ids\":[{ids}]}}]}}\n\n");
        let mut take = |text: &str, at: u32| clock.take(text.as_bytes(), sent + MS * at).expect("an event");
        take(": keep-alive\n\n", 1);
        take(&event(""), 2);
        let first = event("1");
        take(&first[..10], 3);
        take(&first[10..], 5);
        take(&format!("{}{}", event("2"), event("3,4")), 9);
        take("data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":4}}\n\ndata: [DONE]\n\n", 9);
        let answer = clock.answer(None).expect("whole");
        assert_eq!((answer.first, answer.gaps), (MS * 5, vec![MS * 4, Duration::ZERO, Duration::ZERO]));
        assert_eq!((answer.tokens, answer.prompt_tokens), (4, Some(7)));
    }

    #[test]
    fn a_broken_stream_is_no_answer() {
        let read = |text: &str| {
            let mut clock = Clock::new(Instant::now());
            clock
                .take(text.as_bytes(), Instant::now())
                .and_then(|()| clock.answer(None))
                .map_err(|error| error.to_string())
        };
        let part = "data: {\"choices\":[{\"text\":\"a\"}]}\n\n";
        assert!(read(part).expect_err("cut").contains("[DONE]"));
        assert!(read("data: [DONE]\n\n").expect_err("empty").contains("no token"));
        assert!(read("data: {\"error\":{\"message\":\"gone\"}}\n\n").expect_err("error").contains("gone"));
        assert!(read("data: nonsense\n\n").is_err());
        assert_eq!(read(&format!("{part}{part}data: [DONE]\n\n")).map(|answer| answer.tokens), Ok(2), "no token ids");
    }
}
