//! The side that submits: one thread per link gathers pieces into requests, keeps a few of them posted, and puts what
//! comes in its places.
//!
//! A pull writes our memory only here, each time through its flight's gate: so it ends the moment it is cancelled or late, and
//! what still arrives stays in staging (TR-3). A push is written by the peer: it ends when the peer has answered for every
//! request that was begun, or as unfenced if it does not.
//!
//! Both sides must post in one order. It is the order of the requests: a push is posted when the peer says that it receives,
//! and nothing else is asked before that.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::frame::{self, Answer, REQUEST_RUNS_MAX, Request, Says, Stretch, grant_bytes};
use super::lane::{Lane, Rounds};
use super::staging::{Slot, Staging};
use crate::ffi::nccl::Half;
use crate::memory::{GpuRun, Region};
use crate::transport::flight::{Flight, Inflight};
use crate::transport::flight_queue::FlightQueue;
use crate::transport::wire::Socket;
use crate::transport::{Direction, Piece, TransportError};

/// What a request is gathered from: pieces of at most so many bytes and runs, so that one more either fits or does not.
pub(super) const PIECE_BYTES_MAX: u64 = 4 << 20;
pub(super) const PIECE_RUNS_MAX: usize = 1024;
/// Pieces of the first request and of the last.
const END_PIECES: usize = 4;
/// Requests on their way: one moves, one is being packed, and one more keeps both from waiting.
const POSTED_MAX: usize = 4;
/// How long a request may stand still over a transfer that has ended already, before the connection is given up.
const GRACE_MAX: Duration = Duration::from_millis(500);

/// What a link's thread works with.
pub(super) struct Client {
    pub(super) socket: Arc<Socket>,
    pub(super) regions: Arc<[Arc<Region>]>,
    pub(super) staging: Arc<Staging>,
    pub(super) queue: Arc<FlightQueue<()>>,
    pub(super) inflight: Arc<Inflight>,
    /// Bytes of one request: the smaller of both sides' staging buffers.
    pub(super) request_bytes_max: u64,
    pub(super) broken: Arc<AtomicBool>,
}

/// A request on its way, or about to be.
struct Batch {
    flight: Arc<Flight>,
    pieces: Vec<Piece>,
    bytes: u64,
    sequence: u64,
    state: State,
    /// When the flight was first seen to have ended.
    over_since: Option<Instant>,
}

enum State {
    /// Waits for a staging buffer to receive into.
    Gathered,
    /// A push that the peer has yet to receive.
    Asked,
    /// The peer receives; waits for a staging buffer to send from.
    Wanted,
    /// Our half is posted.
    Posted(Slot),
    /// Everything is sent; the peer has yet to say that it is in its place.
    Sent,
}

/// Requests that are on their way, oldest first.
#[derive(Default)]
struct Window {
    batches: VecDeque<Batch>,
    sequence: u64,
}

impl Client {
    /// Carries flights until the queue closes or the connection breaks.
    pub(super) fn run(&self, mut lane: Lane) {
        let mut window = Window::default();
        let carried = self.carry_all(&mut lane, &mut window);
        self.broken.store(true, Ordering::SeqCst);
        self.socket.shutdown();
        // Whatever still runs ends with it; only then may its buffers serve somebody else.
        drop(lane);
        if let Err(error) = carried {
            for batch in window.batches {
                batch.flight.give_up(error.clone());
                batch.account(&Ok(()));
            }
        }
        let closed = || TransportError::LinkClosed { peer: self.socket.peer().to_owned() };
        for flight in self.inflight.close(closed()).into_iter().chain(self.queue.close()) {
            flight.end(closed());
        }
    }

    fn carry_all(&self, lane: &mut Lane, window: &mut Window) -> Result<(), TransportError> {
        let mut rounds = Rounds::default();
        loop {
            let mut news = false;
            while window.takes_more() {
                let next = if window.batches.is_empty() { self.queue.take() } else { self.queue.try_take() };
                let Some((flight, (), piece)) = next else { break };
                news = true;
                if flight.failed() || flight.end_if_late(Instant::now()) {
                    flight.account(Ok(()));
                    continue;
                }
                let batch = self.gather(flight, piece, window.next_sequence());
                window.batches.push_back(batch);
                self.begin(lane, window)?;
            }
            if window.batches.is_empty() {
                return Ok(());
            }
            news |= self.begin(lane, window)?;
            news |= self.hear(window)?;
            news |= self.settle(lane, window)?;
            self.look_after(window)?;
            if news { rounds.news() } else { rounds.quiet() }
        }
    }

