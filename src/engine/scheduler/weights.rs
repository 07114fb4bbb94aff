//! New weights between two steps: stop, flip, go on.
//!
//! While it is stopped nothing is computed, but reports of the link and leaving clients are heard. At the flip all that was
//! computed with the old weights goes (WT-3): blocks, cached blocks, KV on its way here, KV held for decode workers.

use super::super::model::Weights;
use super::super::sequence::{Load, Sequence};
use super::{Key, Scheduler};
use crate::config::InFlight;
use crate::openai::ApiError;

/// Called once, when what was asked has been done.
pub(in crate::engine) struct Done(Box<dyn FnOnce() + Send>);

impl Done {
    pub(in crate::engine) fn new(done: impl FnOnce() + Send + 'static) -> Self {
        Self(Box::new(done))
    }
}

impl std::fmt::Debug for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Done")
    }
}

/// Whether steps are taken.
#[derive(Debug, Default)]
pub(super) enum Halt {
    #[default]
    No,
    /// Answers older than `before` are finished first.
    Finishing {
        before: Key,
        done: Done,
    },
    Halted {
        in_flight: InFlight,
    },
}

impl Scheduler {
    pub(super) fn pause(&mut self, in_flight: InFlight, done: Done) {
        self.halt = match in_flight {
            InFlight::Finish => Halt::Finishing { before: self.next_key, done },
            InFlight::Continue | InFlight::Restart => {
                (done.0)();
                Halt::Halted { in_flight }
            }
        };
    }

    pub(super) fn resume(&mut self) {
        self.halt = Halt::No;
    }

    /// Whether no step may be taken. Halts once the last answer that is waited for has ended.
    pub(super) fn is_halted(&mut self) -> bool {
        if let Halt::Finishing { before, .. } = &self.halt {
            let mut keys =
                self.running.keys().chain(self.waiting.keys()).chain(self.loading.values().map(|(key, _)| key));
            if keys.any(|key| key < before) {
                return false;
            }
            let halted = Halt::Halted { in_flight: InFlight::Finish };
            if let Halt::Finishing { done, .. } = std::mem::replace(&mut self.halt, halted) {
                (done.0)();
            }
        }
        matches!(self.halt, Halt::Halted { .. })
    }

    /// Whether a sequence may begin now: while others are finished, no new one.
    pub(super) fn may_begin(&self, key: Key) -> bool {
        !matches!(self.halt, Halt::Finishing { before, .. } if key >= before)
    }

    /// The flip.
    pub(super) fn take_weights(&mut self, weights: Weights, done: Done) {
        let restarts = matches!(self.halt, Halt::Halted { in_flight: InFlight::Restart });
        self.parts.weights = weights;
        for (key, mut sequence) in std::mem::take(&mut self.running) {
            self.parts.blocks.give_back(sequence.reset());
            self.waiting.insert(key, sequence);
        }
        for (key, mut sequence) in std::mem::take(&mut self.waiting) {
            self.revoke(&mut sequence);
            if let Some(sequence) = with(sequence, weights, restarts) {
                self.waiting.insert(key, sequence);
            }
        }
        // These wait for the link's word: bytes may still come into their blocks (KV-7).
        for (_, sequence) in self.loading.values_mut() {
            sequence.outdated = true;
            sequence.go_on_with(weights);
        }
        self.parts.blocks.forget_idle();
        self.parts.link.set_weight_version(weights.version);
        (done.0)();
    }

    /// KV that is claimed and not fetched yet is of the old weights: it is computed here instead.
    fn revoke(&mut self, sequence: &mut Sequence) {
        if let Load::Claimed { handle } = sequence.load {
            self.parts.link.abort(handle.transfer_id);
            sequence.load = Load::Local;
            self.parts.metrics.recomputed.inc();
        }
    }
}

/// The sequence with new weights; `None` if it had to end.
fn with(mut sequence: Sequence, weights: Weights, restarts: bool) -> Option<Sequence> {
    if !restarts {
        sequence.go_on_with(weights);
        return Some(sequence);
    }
    if sequence.restart_with(weights) {
        return Some(sequence);
    }
    let message =
        "the weights changed while this answer was being streamed, and it would have to begin again; ask again";
    sequence.fail(ApiError::unavailable(message, std::time::Duration::ZERO));
    None
}
