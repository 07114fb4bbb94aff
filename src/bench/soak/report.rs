//! What the soak saw, counted.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::requests::{Asked, Ending};
use super::watch::Workers;
use crate::bench::table::Table;

/// The counts of one soak.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    pub seconds: f64,
    pub clients: usize,
    pub requests: u64,
    pub right: u64,
    pub left: u64,
    /// Right answers to prompts that no worker had seen, and the tokens of those prompts: all of their KV has moved.
    pub fresh_right: u64,
    pub fresh_right_tokens: u64,
    pub kv_bytes_per_token: u64,
    /// Errors that told the client what happened, by status or kind.
    pub clear_errors: BTreeMap<String, u64>,
    /// Answers that differ from the single engine's: at most the first ten, in full.
    pub wrong: u64,
    pub wrong_examples: Vec<String>,
    pub unclear: u64,
    pub unclear_examples: Vec<String>,
    pub kills: u64,
    /// Blocks that workers still held for a transfer at the end.
    pub held_blocks: u64,
    /// Resident memory of the launcher with the proxy in it, in bytes: after a fifth of the time, and at the end.
    pub resident_early_bytes: u64,
    pub resident_end_bytes: u64,
    pub workers: Workers,
}

/// Growth of resident memory that counts as flat: allocator slack, not a leak.
const GROWTH_MAX_BYTES: u64 = 24 << 20;
/// The same for a worker, whose sequences come and go; two workers of age are compared, which need not be one process.
const WORKER_GROWTH_MAX_BYTES: u64 = 64 << 20;
/// Shorter soaks compare workers that are still filling their caches, and only report.
const WORKER_GROWTH_SECONDS_MIN: f64 = 300.0;
/// Of the KV of fresh prompts that were answered right, the share that must have been seen to move. Not all: workers that are
/// killed take their last counts with them, and a prompt's last tokens may be computed again.
const MOVED_SHARE_MIN: f64 = 0.5;

const EXAMPLES_MAX: usize = 10;

impl Report {
    pub(super) fn count(&mut self, asked: Asked) {
        self.requests += 1;
        match asked.ending {
            Ending::Right => {
                self.right += 1;
                self.fresh_right += u64::from(asked.fresh_tokens > 0);
                self.fresh_right_tokens += asked.fresh_tokens;
            }
            Ending::Left => self.left += 1,
            Ending::ClearError(kind) => *self.clear_errors.entry(kind).or_default() += 1,
            Ending::Wrong { expected, got } => {
                self.wrong += 1;
                if self.wrong_examples.len() < EXAMPLES_MAX {
                    self.wrong_examples.push(format!("expected {expected:?}, got {got:?}"));
                }
            }
            Ending::Unclear(what) => {
                self.unclear += 1;
                if self.unclear_examples.len() < EXAMPLES_MAX {
                    self.unclear_examples.push(what);
                }
            }
        }
    }

    /// What broke a promise, in words; empty when all held.
    pub fn broken_promises(&self) -> Vec<String> {
        let mut broken = Vec::new();
        if self.wrong > 0 {
            broken.push(format!("{} answers differ from the single engine's: {:?}", self.wrong, self.wrong_examples));
        }
        if self.unclear > 0 {
            broken
                .push(format!("{} requests ended without answer or error: {:?}", self.unclear, self.unclear_examples));
        }
        if self.right == 0 {
            broken.push("not one request was answered".to_owned());
        }
        if self.held_blocks > 0 {
            broken.push(format!("{} blocks are still held at rest", self.held_blocks));
        }
        if self.resident_end_bytes > self.resident_early_bytes + GROWTH_MAX_BYTES {
            let (early, end) = (self.resident_early_bytes >> 20, self.resident_end_bytes >> 20);
            broken.push(format!("resident memory of launcher and proxy grew from {early} to {end} MiB"));
        }
        if self.fresh_right == 0 {
            broken.push("not one fresh prompt was answered, so no KV had to move".to_owned());
        }
        let floor = self.moved_floor_bytes();
        if self.workers.moved_bytes < floor {
            broken.push(format!(
                "KV hardly moved: the workers count {} MiB in {} transfers, and the {} right answers to fresh prompts need {} MiB \
                 at the least",
                self.workers.moved_bytes >> 20,
                self.workers.transfers,
                self.fresh_right,
                floor >> 20
            ));
        }
        if let (Some(early), Some(end)) = (self.workers.own_early_bytes, self.workers.own_end_bytes)
            && self.seconds >= WORKER_GROWTH_SECONDS_MIN
            && end > early + WORKER_GROWTH_MAX_BYTES
        {
            broken.push(format!("a worker's own memory, without KV, grew from {} to {} MiB", early >> 20, end >> 20));
        }
        broken
    }

