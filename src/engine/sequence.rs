//! One answer in the making: its tokens, the blocks that hold their KV, its text.

use super::model::{Candidate, Context, Logits, Sampling, Weights};
use super::output::OutputText;
use super::prefix_cache::BlockHash;
use super::request::{
    Event, Finish, FinishReason, HandOver, NewSequence, Params, Slot, StopReason, TokenEvent, TokenOut,
};
use super::tokenizer::{EOS, Token, token_text};
use crate::kv::{BlockId, Prompt, TransferHandle, TransferId, TransferParams};
use std::sync::Arc;
use tokio::sync::mpsc::UnboundedSender;

/// Where the prompt's KV comes from, once the link knows of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Computed here.
    Local,
    /// Claimed at prefill; its lease is being renewed.
    Claimed { handle: TransferHandle },
}

#[derive(Debug)]
pub(super) struct Sequence {
    pub group: u64,
    pub external_id: Arc<str>,
    pub index: usize,
    pub request_id: String,
    pub load: Load,
    pub hand_over: Option<HandOver>,
    pub params: Arc<Params>,
    /// Blocks that cover `tokens`, as far as they were taken.
    pub blocks: Vec<BlockId>,
    /// Tokens whose KV is in `blocks`.
    pub computed: usize,
    /// Prompt tokens that did not have to be computed when it first ran.
    pub cached_tokens: Option<usize>,
    /// Its KV is on the way here, and is of weights that have been replaced: it must not be used (WT-3).
    pub outdated: bool,
    weights: Weights,
    /// The weights when its first token was told.
    began_with: Option<Weights>,
    streams: bool,
    sampling: Sampling,
    tokens: Vec<Token>,
    prompt_len: usize,
    /// After each token.
    contexts: Vec<Context>,
    /// Of each full block of `tokens`, as far as anyone asked.
    hashes: Vec<BlockHash>,
    root: BlockHash,
    /// Blocks that were offered to the prefix cache.
    published: usize,
    text: OutputText,
    events: UnboundedSender<Event>,
    _slot: Slot,
}

