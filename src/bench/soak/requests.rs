//! What the soak asks, and what came of it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, StatusCode};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

use crate::bench::client;

/// Length of a fresh prompt in bytes, which are its tokens. Long, so that its KV takes a while to move and a kill can hit it.
const FRESH_BYTES: std::ops::RangeInclusive<usize> = 300..=1500;
/// Its answer is short: the hand-off is what is wanted of it, not the decoding.
const FRESH_ANSWER_MAX: u32 = 16;

/// One question and the single engine's answer to it.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) prompt: String,
    pub(super) max_tokens: u32,
    pub(super) answer: String,
}

/// How one request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ending {
    Right,
    /// A status or an error event in OpenAI's form: the client knows what happened.
    ClearError(String),
    /// The client left on purpose.
    Left,
    /// An answer that differs from the single engine's. Never acceptable.
    Wrong {
        expected: String,
        got: String,
    },
    /// No answer and no error either: a broken or silent connection. Never acceptable.
    Unclear(String),
}

/// Draws `count` questions. Half share a beginning with another, so that prefix caches matter.
pub(super) fn draw(seed: u64, count: usize) -> Vec<Question> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut questions: Vec<Question> = Vec::with_capacity(count);
    for _ in 0..count {
        let mut prompt = match questions.len() {
            0 => String::new(),
            known if rng.random_bool(0.5) => {
                let other = &questions[rng.random_range(0..known)].prompt;
                other[..rng.random_range(0..=other.len())].to_owned()
            }
            _ => String::new(),
        };
        let more = rng.random_range(1..=600);
        prompt.extend((0..more).map(|_| char::from(rng.random_range(b'a'..=b'z'))));
        questions.push(Question { prompt, max_tokens: rng.random_range(1..=48), answer: String::new() });
    }
    questions
}

/// Draws a question whose prompt no worker has seen: none of its KV is in a cache.
pub(super) fn draw_fresh(rng: &mut StdRng) -> Question {
    let bytes = rng.random_range(FRESH_BYTES);
    let prompt = (0..bytes).map(|_| char::from(rng.random_range(b'a'..=b'z'))).collect();
    Question { prompt, max_tokens: rng.random_range(1..=FRESH_ANSWER_MAX), answer: String::new() }
}

/// Where a question goes, and how its client behaves.
#[derive(Debug, Clone)]
pub(super) struct Client {
    pub(super) addr: String,
    pub(super) model: String,
    /// Pieces of the answer after which the client leaves.
    pub(super) leave_after: Option<usize>,
    pub(super) patience: Duration,
}

impl Client {
    /// Asks a question whose answer is known.
    pub(super) async fn ask(self, question: Arc<Question>) -> anyhow::Result<Asked> {
        Ok(Asked { ending: self.stream(&question).await, fresh_tokens: 0 })
    }

    /// Asks the single engine for the right answer first, then the fleet. An error is one of the single engine.
    pub(super) async fn ask_fresh(self, mut question: Question, single: String) -> anyhow::Result<Asked> {
        question.answer = question.ask_plainly(&single, &self.model, self.patience).await?;
        let fresh_tokens = u64::try_from(question.prompt.len())?;
        Ok(Asked { ending: self.stream(&question).await, fresh_tokens })
    }

    async fn stream(&self, question: &Question) -> Ending {
        let body = Some(question.body(&self.model, true));
        match client::send(&self.addr, Method::POST, "/v1/completions", body, self.patience).await {
            Ok(answer) => question.read(answer, self.leave_after, self.patience).await,
            Err(error) => Ending::Unclear(format!("{error:#}")),
        }
    }
}

/// What came of one request.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) ending: Ending,
    /// Tokens of a prompt that was fresh, 0 for the others.
    pub(super) fresh_tokens: u64,
}

impl Question {
    fn body(&self, model: &str, stream: bool) -> Bytes {
        let body = json!({
            "model": model, "prompt": self.prompt, "max_tokens": self.max_tokens, "temperature": 0, "stream": stream,
        });
        Bytes::from(body.to_string())
    }

    /// Asks without streaming; for the single engine that knows the right answer.
    pub(super) async fn ask_plainly(&self, addr: &str, model: &str, patience: Duration) -> anyhow::Result<String> {
        let answer =
            client::send(addr, Method::POST, "/v1/completions", Some(self.body(model, false)), patience).await?;
        let status = answer.status;
        let text = answer.text(patience).await?;
        let value: Value = serde_json::from_str(&text)?;
        match value["choices"][0]["text"].as_str() {
            Some(text) if status == StatusCode::OK => Ok(text.to_owned()),
            _ => anyhow::bail!("the single engine answered {status}: {text}"),
        }
    }