    /// Claims more pieces of a flight, as many as one request takes.
    fn gather(&self, flight: Arc<Flight>, first: Piece, sequence: u64) -> Batch {
        let runs = |piece: Piece| flight.runs.walk(piece).count();
        let (mut pieces, mut bytes, mut count) = (vec![first], first.bytes, runs(first));
        let (claimed, left) = flight.claimed_and_left();
        let bytes_max = request_bytes(claimed - 1, left + 1).min(self.request_bytes_max);
        while bytes + PIECE_BYTES_MAX <= bytes_max
            && count + PIECE_RUNS_MAX <= REQUEST_RUNS_MAX
            && let Some(piece) = flight.claim()
        {
            bytes += piece.bytes;
            count += runs(piece);
            pieces.push(piece);
        }
        flight.posted(1);
        Batch { flight, pieces, bytes, sequence, state: State::Gathered, over_since: None }
    }

    /// Takes the newest request, or the push that is wanted, as far as it gets now. Says whether it moved.
    fn begin(&self, lane: &mut Lane, window: &mut Window) -> Result<bool, TransportError> {
        let Some(batch) = window.batches.back_mut() else { return Ok(false) };
        match (&batch.state, batch.flight.direction) {
            (State::Gathered, Direction::Pull) => {
                let Some(slot) = self.slot(Half::Receive)? else { return Ok(false) };
                let stretches = batch.theirs();
                self.say(batch, &Request::Read { stretches })?;
                lane.post(Half::Receive, &slot, batch.bytes)?;
                batch.state = State::Posted(slot);
            }
            (State::Gathered, Direction::Push) => {
                let (sequence, grant) = (batch.sequence, grant_bytes(batch.flight.grant));
                self.say(batch, &Request::Write { sequence, grant, stretches: batch.theirs() })?;
                batch.state = State::Asked;
            }
            (State::Wanted, _) => {
                let Some(slot) = self.slot(Half::Send)? else { return Ok(false) };
                lane.copy(self.runs(batch, slot.memory()))?;
                lane.post(Half::Send, &slot, batch.bytes)?;
                batch.state = State::Posted(slot);
            }
            (State::Asked | State::Posted(_) | State::Sent, _) => return Ok(false),
        }
        Ok(true)
    }

    fn slot(&self, half: Half) -> Result<Option<Slot>, TransportError> {
        self.staging.take(half).map_err(|reason| TransportError::Unreachable {
            path: "nccl",
            peer: self.socket.peer().to_owned(),
            reason,
        })
    }

    fn say(&self, batch: &Batch, request: &Request) -> Result<(), TransportError> {
        frame::send(&self.socket, request, &|stalled| self.patience(&batch.flight, stalled))
    }