    /// What must have moved at the least, given the fresh prompts that were answered.
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share")]
    fn moved_floor_bytes(&self) -> u64 {
        (self.fresh_right_tokens.saturating_mul(self.kv_bytes_per_token) as f64 * MOVED_SHARE_MIN) as u64
    }
}

impl Report {
    /// As tables.
    pub fn tables(&self) -> Vec<Table> {
        let mut table = Table::new(&["what", "count"], 1);
        let mut row = |what: &str, count: String| table.row(vec![what.to_owned(), count]);
        row("seconds", format!("{:.0}", self.seconds));
        row("clients at once", self.clients.to_string());
        row("workers killed", self.kills.to_string());
        row("requests", self.requests.to_string());
        row("right answers", self.right.to_string());
        row("clients that left", self.left.to_string());
        for (kind, count) in &self.clear_errors {
            row(&format!("clear error: {kind}"), count.to_string());
        }
        row("wrong answers", self.wrong.to_string());
        row("unclear endings", self.unclear.to_string());
        row("right answers to fresh prompts", self.fresh_right.to_string());
        row("transfers that brought their KV", self.workers.transfers.to_string());
        row("transfers cut or given up", self.workers.transfers_cut.to_string());
        row("KV moved, MiB", (self.workers.moved_bytes >> 20).to_string());
        row("KV that had to move, MiB", (self.moved_floor_bytes() >> 20).to_string());
        row("blocks held at the end", self.held_blocks.to_string());
        row("launcher and proxy, resident MiB, early", (self.resident_early_bytes >> 20).to_string());
        row("launcher and proxy, resident MiB, end", (self.resident_end_bytes >> 20).to_string());
        let mib =
            |bytes: Option<u64>| bytes.map_or_else(|| "none of age".to_owned(), |bytes| (bytes >> 20).to_string());
        row("largest worker of age, MiB without KV, early", mib(self.workers.own_early_bytes));
        row("largest worker of age, MiB without KV, end", mib(self.workers.own_end_bytes));
        vec![table]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_broken_promise_is_said() {
        let known = |ending| Asked { ending, fresh_tokens: 0 };
        let mut report = Report { kv_bytes_per_token: 1 << 20, ..Report::default() };
        report.count(known(Ending::Right));
        assert_eq!(report.broken_promises().len(), 1, "no fresh prompt was answered");
        report.count(Asked { ending: Ending::Right, fresh_tokens: 100 });
        let still = report.broken_promises();
        assert!(still.len() == 1 && still[0].starts_with("KV hardly moved: the workers count 0 MiB"), "{still:?}");
        report.workers.moved_bytes = 90 << 20;
        assert!(report.broken_promises().is_empty());
        report.count(known(Ending::ClearError("503".into())));
        report.count(known(Ending::Left));
        assert!(report.broken_promises().is_empty(), "errors that are clear and clients that leave break nothing");
        report.count(known(Ending::Wrong { expected: "a".into(), got: "b".into() }));
        report.count(known(Ending::Unclear("reset".into())));
        report.held_blocks = 1;
        report.resident_end_bytes = 1 << 30;
        (report.workers.own_early_bytes, report.workers.own_end_bytes) = (Some(0), Some(1 << 30));
        assert_eq!(report.broken_promises().len(), 4, "a short soak says nothing of the workers' memory");
        report.seconds = 300.0;
        assert_eq!(report.broken_promises().len(), 5);
    }
}
