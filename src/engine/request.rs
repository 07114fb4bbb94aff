//! What a request is to the scheduler, and what comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::mpsc::UnboundedSender;

use super::model::{Candidate, Sampling, Weights};
use super::tokenizer::Token;
use crate::kv::{EarlyParams, TransferId, TransferParams};
use crate::openai::ApiError;

/// One HTTP request: one sequence per prompt and choice.
#[derive(Debug)]
pub(super) struct Group {
    pub id: u64,
    /// The client's name for it: what `/abort_requests` takes.
    pub external_id: String,
    pub sequences: Vec<NewSequence>,
    /// Unbounded, yet never longer than the sequences' `max_tokens` together.
    pub events: UnboundedSender<Event>,
}

/// One answer to be made.
#[derive(Debug)]
pub(super) struct NewSequence {
    /// Which answer of its group.
    pub index: usize,
    /// Random at its end: nothing outside this worker may be keyed on it.
    pub request_id: String,
    pub prompt: Arc<[Token]>,
    pub params: Arc<Params>,
    /// Already different for each choice.
    pub sampling: Sampling,
    pub source: Source,
    pub hand_over: Option<HandOver>,
    /// Its tokens are told as they come: what was said cannot be taken back.
    pub streams: bool,
    pub slot: Slot,
}

/// Where the prompt's KV comes from.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// Computed here, as far as the prefix cache does not have it.
    Local,
    /// Loaded from the prefill worker that these parameters name.
    Remote(Box<TransferParams>),
    /// Pushed by the prefill worker that these parameters name, while it computes it.
    Early(Box<EarlyParams>),
}

/// Prefill: the prompt's KV is for somebody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HandOver {
    pub transfer_id: TransferId,
    /// Whether it is claimed while it is computed.
    pub early: bool,
}

/// What all answers of a request have in common.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Params {
    pub max_tokens: usize,
    pub min_tokens: usize,
    pub ignore_eos: bool,
    pub stop: Vec<String>,
    pub include_stop: bool,
    pub stop_token_ids: Vec<Token>,
    /// How many candidates to report for each token; `None` reports no logprobs.
    pub logprobs: Option<usize>,
    pub cache_salt: Option<String>,
    /// The digest of the adapter that the answer is made with.
    pub adapter: Option<[u8; 16]>,
}

/// What happened to one answer.
#[derive(Debug)]
pub(super) enum Event {
    Token(TokenEvent),
    /// What was told of this answer is void: it is made anew, with other weights.
    Restarted {
        index: usize,
    },
    Failed(ApiError),
}

/// One more token, and the end if it is the last.
#[derive(Debug)]
pub(super) struct TokenEvent {
    pub index: usize,
    /// `None` if the answer ends without another token: it was aborted.
    pub token: Option<TokenOut>,
    /// The weights that the answer began with.
    pub weights: Weights,
    /// Text that may be shown now. Not always the token's: text that may begin a stop string waits.
    pub text: String,
    pub finish: Option<Finish>,
}

/// A token that was generated.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct TokenOut {
    pub token: Token,
    pub logprob: f64,
    /// The likeliest candidates, if logprobs were asked for.
    pub top: Vec<Candidate>,
}

/// How an answer ended.
#[derive(Debug)]
pub(super) struct Finish {
    pub reason: FinishReason,
    pub stop_reason: Option<StopReason>,
    /// Where decode finds the KV, if it was to be handed over.
    pub transfer: Option<Box<TransferParams>>,
    /// Prompt tokens whose KV did not have to be computed here.
    pub cached_tokens: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FinishReason {
    Stop,
    Length,
    Abort,
}

impl FinishReason {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// What was met that ends an answer, if it was not EOS.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub(super) enum StopReason {
    Text(String),
    Token(Token),
}

/// The bound on sequences that wait or run. Each holds a [`Slot`] while it lives.
#[derive(Debug)]
pub(super) struct Slots {
    used: AtomicUsize,
    max: usize,
}

/// One place under the bound, given back when dropped.
#[derive(Debug)]
pub(super) struct Slot(Arc<Slots>);

impl Slots {
    pub(super) fn new(max: usize) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), max })
    }

    /// Takes `count` places, or none.
    pub(super) fn take(self: &Arc<Self>, count: usize) -> Option<Vec<Slot>> {
        let room = |used: usize| used.checked_add(count).filter(|&sum| sum <= self.max);
        self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, room).ok()?;
        Some((0..count).map(|_| Slot(self.clone())).collect())
    }

    pub(super) fn used(&self) -> usize {
        self.used.load(Ordering::Acquire)
    }

    pub(super) fn max(&self) -> usize {
        self.max
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.used.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_all_or_none_and_come_back() {
        let slots = Slots::new(3);
        let two = slots.take(2).expect("two of three");
        assert!(slots.take(2).is_none());
        assert_eq!(slots.used(), 2);
        drop(two);
        assert!(slots.take(usize::MAX).is_none());
        assert_eq!(slots.take(3).map(|all| all.len()), Some(3));
        assert_eq!(slots.used(), 0);
    }
}
