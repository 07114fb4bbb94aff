//! One transfer on its way, and the table of those on a link. Holds TR-1 and TR-3 for every path.
//!
//! A flight is cut into pieces when it is admitted. Whoever carries bytes claims pieces one by one and accounts for each;
//! the last account delivers the completion. Failing a flight claims all pieces that nobody has yet, so that the completion
//! waits only for those that are being carried.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::{
    Completion, Copied, Direction, GrantToken, Piece, RunList, Totals, TransferRequest, TransferTicket, TransportError,
};

/// Most transfers in flight on one link; another is refused as `Busy`. kv's own bound (`inflight_max`) is far lower.
const INFLIGHT_MAX: usize = 4096;

/// A lock whose holder panicked holds plain data that is still consistent: every critical section here is a few stores.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One admitted transfer. Nameable only in here: [`super::mapped`] shows it in a trait.
pub struct Flight {
    pub(super) ticket: TransferTicket,
    pub(super) direction: Direction,
    pub(super) runs: RunList,
    pub(super) grant: Option<GrantToken>,
    pub(super) deadline: Instant,
    pub(super) totals: Totals,
    started: Instant,
    pieces: Vec<Piece>,
    /// Index of the next piece nobody has claimed.
    next: AtomicUsize,
    /// Pieces not yet accounted for.
    open: AtomicUsize,
    posts: AtomicU64,
    /// The first failure. Held for reading round a write into local memory by paths that end flights at once, so that
    /// setting it waits for that write and keeps out the next (TR-3).
    failure: RwLock<Option<TransportError>>,
    done: Mutex<Option<Completion>>,
    home: Arc<Inflight>,
}

impl Flight {
    /// A piece to carry. Whoever takes it must call [`Flight::account`] for it, whatever happens.
    pub(super) fn claim(&self) -> Option<Piece> {
        // Relaxed: only the number matters. What the pieces say was published with the flight itself.
        let index = self.next.fetch_add(1, Ordering::Relaxed);
        self.pieces.get(index).copied()
    }

    /// Whether a piece may still be there to claim.
    pub(super) fn has_more(&self) -> bool {
        self.next.load(Ordering::Relaxed) < self.pieces.len()
    }

    /// How many pieces have been claimed, and how many have not.
    pub(super) fn claimed_and_left(&self) -> (usize, usize) {
        let claimed = self.next.load(Ordering::Relaxed).min(self.pieces.len());
        (claimed, self.pieces.len() - claimed)
    }

    /// Accounts for one claimed piece, which `result` tells about.
    pub(super) fn account(&self, result: Result<(), TransportError>) {
        if let Err(error) = result {
            self.fail(error);
        }
        self.settle(1);
    }

    /// Ends the flight: no more pieces start, and the completion comes when those being carried are accounted for.
    pub(super) fn fail(&self, error: TransportError) {
        self.failure.write().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        let pieces = self.pieces.len();
        let claimed = self.next.swap(pieces, Ordering::Relaxed).min(pieces);
        self.settle(pieces - claimed);
    }

    /// Ends the flight and completes it at once. Only for paths that write solely inside [`Flight::unless_failed`].
    pub(super) fn fail_now(&self, error: TransportError) {
        self.fail(error);
        self.deliver();
    }

    /// Ends a push whose peer did not confirm it. Whatever failed it first is the cause; that it is not fenced is what the
    /// caller must hear.
    pub(super) fn fail_unfenced(&self, cause: TransportError) {
        let mut failure = self.failure.write().unwrap_or_else(PoisonError::into_inner);
        *failure = Some(match failure.take() {
            Some(unfenced @ TransportError::Unfenced { .. }) => unfenced,
            first => TransportError::Unfenced { peer: self.home.peer.clone(), cause: Box::new(first.unwrap_or(cause)) },
        });
        drop(failure);
        self.fail(TransportError::Cancelled);
    }

    /// Ends the flight before all its bytes have moved, on paths where only a pull writes our memory, and does so solely inside
    /// [`Flight::unless_failed`].
    pub(super) fn end(&self, error: TransportError) {
        match self.direction {
            Direction::Pull => self.fail_now(error),
            Direction::Push => self.fail(error),
        }
    }

    /// As [`Flight::end`], for a flight some of whose pieces were begun on a connection that broke.
    pub(super) fn give_up(&self, error: TransportError) {
        match self.direction {
            Direction::Pull => self.fail_now(error),
            Direction::Push => self.fail_unfenced(error),
        }
    }

    /// Ends the flight if its time is up.
    pub(super) fn end_if_late(&self, now: Instant) -> bool {
        let late = now > self.deadline;
        if late {
            self.end(self.lateness(now));
        }
        late
    }

    /// Fails the flight if its time is up.
    pub(super) fn fail_if_late(&self, now: Instant) -> bool {
        let late = now > self.deadline;
        if late {
            self.fail(self.lateness(now));
        }
        late
    }