    /// The copies between our regions and a staging buffer that a request needs: packing a push, unpacking a pull.
    fn runs<'a>(&'a self, batch: &'a Batch, memory: &'a Region) -> impl Iterator<Item = GpuRun<'a>> {
        let flight = &*batch.flight;
        let mut at = 0;
        batch.parts().map(move |(src_region, dst_region, run)| {
            let (staged, len) = (at, run.len);
            at += len;
            match flight.direction {
                Direction::Pull => {
                    let dst = &*self.regions[usize::from(dst_region)];
                    GpuRun { src: memory, src_offset: staged, dst, dst_offset: run.dst, len }
                }
                Direction::Push => {
                    let src = &*self.regions[usize::from(src_region)];
                    GpuRun { src, src_offset: run.src, dst: memory, dst_offset: staged, len }
                }
            }
        })
    }

    /// Takes the peer's answers.
    fn hear(&self, window: &mut Window) -> Result<bool, TransportError> {
        let mut news = false;
        while self.socket.readable() {
            let patience = |stalled| self.patience_of_all(window, stalled);
            let Answer { sequence, says } = frame::receive(&self.socket, &patience, &patience)?;
            let protocol = || TransportError::Protocol {
                peer: self.socket.peer().to_owned(),
                what: format!("it answers {says:?} to request {sequence}, which is not due"),
            };
            let index = window.batches.iter().position(|batch| batch.sequence == sequence).ok_or_else(protocol)?;
            let batch = &mut window.batches[index];
            match (&batch.state, says) {
                (State::Asked, Says::Receiving) => batch.state = State::Wanted,
                // It may have been put in its place before our half was seen to have been done.
                (State::Asked | State::Posted(_) | State::Sent, says) if batch.flight.direction == Direction::Push => {
                    let result = says.result().ok_or_else(protocol)?;
                    let batch = window.batches.remove(index).expect("just found");
                    batch.account(&result);
                }
                _ => return Err(protocol()),
            }
            news = true;
        }
        Ok(news)
    }

    /// Goes on with the requests whose half has been done, in order.
    fn settle(&self, lane: &mut Lane, window: &mut Window) -> Result<bool, TransportError> {
        let mut news = false;
        let mut index = 0;
        while let Some(batch) = window.batches.get_mut(index) {
            match &batch.state {
                State::Posted(slot) if !lane.passed(slot)? => break,
                State::Posted(_) if batch.flight.direction == Direction::Push => {
                    batch.state = State::Sent;
                    news = true;
                }
                State::Posted(slot) => {
                    let put = batch.flight.unless_failed(|| lane.copy(self.runs(batch, slot.memory())));
                    put.unwrap_or(Ok(()))?;
                    window.batches.remove(index).expect("just seen").account(&Ok(()));
                    news = true;
                    continue;
                }
                State::Gathered | State::Asked | State::Wanted | State::Sent => {}
            }
            index += 1;
        }
        Ok(news)
    }

    /// Ends what is late, and gives up a connection on which what has ended does not go away.
    fn look_after(&self, window: &mut Window) -> Result<(), TransportError> {
        let now = Instant::now();
        self.inflight.sweep(now, |late| late.end(late.lateness(now)));
        for batch in window.batches.iter_mut().filter(|batch| batch.flight.failed()) {
            let over_since = *batch.over_since.get_or_insert(now);
            if now.saturating_duration_since(over_since) > GRACE_MAX {
                return Err(self.timed_out());
            }
        }
        if self.socket.hung_up() {
            return Err(TransportError::LinkClosed { peer: self.socket.peer().to_owned() });
        }
        Ok(())
    }

    /// Asked while `flight` waits for the peer or the library.
    fn patience(&self, flight: &Flight, stalled: Duration) -> Result<(), TransportError> {
        let now = Instant::now();
        self.inflight.sweep(now, |late| late.end(late.lateness(now)));
        if self.socket.hung_up() {
            return Err(TransportError::LinkClosed { peer: self.socket.peer().to_owned() });
        }
        if stalled < GRACE_MAX || !flight.failed() { Ok(()) } else { Err(self.timed_out()) }
    }

    fn patience_of_all(&self, window: &Window, stalled: Duration) -> Result<(), TransportError> {
        window.batches.iter().try_for_each(|batch| self.patience(&batch.flight, stalled))
    }

    fn timed_out(&self) -> TransportError {
        TransportError::io("transfer", self.socket.peer(), std::io::Error::from(std::io::ErrorKind::TimedOut))
    }
}

/// Most bytes of the next request of a transfer of which so many pieces have set out and so many have not. Long requests fill the
/// link; but nothing moves while the first is packed, nor while the last is unpacked, so those are short.
fn request_bytes(claimed: usize, left: usize) -> u64 {
    let pieces = (2 * claimed).min(left / 2).max(END_PIECES);
    u64::try_from(pieces).unwrap_or(u64::MAX).saturating_mul(PIECE_BYTES_MAX)
}

impl Window {
    fn next_sequence(&mut self) -> u64 {
        self.sequence += 1;
        self.sequence
    }

    /// Whether another request may be begun: not before the newest one is posted.
    fn takes_more(&self) -> bool {
        let posted = |batch: &Batch| matches!(batch.state, State::Posted(_) | State::Sent);
        self.batches.len() < POSTED_MAX && self.batches.back().is_none_or(posted)
    }
}

impl Batch {
    /// Its runs, each with the regions it goes from and to.
    fn parts(&self) -> impl Iterator<Item = (u16, u16, crate::transport::Run)> {
        self.pieces.iter().flat_map(|piece| {
            let segment = &self.flight.runs.segments[piece.segment];
            let regions = (segment.src_region, segment.dst_region);
            self.flight.runs.walk(*piece).map(move |run| (regions.0, regions.1, run))
        })
    }

    /// What of the peer's memory it is about.
    fn theirs(&self) -> Vec<Stretch> {
        let theirs = |(src_region, dst_region, run): (u16, u16, crate::transport::Run)| match self.flight.direction {
            Direction::Pull => Stretch { region: src_region, offset: run.src, len: run.len },
            Direction::Push => Stretch { region: dst_region, offset: run.dst, len: run.len },
        };
        self.parts().map(theirs).collect()
    }

    fn account(&self, result: &Result<(), TransportError>) {
        self.pieces.iter().for_each(|_| self.flight.account(result.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_short_at_both_ends_and_long_between() {
        let mib = |claimed, left| request_bytes(claimed, left) >> 20;
        assert_eq!((mib(0, 128), mib(4, 124), mib(12, 116), mib(28, 100)), (16, 32, 96, 200));
        assert_eq!((mib(112, 16), mib(120, 8), mib(127, 1), mib(0, 1)), (32, 16, 16, 16));
    }
}
