//! What the soak saw, counted.

use std::collections::BTreeMap;

use serde::Serialize;

use super::requests::Ending;
use crate::bench::table::Table;

/// The counts of one soak.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub seconds: f64,
    pub clients: usize,
    pub requests: u64,
    pub right: u64,
    pub left: u64,
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
}

/// Growth of resident memory that counts as flat: allocator slack, not a leak.
const GROWTH_MAX_BYTES: u64 = 24 << 20;

const EXAMPLES_MAX: usize = 10;

impl Report {
    pub(super) fn count(&mut self, ending: Ending) {
        self.requests += 1;
        match ending {
            Ending::Right => self.right += 1,
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
        broken
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
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
        row("blocks held at the end", self.held_blocks.to_string());
        row("launcher and proxy, resident MiB, early", (self.resident_early_bytes >> 20).to_string());
        row("launcher and proxy, resident MiB, end", (self.resident_end_bytes >> 20).to_string());
        write!(f, "{table}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_broken_promise_is_said() {
        let mut report = Report::default();
        report.count(Ending::Right);
        assert!(report.broken_promises().is_empty());
        report.count(Ending::ClearError("503".into()));
        report.count(Ending::Left);
        assert!(report.broken_promises().is_empty(), "errors that are clear and clients that leave break nothing");
        report.count(Ending::Wrong { expected: "a".into(), got: "b".into() });
        report.count(Ending::Unclear("reset".into()));
        report.held_blocks = 1;
        report.resident_end_bytes = 1 << 30;
        assert_eq!(report.broken_promises().len(), 4);
    }
}
