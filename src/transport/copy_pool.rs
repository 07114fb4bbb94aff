//! A bounded set of threads that copy. Work is cut by bytes, not by runs, and every thread takes the next piece of the next
//! transfer in turn: a small transfer never waits for a long one to end, and a deadline is noticed within a few pieces.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::flight::{Flight, locked};
use super::{Piece, RunList, Totals, TransportError};
use crate::memory::to_u64;

/// Transfers up to this size are copied by the thread that submits them: it takes less time than waking another.
const INLINE_BYTES_MAX: u64 = 64 * 1024;
const INLINE_RUNS_MAX: u64 = 64;
/// Bounds of a piece. The lower keeps the cost of taking one negligible; the upper keeps a cancel, and what TR-3 waits for,
/// to a fraction of a millisecond.
const PIECE_BYTES_MIN: u64 = 64 * 1024;
const PIECE_BYTES_MAX: u64 = 2 * 1024 * 1024;
/// Runs too short to be copied at memory speed are bounded by their number instead.
const PIECE_RUNS_MAX: usize = 4096;
/// Pieces per thread that a transfer is cut into, so that threads which lose the processor for a while are made up for.
const PIECES_PER_THREAD: u64 = 8;

/// Copies pieces of a flight: what differs between kinds of memory.
pub(super) trait Carrier: Send + Sync {
    fn carry(&self, flight: &Flight, piece: Piece) -> Result<(), TransportError>;
}

/// The threads. Ended and joined by [`CopyPool::close`].
pub(super) struct CopyPool {
    queue: Arc<Queue>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    thread_count: usize,
}

#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    work: Condvar,
}

#[derive(Default)]
struct Waiting {
    /// Bounded by the links: each admits a bounded number of flights, and each flight is here at most once.
    jobs: VecDeque<Job>,
    closed: bool,
}

struct Job {
    flight: Arc<Flight>,
    carrier: Arc<dyn Carrier>,
}

impl CopyPool {
    /// A pool of `threads` threads, at least one.
    pub(super) fn start(threads: usize) -> io::Result<Self> {
        let thread_count = threads.max(1);
        let queue = Arc::new(Queue::default());
        let pool = Self { queue, threads: Mutex::default(), thread_count };
        for index in 0..thread_count {
            let queue = pool.queue.clone();
            let name = format!("pdlink-copy-{index}");
            locked(&pool.threads).push(std::thread::Builder::new().name(name).spawn(move || queue.serve())?);
        }
        Ok(pool)
    }

    /// Cuts a run list into pieces for these threads.
    pub(super) fn pieces(&self, runs: &RunList, totals: Totals) -> Vec<Piece> {
        if is_small(totals) {
            return runs.pieces(INLINE_BYTES_MAX, PIECE_RUNS_MAX);
        }
        let shares = to_u64(self.thread_count) * PIECES_PER_THREAD;
        let piece_bytes = totals.bytes.div_ceil(shares).next_multiple_of(4096);
        runs.pieces(piece_bytes.clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX), PIECE_RUNS_MAX)
    }

    /// Carries `flight` to its end: here if it is small, else on the pool's threads.
    pub(super) fn carry(&self, flight: Arc<Flight>, carrier: Arc<dyn Carrier>) {
        let job = Job { flight, carrier };
        if is_small(job.flight.totals) {
            while job.carry_one() {}
            return;
        }
        let mut waiting = locked(&self.queue.waiting);
        if waiting.closed {
            drop(waiting);
            job.flight.fail(TransportError::Cancelled);
            return;
        }
        waiting.jobs.push_back(job);
        drop(waiting);
        self.queue.work.notify_all();
    }

    /// Fails what waits, ends the threads and joins them. From one of its own threads it joins all but that one.
    pub(super) fn close(&self) {
        let jobs = {
            let mut waiting = locked(&self.queue.waiting);
            waiting.closed = true;
            std::mem::take(&mut waiting.jobs)
        };
        self.queue.work.notify_all();
        for job in jobs {
            job.flight.fail(TransportError::Cancelled);
        }
        let threads = std::mem::take(&mut *locked(&self.threads));
        for thread in threads.into_iter().filter(|thread| thread.thread().id() != std::thread::current().id()) {
            // Its completions are caught where they are called; a panic here would be ours, and was printed.
            let _ = thread.join();
        }
    }
}

impl Drop for CopyPool {
    fn drop(&mut self) {
        self.close();
    }
}

fn is_small(totals: Totals) -> bool {
    totals.bytes <= INLINE_BYTES_MAX && totals.runs <= INLINE_RUNS_MAX
}

impl Queue {
    fn serve(&self) {
        while let Some((job, piece)) = self.take() {
            job.carry(piece);
        }
    }

    /// The next piece, and the transfer it belongs to. `None` once closed.
    fn take(&self) -> Option<(Job, Piece)> {
        let mut waiting = locked(&self.waiting);
        loop {
            if waiting.closed {
                return None;
            }
            let Some(job) = waiting.jobs.pop_front() else {
                waiting = self.work.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let Some(piece) = job.flight.claim() else { continue };
            if job.flight.has_more() {
                waiting.jobs.push_back(Job { flight: job.flight.clone(), carrier: job.carrier.clone() });
            }
            return Some((job, piece));
        }
    }
}

impl Job {
    fn carry(&self, piece: Piece) {
        // A late flight carries no more bytes, and the piece in hand is still accounted for.
        let late = self.flight.fail_if_late(Instant::now());
        self.flight.account(if late { Ok(()) } else { self.carrier.carry(&self.flight, piece) });
    }

    fn carry_one(&self) -> bool {
        self.flight.claim().map(|piece| self.carry(piece)).is_some()
    }
}
