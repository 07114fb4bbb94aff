//! A bounded set of threads that copy. Work is cut by bytes, not by runs; small transfers are copied by whoever submits.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::flight::Flight;
use super::flight_queue::FlightQueue;
use super::threads::Threads;
use super::{Piece, RunList, Sums, Totals, TransportError};
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

/// The threads, and what waits for them.
pub(super) struct CopyPool {
    queue: Arc<FlightQueue<Arc<dyn Carrier>>>,
    threads: Threads,
    thread_count: usize,
}

impl CopyPool {
    /// A pool of `threads` threads, at least one.
    pub(super) fn start(threads: usize) -> io::Result<Self> {
        let pool =
            Self { queue: Arc::new(FlightQueue::new()), threads: Threads::default(), thread_count: threads.max(1) };
        for index in 0..pool.thread_count {
            let queue = pool.queue.clone();
            pool.threads.spawn(format!("pdlink-copy-{index}"), move || {
                while let Some((flight, carrier, piece)) = queue.take() {
                    let carried = carry(&flight, &*carrier, piece);
                    // First: once the piece is accounted for, its link may be closed, and nothing of it held here.
                    drop(carrier);
                    flight.account(carried);
                }
            })?;
        }
        Ok(pool)
    }

    /// Cuts a run list into pieces for these threads.
    pub(super) fn pieces(&self, runs: &RunList, sums: &Sums) -> Vec<Piece> {
        if is_small(sums.totals) {
            return runs.pieces(sums, INLINE_BYTES_MAX, PIECE_RUNS_MAX);
        }
        let shares = to_u64(self.thread_count) * PIECES_PER_THREAD;
        let piece_bytes = sums.totals.bytes.div_ceil(shares).next_multiple_of(4096);
        runs.pieces(sums, piece_bytes.clamp(PIECE_BYTES_MIN, PIECE_BYTES_MAX), PIECE_RUNS_MAX)
    }

    /// Carries `flight` to its end: here if it is small, else on the pool's threads.
    pub(super) fn carry(&self, flight: Arc<Flight>, carrier: Arc<dyn Carrier>) {
        if is_small(flight.totals) {
            while let Some(piece) = flight.claim() {
                flight.account(carry(&flight, &*carrier, piece));
            }
        } else if let Err(flight) = self.queue.push(flight, carrier) {
            flight.fail(TransportError::Cancelled);
        }
    }

    /// Lets go of flights that have ended while they waited, and of what came with them.
    pub(super) fn forget_ended(&self) {
        self.queue.forget_ended();
    }

    /// Fails what waits, ends the threads and waits for them.
    pub(super) fn close(&self) {
        for flight in self.queue.close() {
            flight.fail(TransportError::Cancelled);
        }
        self.threads.join();
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

/// A late flight carries no more bytes, and the piece in hand is accounted for all the same.
fn carry(flight: &Flight, carrier: &dyn Carrier, piece: Piece) -> Result<(), TransportError> {
    if flight.fail_if_late(Instant::now()) { Ok(()) } else { carrier.carry(flight, piece) }
}