    async fn read(&self, mut answer: client::Answer, leave_after: Option<usize>, patience: Duration) -> Ending {
        if answer.status != StatusCode::OK {
            let status = answer.status;
            return match answer.text(patience).await {
                Ok(text) => error_of(&text).map_or_else(
                    || Ending::Unclear(format!("{status} with {text}")),
                    |_| Ending::ClearError(status.to_string()),
                ),
                Err(error) => Ending::Unclear(format!("{status}, then {error:#}")),
            };
        }
        let mut stream = Stream::default();
        let mut pieces = 0;
        loop {
            if leave_after == Some(pieces) {
                return stream.left(&self.answer);
            }
            match answer.piece(patience).await {
                Ok(Some(piece)) => stream.take(&piece),
                Ok(None) => break,
                Err(error) => stream.broken = Some(format!("{error:#}")),
            }
            if stream.broken.is_some() {
                break;
            }
            pieces += 1;
        }
        stream.ending(&self.answer)
    }
}

/// The message of an error in OpenAI's form.
fn error_of(text: &str) -> Option<String> {
    let value: Value = serde_json::from_str(text).ok()?;
    value["error"]["message"].as_str().map(str::to_owned)
}

/// A server-sent event stream as far as it has come.
#[derive(Debug, Default)]
struct Stream {
    rest: Vec<u8>,
    text: String,
    done: bool,
    error: Option<String>,
    broken: Option<String>,
}

impl Stream {
    fn take(&mut self, piece: &[u8]) {
        self.rest.extend_from_slice(piece);
        while let Some(end) = memchr::memmem::find(&self.rest, b"\n\n") {
            let event: Vec<u8> = self.rest.drain(..end + 2).collect();
            match std::str::from_utf8(&event).ok().and_then(|event| event.trim_end().strip_prefix("data: ")) {
                Some("[DONE]") => self.done = true,
                Some(data) => self.take_data(data),
                None => self.broken = Some(format!("not an event: {}", String::from_utf8_lossy(&event))),
            }
        }
    }

    fn take_data(&mut self, data: &str) {
        if let Some(message) = error_of(data) {
            self.error = Some(message);
            return;
        }
        match serde_json::from_str::<Value>(data) {
            Ok(value) => self.text.push_str(value["choices"][0]["text"].as_str().unwrap_or_default()),
            Err(error) => self.broken = Some(format!("not JSON ({error}): {data}")),
        }
    }

    /// The client goes: what came until then must be the beginning of the right answer.
    fn left(self, expected: &str) -> Ending {
        if expected.starts_with(&self.text) {
            Ending::Left
        } else {
            Ending::Wrong { expected: expected.to_owned(), got: self.text }
        }
    }

    fn ending(self, expected: &str) -> Ending {
        if !expected.starts_with(&self.text) {
            return Ending::Wrong { expected: expected.to_owned(), got: self.text };
        }
        match (self.error, self.broken) {
            (Some(_), _) => Ending::ClearError("error event in the stream".to_owned()),
            (None, Some(broken)) => Ending::Unclear(broken),
            (None, None) if !self.done => Ending::Unclear("the stream ended without [DONE]".to_owned()),
            (None, None) if self.text != expected => Ending::Wrong { expected: expected.to_owned(), got: self.text },
            (None, None) => Ending::Right,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ending(stream: &str) -> Ending {
        let mut read = Stream::default();
        // Cut at every byte: events do not come whole.
        stream.as_bytes().chunks(1).for_each(|piece| read.take(piece));
        read.ending("ab")
    }

    #[test]
    fn a_stream_ends_right_clear_wrong_or_unclear() {
        let part = |text: &str| format!("data: {{\"choices\":[{{\"text\":\"{text}\"}}]}}\n\n");
        let done = "data: [DONE]\n\n";
        let error = "data: {\"error\":{\"message\":\"decode worker went away\"}}\n\n";
        assert_eq!(ending(&format!("{}{}{done}", part("a"), part("b"))), Ending::Right);
        assert!(matches!(ending(&format!("{}{done}", part("a"))), Ending::Wrong { .. }));
        assert!(
            matches!(ending(&format!("{}{error}", part("c"))), Ending::Wrong { .. }),
            "a wrong token, then an error"
        );
        assert!(matches!(ending(&format!("{}{error}", part("a"))), Ending::ClearError(_)));
        assert!(matches!(ending(&part("a")), Ending::Unclear(_)), "cut off without a word");
    }

    #[test]
    fn what_a_client_saw_before_it_left_is_compared_too() {
        let left = |text: &str| {
            let mut read = Stream::default();
            read.take(format!("data: {{\"choices\":[{{\"text\":\"{text}\"}}]}}\n\n").as_bytes());
            read.left("ab")
        };
        assert_eq!(left("a"), Ending::Left);
        assert_eq!(left("c"), Ending::Wrong { expected: "ab".to_owned(), got: "c".to_owned() });
        assert_eq!(Stream::default().left("ab"), Ending::Left, "nothing had come yet");
    }

    #[test]
    fn questions_are_the_same_for_a_seed_and_share_beginnings() {
        let (first, again) = (draw(7, 40), draw(7, 40));
        assert!(first.iter().zip(&again).all(|(a, b)| a.prompt == b.prompt && a.max_tokens == b.max_tokens));
        let shares =
            |a: &Question, b: &Question| a.prompt.len() > 32 && b.prompt.len() > 32 && a.prompt[..32] == b.prompt[..32];
        assert!(first.iter().enumerate().any(|(at, a)| first[..at].iter().any(|b| shares(a, b))));
    }
}
