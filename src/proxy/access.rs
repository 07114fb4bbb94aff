//! The access log: one line per request, written by the keeper's thread.
//!
//! Lanes only note what is to be said, and when. A line that is formatted and written where it happens costs a request a
//! tenth of its time and makes lanes wait for each other at stderr; noted and written in batches it costs next to nothing,
//! and comes [`FLUSH_INTERVAL`] late at most. It has the time at which its request ended.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::time::sleep;

use super::worker::Worker;
use crate::control::TransferId;
use crate::telemetry::log;

/// How long a line may wait.
pub(crate) const FLUSH_INTERVAL: Duration = Duration::from_millis(100);
/// Lines of one lane that wait at once. More, in that time, are counted and not written.
const LINES_MAX: usize = 20_000;

/// What is said of one request.
#[derive(Debug)]
pub(crate) struct Line {
    /// When the request had ended.
    pub(crate) at: SystemTime,
    pub(crate) route: &'static str,
    pub(crate) status: u16,
    pub(crate) end: &'static str,
    pub(crate) bytes: u64,
    pub(crate) duration: Duration,
    pub(crate) request_id: Box<str>,
    pub(crate) transfer_id: Option<TransferId>,
    pub(crate) dispatch: Option<&'static str>,
    pub(crate) prefill: Option<Arc<Worker>>,
    pub(crate) decode: Option<Arc<Worker>>,
}

/// The lines of one lane.
#[derive(Debug, Default)]
pub(crate) struct AccessQueue(Mutex<Queued>);

#[derive(Debug, Default)]
struct Queued {
    lines: Vec<Line>,
    dropped: u64,
}

/// Whether anybody reads the access log.
pub(crate) fn is_wanted() -> bool {
    tracing::enabled!(target: "access", tracing::Level::INFO)
}

impl AccessQueue {
    pub(crate) fn push(&self, line: Line) {
        let mut queued = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if queued.lines.len() < LINES_MAX {
            queued.lines.push(line);
        } else {
            queued.dropped += 1;
        }
    }

    fn take(&self) -> Queued {
        let mut queued = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The next lines need about as much room; the lock is not held while they are written.
        let room = Vec::with_capacity(queued.lines.len());
        Queued { lines: std::mem::replace(&mut queued.lines, room), dropped: std::mem::take(&mut queued.dropped) }
    }
}

/// Writes what the lanes noted, until the proxy ends.
pub(crate) async fn write(queues: Vec<Arc<AccessQueue>>) {
    loop {
        sleep(FLUSH_INTERVAL).await;
        flush(&queues);
    }
}

/// Writes what is there.
pub(crate) fn flush(queues: &[Arc<AccessQueue>]) {
    for queue in queues {
        let Queued { lines, dropped } = queue.take();
        log::batched(|| lines.iter().for_each(|line| log::of_time(line.at, || write_line(line))));
        if dropped > 0 {
            tracing::warn!(target: "access", dropped, "requests came faster than their lines could be written");
        }
    }
}

fn write_line(line: &Line) {
    tracing::info!(
        target: "access",
        route = line.route,
        status = line.status,
        end = line.end,
        bytes = line.bytes,
        duration_us = u64::try_from(line.duration.as_micros()).unwrap_or(u64::MAX),
        request_id = &*line.request_id,
        transfer_id = line.transfer_id.map(tracing::field::display),
        dispatch = line.dispatch,
        prefill = line.prefill.as_ref().map(|worker| worker.name()),
        decode = line.decode.as_ref().map(|worker| worker.name()),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_beyond_the_bound_are_counted() {
        let queue = AccessQueue::default();
        let line = || Line {
            at: SystemTime::UNIX_EPOCH,
            route: "/v1/completions",
            status: 200,
            end: "done",
            bytes: 1,
            duration: Duration::ZERO,
            request_id: "r".into(),
            transfer_id: None,
            dispatch: None,
            prefill: None,
            decode: None,
        };
        (0..LINES_MAX + 3).for_each(|_| queue.push(line()));
        let taken = queue.take();
        assert_eq!((taken.lines.len(), taken.dropped), (LINES_MAX, 3));
        assert_eq!(queue.take().lines.len(), 0);
    }
}