impl Sequence {
    pub(super) fn new(
        new: NewSequence,
        group: u64,
        external_id: Arc<str>,
        events: UnboundedSender<Event>,
        weights: Weights,
    ) -> Self {
        let weights = weights.adapted(new.params.adapter);
        Self {
            group,
            external_id,
            index: new.index,
            request_id: new.request_id,
            load: Load::Local,
            hand_over: new.hand_over,
            blocks: Vec::new(),
            computed: 0,
            cached_tokens: None,
            outdated: false,
            weights,
            began_with: None,
            streams: new.streams,
            sampling: new.sampling,
            tokens: new.prompt.to_vec(),
            prompt_len: new.prompt.len(),
            contexts: contexts(weights, &new.prompt),
            hashes: Vec::new(),
            root: BlockHash::root(weights, new.params.cache_salt.as_deref()),
            published: 0,
            text: OutputText::new(&new.params.stop, new.params.include_stop),
            params: new.params,
            events,
            _slot: new.slot,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// What the prompt's KV depends on, in the link's words.
    pub(super) fn prompt(&self) -> Prompt {
        let tokens = u32::try_from(self.prompt_len).expect("prompts are shorter than 2^32 tokens");
        Prompt { tokens, fingerprint: self.contexts[self.prompt_len - 1].word() }
    }

    /// The transfer that decode may claim while the prompt is computed.
    pub(super) fn early(&self) -> Option<TransferId> {
        self.hand_over.filter(|hand_over| hand_over.early).map(|hand_over| hand_over.transfer_id)
    }

    pub(super) fn last(&self) -> Token {
        self.tokens[self.tokens.len() - 1]
    }

    pub(super) fn context(&self, position: usize) -> Context {
        self.contexts[position]
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Hashes of the blocks that a prefix hit may use: all full ones, but never all tokens, since the last token's KV is
    /// computed again to know what comes next.
    pub(super) fn reusable(&mut self, block_size: usize) -> &[BlockHash] {
        self.hash_up_to((self.len() - 1) / block_size, block_size)
    }

    /// Full blocks that were computed since the last call, with the hashes others find them by.
    pub(super) fn newly_full(&mut self, block_size: usize) -> Vec<(BlockHash, BlockId)> {
        let full = self.computed / block_size;
        let from = self.published;
        self.published = full.max(from);
        self.hash_up_to(full, block_size);
        (from..full).map(|index| (self.hashes[index], self.blocks[index])).collect()
    }

    /// The first `blocks` blocks came from the prefix cache: they need not be offered to it.
    pub(super) fn start_after(&mut self, blocks: usize) {
        self.published = blocks;
    }

    /// Preempted: its blocks go, what it has said stays.
    pub(super) fn reset(&mut self) -> Vec<BlockId> {
        self.computed = 0;
        self.published = 0;
        self.load = Load::Local;
        std::mem::take(&mut self.blocks)
    }

    /// From here on it is made with other weights: what was computed with the old ones is worth nothing (WT-3). What was
    /// said stays.
    pub(super) fn go_on_with(&mut self, weights: Weights) {
        let weights = weights.adapted(self.params.adapter);
        self.weights = weights;
        self.contexts = contexts(weights, &self.tokens);
        self.root = BlockHash::root(weights, self.params.cache_salt.as_deref());
        self.hashes.clear();
        self.cached_tokens = None;
    }

    /// As [`Sequence::go_on_with`], from the first token on. False: a client has read some of it, so that it cannot be.
    #[must_use]
    pub(super) fn restart_with(&mut self, weights: Weights) -> bool {
        if self.streams && self.began_with.is_some() {
            return false;
        }
        self.tokens.truncate(self.prompt_len);
        self.text = OutputText::new(&self.params.stop, self.params.include_stop);
        if self.began_with.take().is_some() {
            let _ = self.events.send(Event::Restarted { index: self.index });
        }
        self.go_on_with(weights);
        true
    }

    fn hash_up_to(&mut self, blocks: usize, block_size: usize) -> &[BlockHash] {
        while self.hashes.len() < blocks {
            let at = self.hashes.len() * block_size;
            let before = self.hashes.last().copied().unwrap_or(self.root);
            self.hashes.push(before.then(&self.tokens[at..at + block_size]));
        }
        &self.hashes[..blocks]
    }

    /// Chooses the next token. Before `min_tokens` nothing that ends the answer is chosen.
    pub(super) fn sample(&self, logits: Logits) -> TokenOut {
        let early = self.generated() < self.params.min_tokens;
        let wanted = self.params.logprobs.unwrap_or(0);
        let count = if self.sampling.temperature > 0.0 { super::model::CANDIDATES } else { wanted.max(1) };
        let spare = if early { self.params.stop_token_ids.len() } else { 0 };
        let mut candidates = logits.candidates(count + spare, early || self.params.ignore_eos);
        if early {
            let ends = |candidate: &Candidate| self.params.stop_token_ids.contains(&candidate.token);
            if !candidates.iter().all(ends) {
                candidates.retain(|candidate| !ends(candidate));
            }
        }
        let chosen = Logits::choose(&candidates, &self.sampling, self.generated());
        candidates.truncate(wanted);
        TokenOut { token: chosen.token, logprob: chosen.logprob, top: candidates }
    }

    /// Takes a token in. Returns its text and, if it ends the answer, why.
    pub(super) fn push(
        &mut self,
        token: Token,
        model_len_max: usize,
    ) -> (String, Option<(FinishReason, Option<StopReason>)>) {
        let context = self.contexts[self.contexts.len() - 1].then(token);
        self.contexts.push(context);
        self.tokens.push(token);
        let check = self.generated() >= self.params.min_tokens;
        if check && token == EOS && !self.params.ignore_eos {
            return (self.text.finish(), Some((FinishReason::Stop, None)));
        }
        let pushed = self.text.push(&token_text(token), check);
        if let Some(stop) = pushed.stopped {
            return (pushed.text, Some((FinishReason::Stop, Some(StopReason::Text(stop)))));
        }
        let end = if check && self.params.stop_token_ids.contains(&token) {
            Some((FinishReason::Stop, Some(StopReason::Token(token))))
        } else if self.generated() >= self.params.max_tokens || self.len() >= model_len_max {
            Some((FinishReason::Length, None))
        } else {
            None
        };
        let rest = if end.is_some() { self.text.finish() } else { String::new() };
        (pushed.text + &rest, end)
    }

    /// Tells the client of one more token. A client that has gone is noticed elsewhere.
    pub(super) fn tell(&mut self, token: TokenOut, text: String) {
        let weights = *self.began_with.get_or_insert(self.weights);
        let event = TokenEvent { index: self.index, token: Some(token), weights, text, finish: None };
        let _ = self.events.send(Event::Token(event));
    }

    /// Tells the client that the answer is complete.
    pub(super) fn end(
        mut self,
        token: Option<TokenOut>,
        text: String,
        end: (FinishReason, Option<StopReason>),
        transfer: Option<Box<TransferParams>>,
    ) {
        let text = text + &self.text.finish();
        let cached_tokens = self.cached_tokens.unwrap_or(0);
        let finish = Finish { reason: end.0, stop_reason: end.1, transfer, cached_tokens };
        let weights = self.began_with.unwrap_or(self.weights);
        let event = TokenEvent { index: self.index, token, weights, text, finish: Some(finish) };
        // The place is free before the client can ask whether it is.
        let events = self.events.clone();
        drop(self);
        let _ = events.send(Event::Token(event));
    }

    /// Tells the client that there will be no answer.
    pub(super) fn fail(self, error: crate::openai::ApiError) {
        let events = self.events.clone();
        drop(self);
        let _ = events.send(Event::Failed(error));
    }
}

/// The context after each token.
fn contexts(weights: Weights, tokens: &[Token]) -> Vec<Context> {
    let mut context = Context::start(weights);
    let after = |&token: &Token| {
        context = context.then(token);
        context
    };
    tokens.iter().map(after).collect()
}
