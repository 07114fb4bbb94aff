//! What has moved of a transfer, and when: told by each of its parts, added up in the record.

use std::time::Instant;

use super::core::micros;
use crate::telemetry::TransferRecord;
use crate::transport::Copied;

/// What has moved between one runtime of prefill and one of decode.
#[derive(Debug, Default)]
pub(super) struct Moved {
    pub(super) started: Option<Instant>,
    pub(super) finished: Option<Instant>,
    pub(super) bytes: u64,
    pub(super) runs: u64,
    pub(super) posts: u64,
}

impl Moved {
    /// Adds what the path says of its copy, or of a part of it.
    pub(super) fn note(&mut self, copied: &Copied) {
        self.bytes += copied.bytes;
        self.posts += copied.posts;
        self.started.get_or_insert(copied.started);
        self.finished = Some(copied.finished);
    }

    /// Enters all parts into the record of a transfer that waited since `since`, and ends now. `begun` stands in for the
    /// first byte where this side does not see it; `ready` is when prefill ended, where parts may have moved before.
    pub(super) fn add_up<'a>(
        all: impl Iterator<Item = &'a Self> + Clone,
        since: Option<Instant>,
        begun: Option<Instant>,
        ready: Option<Instant>,
        record: &mut TransferRecord,
    ) {
        record.bytes = all.clone().map(|moved| moved.bytes).sum();
        record.runs = all.clone().map(|moved| moved.runs).sum();
        record.posts = all.clone().map(|moved| moved.posts).sum();
        let started = all.clone().filter_map(|moved| moved.started).min().or(begun);
        let finished = all.filter_map(|moved| moved.finished).max();
        record.wait_us = micros(since, started);
        record.copy_us = micros(started, finished);
        record.exposed_us = micros(ready, finished);
        record.validate_us = micros(finished, Some(Instant::now()));
    }
}
