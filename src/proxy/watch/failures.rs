//! The last failures, with their causes. Bounded; the same failure again is counted, not listed.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::telemetry::clock;

const FAILURES_MAX: usize = 50;
/// Most of a cause that is kept.
const CAUSE_CHARS_MAX: usize = 400;
/// Among so many of the last ones the same failure is looked for.
const SAME_AMONG: usize = 8;

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum What {
    /// A leg of a request.
    Request,
    /// A transfer of KV, as a worker's runtime told it.
    Transfer,
    /// A worker's health.
    Worker,
    /// An update of the weights.
    Weights,
}

/// One failure, or several that were the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Failed {
    pub(crate) at_unix_ms: u64,
    pub(crate) times: u64,
    pub(crate) what: What,
    /// The number of the worker; none where it was no worker's.
    pub(crate) worker: Option<usize>,
    pub(crate) cause: String,
}

#[derive(Debug, Default)]
pub(crate) struct Failures(Mutex<VecDeque<Failed>>);

impl Failures {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Failed>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note(&self, what: What, worker: Option<usize>, cause: &str) {
        self.note_at(unix_ms(), what, worker, cause);
    }

    pub(crate) fn note_at(&self, at_unix_ms: u64, what: What, worker: Option<usize>, cause: &str) {
        let cause: String = cause.chars().take(CAUSE_CHARS_MAX).collect();
        let mut failures = self.lock();
        let is = |known: &Failed| (known.what, known.worker) == (what, worker) && known.cause == cause;
        let recent = failures.len().saturating_sub(SAME_AMONG);
        let same = failures.iter().enumerate().skip(recent).find(|(_, known)| is(known)).map(|(at, _)| at);
        let times = same.and_then(|at| failures.remove(at)).map_or(0, |known| known.times) + 1;
        if failures.len() == FAILURES_MAX {
            failures.pop_front();
        }
        failures.push_back(Failed { at_unix_ms, times, what, worker, cause });
    }

    /// Whether somebody has told of a worker's end a moment ago, and knows more about it.
    pub(crate) fn has_told_of(&self, worker: usize, within_ms: u64) -> bool {
        let since = unix_ms().saturating_sub(within_ms);
        let is =
            |known: &Failed| known.what == What::Worker && known.worker == Some(worker) && known.at_unix_ms >= since;
        self.lock().iter().any(is)
    }

    /// The newest first.
    pub(crate) fn all(&self) -> Vec<Failed> {
        self.lock().iter().rev().cloned().collect()
    }
}

pub(crate) fn unix_ms() -> u64 {
    clock::unix_us() / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_again_is_counted_and_the_oldest_is_forgotten() {
        let failures = Failures::default();
        for _ in 0..1000 {
            failures.note(What::Request, Some(1), "refused");
            failures.note(What::Transfer, Some(1), &"x".repeat(10_000));
        }
        let all = failures.all();
        assert_eq!((all.len(), all[0].times, all[1].times), (2, 1000, 1000));
        assert_eq!((all[0].what, all[0].cause.len()), (What::Transfer, CAUSE_CHARS_MAX));
        for number in 0..1000 {
            failures.note(What::Request, None, &number.to_string());
        }
        failures.note(What::Worker, Some(3), "killed");
        assert!(failures.has_told_of(3, 60_000) && !failures.has_told_of(4, 60_000));
        let all = failures.all();
        assert_eq!((all.len(), all[1].cause.as_str()), (FAILURES_MAX, "999"));
    }
}