    /// What a transfer that is late at `now` ends with.
    pub(super) fn lateness(&self, now: Instant) -> TransportError {
        let late_by = now.saturating_duration_since(self.deadline).as_millis();
        TransportError::DeadlineMissed {
            peer: self.home.peer.clone(),
            bytes: self.totals.bytes,
            late_by_ms: u64::try_from(late_by).unwrap_or(u64::MAX),
        }
    }

    pub(super) fn failed(&self) -> bool {
        self.failure.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Runs `write` unless the flight has failed, and keeps it from failing meanwhile. `write` must not block.
    pub(super) fn unless_failed<R>(&self, write: impl FnOnce() -> R) -> Option<R> {
        let failure = self.failure.read().unwrap_or_else(PoisonError::into_inner);
        failure.is_none().then(write)
    }

    /// Counts requests posted to the path.
    pub(super) fn posted(&self, posts: u64) {
        self.posts.fetch_add(posts, Ordering::Relaxed);
    }

    fn settle(&self, pieces: usize) {
        // AcqRel: the bytes that every piece wrote happen before the completion that the last one delivers (TR-2).
        if pieces > 0 && self.open.fetch_sub(pieces, Ordering::AcqRel) == pieces {
            self.deliver();
        }
    }

    /// Delivers the completion, unless that is done already (TR-1).
    fn deliver(&self) {
        let Some(done) = locked(&self.done).take() else { return };
        let failure = self.failure.read().unwrap_or_else(PoisonError::into_inner).clone();
        let result = failure.map_or_else(
            || {
                Ok(Copied {
                    bytes: self.totals.bytes,
                    posts: self.posts.load(Ordering::Relaxed),
                    started: self.started,
                    finished: Instant::now(),
                })
            },
            Err,
        );
        // Before the call, so that a completion may close its own link.
        self.home.forget(self.ticket);
        complete(done, result);
    }
}

thread_local! {
    static IN_COMPLETION: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is inside a completion. There nothing may wait for a flight or a thread: the one waited for could be
/// this very thread's next.
pub(super) fn in_completion() -> bool {
    IN_COMPLETION.get()
}

/// Calls a completion. One that panics is the caller's mistake and must not take the path's thread with it.
fn complete(done: Completion, result: Result<Copied, TransportError>) {
    let outer = IN_COMPLETION.replace(true);
    let called = catch_unwind(AssertUnwindSafe(|| done(result)));
    IN_COMPLETION.set(outer);
    if called.is_err() {
        tracing::error!("a transfer's completion panicked");
    }
}

/// The transfers in flight on one link.
pub(super) struct Inflight {
    peer: String,
    table: Mutex<Table>,
    emptied: Condvar,
}

#[derive(Default)]
struct Table {
    flights: HashMap<TransferTicket, Arc<Flight>>,
    tickets: u64,
    /// Set once; every later transfer ends with it.
    closed: Option<TransportError>,
}

impl Inflight {
    pub(super) fn new(peer: String) -> Arc<Self> {
        Arc::new(Self { peer, table: Mutex::default(), emptied: Condvar::new() })
    }

    pub(super) fn peer(&self) -> &str {
        &self.peer
    }

    /// Admits a transfer that `plan` finds valid and cuts into pieces. What is refused, and what moves no byte, completes
    /// here; the rest is the caller's to carry.
    pub(super) fn admit(
        self: &Arc<Self>,
        request: TransferRequest,
        done: Completion,
        plan: impl FnOnce(&TransferRequest) -> Result<(Totals, Vec<Piece>), TransportError>,
    ) -> (TransferTicket, Option<Arc<Flight>>) {
        let started = Instant::now();
        let ticket = {
            let mut table = locked(&self.table);
            table.tickets += 1;
            TransferTicket(table.tickets)
        };
        let (totals, pieces) = match plan(&request) {
            Ok(planned) => planned,
            Err(error) => {
                complete(done, Err(error));
                return (ticket, None);
            }
        };
        let nothing = pieces.is_empty();
        let TransferRequest { direction, runs, grant, deadline } = request;
        let flight = Arc::new(Flight {
            ticket,
            direction,
            runs,
            grant,
            deadline,
            totals,
            started,
            next: AtomicUsize::new(0),
            open: AtomicUsize::new(pieces.len()),
            pieces,
            posts: AtomicU64::new(0),
            failure: RwLock::new(None),
            done: Mutex::new(Some(done)),
            home: self.clone(),
        });
        if let Err(refused) = self.enter(&flight) {
            flight.fail_now(refused);
            return (ticket, None);
        }
        if nothing {
            flight.deliver();
            return (ticket, None);
        }
        (ticket, Some(flight))
    }

    fn enter(&self, flight: &Arc<Flight>) -> Result<(), TransportError> {
        let mut table = locked(&self.table);
        if let Some(closed) = &table.closed {
            return Err(closed.clone());
        }
        let inflight = table.flights.len();
        if inflight >= INFLIGHT_MAX {
            return Err(TransportError::Busy { peer: self.peer.clone(), inflight, inflight_max: INFLIGHT_MAX });
        }
        table.flights.insert(flight.ticket, flight.clone());
        Ok(())
    }

    fn forget(&self, ticket: TransferTicket) {
        let mut table = locked(&self.table);
        // The last reference may be this one: let it go after the lock.
        let flight = table.flights.remove(&ticket);
        if table.flights.is_empty() {
            self.emptied.notify_all();
        }
        drop(table);
        drop(flight);
    }

    pub(super) fn get(&self, ticket: TransferTicket) -> Option<Arc<Flight>> {
        locked(&self.table).flights.get(&ticket).cloned()
    }

    pub(super) fn is_empty(&self) -> bool {
        locked(&self.table).flights.is_empty()
    }

    pub(super) fn is_closed(&self) -> bool {
        locked(&self.table).closed.is_some()
    }

    /// Admits nothing more; the first cause given is the one that later transfers see. Returns what is still in flight,
    /// for the path to end.
    pub(super) fn close(&self, cause: TransportError) -> Vec<Arc<Flight>> {
        let mut table = locked(&self.table);
        table.closed.get_or_insert(cause);
        table.flights.values().cloned().collect()
    }

    /// Ends every transfer whose time is up, by `end`.
    pub(super) fn sweep(&self, now: Instant, end: impl Fn(&Flight)) {
        let late: Vec<_> = {
            let table = locked(&self.table);
            table.flights.values().filter(|flight| now > flight.deadline).cloned().collect()
        };
        late.iter().for_each(|flight| end(flight));
    }

    /// Waits until nothing is in flight, `bound` at the most; inside a completion not at all. Says whether nothing is.
    pub(super) fn wait_empty(&self, bound: Duration) -> bool {
        let until = Instant::now() + bound;
        let mut table = locked(&self.table);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if table.flights.is_empty() || left.is_zero() || in_completion() {
                return table.flights.is_empty();
            }
            table = self.emptied.wait_timeout(table, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::super::{Run, Segment};
    use super::*;

    type Told = mpsc::Receiver<Result<Copied, TransportError>>;

    fn admit(bytes: u64, piece: u64) -> (Arc<Inflight>, Option<Arc<Flight>>, Told) {
        let inflight = Inflight::new("the peer".to_owned());
        let (tell, told) = mpsc::channel();
        let runs = vec![Run { src: 0, dst: 0, len: bytes }];
        let request = TransferRequest {
            direction: Direction::Pull,
            runs: RunList { segments: vec![Segment::new(0, 0, runs)] },
            grant: None,
            deadline: Instant::now() + Duration::from_secs(60),
        };
        let done = Box::new(move |result| tell.send(result).unwrap());
        let plan = |request: &TransferRequest| {
            let sums = request.runs.validate(&[100], &[100])?;
            Ok((sums.totals, request.runs.pieces(&sums, piece, 8)))
        };
        let (_, flight) = inflight.admit(request, done, plan);
        (inflight, flight, told)
    }

    #[test]
    fn tr_1_the_last_piece_completes_and_nothing_completes_twice() {
        let (inflight, flight, told) = admit(100, 40);
        let flight = flight.unwrap();
        for left in [true, true, false] {
            assert!(told.try_recv().is_err());
            flight.claim().unwrap();
            flight.account(Ok(()));
            assert_eq!(flight.has_more(), left);
        }
        assert_eq!(told.try_recv().unwrap().unwrap().bytes, 100);
        assert!(flight.claim().is_none());
        flight.fail_now(TransportError::Cancelled);
        assert!(told.try_recv().is_err());
        assert!(inflight.wait_empty(Duration::ZERO));
    }

    #[test]
    fn tr_3_a_failed_flight_completes_only_after_the_pieces_being_carried() {
        let (inflight, flight, told) = admit(100, 40);
        let flight = flight.unwrap();
        flight.claim().unwrap();
        flight.fail(TransportError::Cancelled);
        flight.fail(TransportError::TooManyBytes);
        assert!(told.try_recv().is_err(), "one piece is still being carried");
        assert!(flight.claim().is_none());
        assert_eq!(flight.unless_failed(|| ()), None);
        flight.account(Ok(()));
        assert!(matches!(told.try_recv(), Ok(Err(TransportError::Cancelled))), "the first failure is the one told");
        assert!(inflight.wait_empty(Duration::ZERO));
    }

    #[test]
    fn what_is_refused_or_empty_completes_at_once() {
        let (_, flight, told) = admit(101, 40);
        assert!(flight.is_none() && matches!(told.try_recv(), Ok(Err(TransportError::OutOfRange { .. }))));
        let (inflight, flight, told) = admit(0, 40);
        assert!(flight.is_none() && matches!(told.try_recv(), Ok(Ok(Copied { bytes: 0, .. }))));
        assert!(inflight.close(TransportError::Cancelled).is_empty());
    }
}
