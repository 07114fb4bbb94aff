//! One step of the batch: prompts in chunks, one token for each that decodes.

use std::sync::Arc;

use super::super::model::Logits;
use super::super::request::{FinishReason, HandOver, StopReason, TokenOut};
use super::super::sequence::Sequence;
use super::transfer::refused;
use super::{Held, Key, STEP_TOKENS_MAX, Scheduler};
use crate::kv::{Offer, Progress};

/// What a step computed, to be told to clients once the time it takes has passed.
#[derive(Debug, Default)]
pub(in crate::engine) struct Outcome {
    /// Tokens computed that were not the single newest of a decoding sequence.
    pub prefill_tokens: usize,
    /// Sequences that took a decode step.
    pub decodes: usize,
    /// A sequence gave its blocks up: the next step may do what this one could not.
    preempted: bool,
    tokens: Vec<(Key, TokenOut)>,
}

impl Outcome {
    /// Nothing was done, and nothing can be until a command comes.
    pub(in crate::engine) fn is_stuck(&self) -> bool {
        self.prefill_tokens == 0 && self.decodes == 0 && !self.preempted
    }
}

impl Scheduler {
    /// Admits what can be admitted and computes one step. The tokens are told by [`Scheduler::deliver`]; commands may come
    /// in between.
    pub(in crate::engine) fn step(&mut self) -> Outcome {
        let mut outcome = Outcome::default();
        if self.is_halted() {
            return outcome;
        }
        self.admit();
        let mut left = STEP_TOKENS_MAX;
        for key in self.running.keys().copied().collect::<Vec<_>>() {
            let Some(sequence) = self.running.get(&key) else { continue };
            let take = (sequence.len() - sequence.computed).min(left);
            if take == 0 || !self.grow(key, take, &mut outcome) {
                continue;
            }
            left -= take;
            self.compute(key, take, &mut outcome);
        }
        self.show();
        outcome
    }

    /// Hands the step's tokens out and ends what ends with them.
    pub(in crate::engine) fn deliver(&mut self, outcome: Outcome) {
        for (key, token) in outcome.tokens {
            // Its client may have left meanwhile.
            let Some(mut sequence) = self.running.remove(&key) else { continue };
            let (text, end) = sequence.push(token.token, self.parts.model_len_max);
            self.parts.metrics.generated.inc();
            match end {
                None => {
                    sequence.tell(token, text);
                    self.running.insert(key, sequence);
                }
                Some(end) => self.finish(sequence, token, text, end),
            }
        }
        self.show();
    }

    /// Sees to it that the sequence has blocks for `take` more tokens. When there are none the youngest gives up its own;
    /// false if that was this one.
    fn grow(&mut self, key: Key, take: usize, outcome: &mut Outcome) -> bool {
        let block_size = self.parts.blocks.cache.block_size();
        loop {
            let sequence = self.running.get_mut(&key).expect("it runs");
            if sequence.blocks.len() * block_size >= sequence.computed + take {
                return true;
            }
            if let Some(block) = self.parts.blocks.take() {
                sequence.blocks.push(block);
                continue;
            }
            let (youngest, mut preempted) = self.running.pop_last().expect("at least this one runs");
            self.parts.blocks.give_back(preempted.reset());
            if let Some(transfer_id) = preempted.early() {
                self.parts.link.restart(transfer_id);
            }
            self.parts.metrics.preempted.inc();
            outcome.preempted = true;
            self.waiting.insert(youngest, preempted);
            if youngest == key {
                return false;
            }
        }
    }

    fn compute(&mut self, key: Key, take: usize, outcome: &mut Outcome) {
        let blocks = &mut self.parts.blocks;
        let sequence = self.running.get_mut(&key).expect("it runs");
        let decodes = sequence.computed >= sequence.prompt_len() && take == 1;
        let prompt_tokens = sequence.prompt_len().saturating_sub(sequence.computed).min(take);
        let positions = sequence.computed..sequence.computed + take;
        let early = sequence.early().map(|transfer_id| (transfer_id, Arc::new(vec![sequence.blocks.clone()])));
        let tokens =
            u32::try_from(positions.end.min(sequence.prompt_len())).expect("prompts are shorter than 2^32 tokens");
        for layer in 0..blocks.cache.geometry().layers() {
            for position in positions.clone() {
                blocks.cache.write(&sequence.blocks, position, layer as usize, sequence.context(position));
            }
            if let Some((transfer_id, blocks)) = &early {
                let (transfer_id, blocks) = (*transfer_id, Arc::clone(blocks));
                self.parts.link.progress(Progress { transfer_id, blocks, layers: layer..layer + 1, tokens });
            }
        }
        sequence.computed += take;
        self.parts.metrics.prompt_computed.inc_by(prompt_tokens as u64);
        if decodes {
            outcome.decodes += 1;
        } else {
            outcome.prefill_tokens += take;
        }
        for (hash, block) in sequence.newly_full(blocks.cache.block_size()) {
            blocks.publish(hash, block);
        }
        if sequence.computed == sequence.len() {
            let digest = blocks.cache.digest(&sequence.blocks, sequence.len());
            let logits = Logits::new(digest, sequence.len(), sequence.last());
            outcome.tokens.push((key, sequence.sample(logits)));
        }
    }

    fn finish(
        &mut self,
        mut sequence: Sequence,
        token: TokenOut,
        text: String,
        end: (FinishReason, Option<StopReason>),
    ) {
        let prompt_len = sequence.prompt_len();
        let mut blocks = sequence.reset();
        let Some(HandOver { transfer_id, early }) = sequence.hand_over else {
            self.parts.blocks.give_back(blocks);
            return sequence.end(Some(token), text, end, None);
        };
        let rest = blocks.split_off(prompt_len.div_ceil(self.parts.blocks.cache.block_size()));
        self.parts.blocks.give_back(rest);
        let tokens = u32::try_from(prompt_len).expect("prompts are shorter than 2^32 tokens");
        let offer =
            Offer { transfer_id, request_id: sequence.request_id.clone(), blocks: vec![blocks.clone()], tokens };
        let held = Held { group: sequence.group, external_id: sequence.external_id.clone(), blocks };
        // Entered first: the report may come before `offer` returns.
        let before = self.held.insert(transfer_id, held);
        match self.parts.link.offer(offer) {
            Ok(params) => sequence.end(Some(token), text, end, Some(Box::new(params))),
            Err(error) => {
                let held = match before {
                    Some(before) => self.held.insert(transfer_id, before),
                    None => self.held.remove(&transfer_id),
                };
                self.parts.blocks.give_back(held.map(|held| held.blocks).unwrap_or_default());
                if early {
                    self.parts.link.abort(transfer_id);
                }
                sequence.fail(refused(&error));
            }
        }
    }
}
