//! One owner of all requests and blocks. Commands go in, one at a time; [`Scheduler::step`] moves the batch on.
//!
//! ```text
//!            ┌────────────── preempted ─────────────┐
//!            ▼                                      │
//! submit ─► waiting ─── blocks, local KV ─────► running ─► finished ─► held ─► freed
//!            │                                      ▲                  (hand-over)
//!            └── blocks, remote KV ─► loading ──────┘
//!                                       │   Received, or Failed and recomputed here
//!                                       └─ client left ─► leaving ─► freed
//! ```
//!
//! Blocks are freed at once when a waiting or running sequence ends. Those of a loading sequence wait for the link's one
//! report (KV-1), since bytes may still land in them (KV-7); those that were offered stay as they are until their report
//! (KV-2). This machine has no thread, no clock and no socket: `thread.rs` gives it those.

mod admit;
mod step;
#[cfg(test)]
mod tests;
mod thread;
mod transfer;
#[cfg(test)]
mod weight_tests;
mod weights;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::blocks::Blocks;
use super::metrics::EngineMetrics;
use super::model::Weights;
use super::request::{FinishReason, Group, Source};
use super::sequence::Sequence;
use crate::config::{InFlight, LoadFailurePolicy};
use crate::kv::{BlockId, KvLink, Report, TransferId};
pub(super) use step::Outcome;
pub(super) use thread::{Pace, SchedulerThread};
pub(super) use weights::Done;
use weights::Halt;

/// Sequences that run or load at once. More wait.
const RUNNING_MAX: usize = 256;
/// Tokens computed in one step: longer prompts take several, and others decode in between.
const STEP_TOKENS_MAX: usize = 2048;

/// What a scheduler is told.
#[derive(Debug)]
pub(super) enum Command {
    Submit(Group),
    /// The client of a group has gone.
    Abort(u64),
    /// Ends requests by the name the client gave them, or all. Answers how many sequences were ended.
    AbortNamed(Option<Vec<String>>, tokio::sync::oneshot::Sender<usize>),
    /// A request that names a transfer was refused before it came here: prefill's blocks must not wait for it.
    Decline(Source),
    ResetPrefixCache(tokio::sync::oneshot::Sender<bool>),
    /// Take no more steps.
    Pause(InFlight, Done),
    /// Only while paused.
    TakeWeights(Weights, Done),
    Resume,
    Report(Report),
    Stop,
}

/// What a scheduler is made of.
pub(super) struct SchedulerParts {
    pub blocks: Blocks,
    pub link: Arc<dyn KvLink>,
    pub metrics: Arc<EngineMetrics>,
    pub policy: LoadFailurePolicy,
    pub model_len_max: usize,
    pub weights: Weights,
}

/// Arrival order: the older one goes first, the youngest is preempted first.
type Key = u64;

pub(super) struct Scheduler {
    parts: SchedulerParts,
    waiting: BTreeMap<Key, Sequence>,
    running: BTreeMap<Key, Sequence>,
    loading: HashMap<TransferId, (Key, Sequence)>,
    /// Blocks of sequences whose client left while bytes were on their way.
    leaving: HashMap<TransferId, Filling>,
    held: HashMap<TransferId, Held>,
    halt: Halt,
    next_key: Key,
}

/// Blocks that a load fills, after `kept` others that were shared from the prefix cache.
#[derive(Debug)]
struct Filling {
    blocks: Vec<BlockId>,
    kept: usize,
}

/// Blocks under a lease.
#[derive(Debug)]
struct Held {
    group: u64,
    external_id: Arc<str>,
    blocks: Vec<BlockId>,
}

impl Scheduler {
    pub(super) fn new(parts: SchedulerParts) -> Self {
        let scheduler = Self {
            parts,
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            loading: HashMap::new(),
            leaving: HashMap::new(),
            held: HashMap::new(),
            halt: Halt::default(),
            next_key: 0,
        };
        scheduler.show();
        scheduler
    }

    /// Takes one command in.
    pub(super) fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(group) => self.submit(group),
            Command::Abort(group) => {
                self.abort(|sequence| sequence.group == group, |held| held.group == group);
            }
            Command::AbortNamed(names, answer) => {
                let named = |id: &str| names.as_ref().is_none_or(|names| names.iter().any(|name| name == id));
                let ended = self.abort(|s| named(&s.external_id), |held| named(&held.external_id));
                let _ = answer.send(ended);
            }
            Command::Decline(source) => self.decline(&source),
            Command::ResetPrefixCache(answer) => {
                let _ = answer.send(self.parts.blocks.reset_prefix_cache());
            }
            Command::Pause(in_flight, done) => self.pause(in_flight, done),
            Command::TakeWeights(weights, done) => self.take_weights(weights, done),
            Command::Resume => self.resume(),
            Command::Report(report) => self.report(report),
            Command::Stop => {
                self.abort(|_| true, |_| true);
            }
        }
        self.show();
    }

    fn submit(&mut self, group: Group) {
        let external_id: Arc<str> = group.external_id.into();
        for new in group.sequences {
            let source = new.source.clone();
            let weights = self.parts.weights;
            let events = group.events.clone();
            let mut sequence = Sequence::new(new, group.id, external_id.clone(), events, weights);
            match self.claim(&source, &sequence).and_then(|load| self.begin(&sequence).map(|()| load)) {
                Ok(load) => sequence.load = load,
                Err(error) => {
                    sequence.fail(error);
                    continue;
                }
            }
            self.waiting.insert(self.next_key, sequence);
            self.next_key += 1;
        }
    }

    /// Ends sequences and leases wherever they are. Returns how many sequences were ended.
    fn abort(&mut self, of: impl Fn(&Sequence) -> bool, held: impl Fn(&Held) -> bool) -> usize {
        let mut ended = 0;
        for (_, sequence) in self.waiting.extract_if(.., |_, sequence| of(sequence)).collect::<Vec<_>>() {
            self.let_go(&sequence);
            self.give_up(&sequence);
            sequence.end(None, String::new(), (FinishReason::Abort, None), None);
            ended += 1;
        }
        for (_, mut sequence) in self.running.extract_if(.., |_, sequence| of(sequence)).collect::<Vec<_>>() {
            self.parts.blocks.give_back(sequence.reset());
            self.give_up(&sequence);
            sequence.end(None, String::new(), (FinishReason::Abort, None), None);
            ended += 1;
        }
        for (id, (_, mut sequence)) in self.loading.extract_if(|_, (_, sequence)| of(sequence)).collect::<Vec<_>>() {
            let filling = self.filling(&mut sequence);
            self.leaving.insert(id, filling);
            sequence.end(None, String::new(), (FinishReason::Abort, None), None);
            self.parts.link.abort(id);
            ended += 1;
        }
        let leases: Vec<_> = self.held.iter().filter(|(_, lease)| held(lease)).map(|(id, _)| *id).collect();
        for id in leases {
            self.parts.link.abort(id);
        }
        self.parts.metrics.aborted.inc_by(ended as u64);
        ended
    }

    /// Puts the state into the gauges.
    fn show(&self) {
        let blocks = &self.parts.blocks;
        let held = self.held.values().map(|lease| lease.blocks.len()).sum();
        let counts = super::metrics::Gauges {
            running: self.running.len(),
            waiting: self.waiting.len(),
            loading: self.loading.len() + self.leaving.len(),
            blocks_total: blocks.total(),
            blocks_free: blocks.available(),
            blocks_cached: blocks.idle(),
            blocks_held: held,
            blocks_quarantined: blocks.quarantined(),
        };
        self.parts.metrics.show(counts);
    }
}
