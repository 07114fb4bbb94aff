//! The side that submits: one thread per connection takes pieces, asks for them, and keeps a second request on its way
//! while the first is answered.
//!
//! A pull writes our memory only here, each time through its flight's gate: so it ends the moment it is cancelled or late, and
//! what still arrives is thrown away (TR-3). A push is written by the peer: it ends when the peer has answered for every piece
//! that was begun, or as unfenced if it does not.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::frame::{ANSWER_BYTES, Answer, Operation, RUN_BYTES, Request, encode_run};
use crate::memory::Region;
use crate::transport::flight::{Flight, Inflight};
use crate::transport::flight_queue::FlightQueue;
use crate::transport::wire::{Socket, Span};
use crate::transport::{Direction, End, GrantToken, Piece, Segment, TransportError};

/// Requests on their way per connection: one being answered, one behind it.
const PIPELINE: usize = 2;
/// How long a connection may stand still over a transfer that is already cancelled or late, before it is given up.
const GRACE_MAX: Duration = Duration::from_millis(500);

/// One connection of a link.
pub(super) struct Stream {
    pub(super) socket: Socket,
    pub(super) regions: Arc<[Arc<Region>]>,
    pub(super) queue: Arc<FlightQueue<()>>,
    pub(super) inflight: Arc<Inflight>,
    pub(super) broken: AtomicBool,
}

type Sent = VecDeque<(Arc<Flight>, Piece)>;

impl Stream {
    /// Carries pieces until the queue closes or the connection breaks.
    pub(super) fn run(&self) {
        let mut sent = Sent::new();
        let Err(error) = self.carry_all(&mut sent) else { return };
        self.broken.store(true, Ordering::SeqCst);
        self.socket.shutdown();
        for (flight, _) in sent {
            flight.give_up(error.clone());
            flight.account(Ok(()));
        }
    }

    fn carry_all(&self, sent: &mut Sent) -> Result<(), TransportError> {
        loop {
            while sent.len() < PIPELINE {
                let next = if sent.is_empty() { self.queue.take() } else { self.queue.try_take() };
                let Some((flight, (), piece)) = next else { break };
                if flight.failed() || flight.end_if_late(Instant::now()) {
                    flight.account(Ok(()));
                    continue;
                }
                flight.posted(1);
                sent.push_back((flight.clone(), piece));
                self.request(&flight, piece)?;
            }
            let Some((flight, piece)) = sent.front() else { return Ok(()) };
            let answered = self.answer(flight, *piece)?;
            flight.account(answered);
            sent.pop_front();
        }
    }

    fn request(&self, flight: &Flight, piece: Piece) -> Result<(), TransportError> {
        let patience = |stalled| self.patience(flight, stalled);
        let segment = &flight.runs.segments[piece.segment];
        let runs = u32::try_from(flight.runs.walk(piece).count()).expect("bounded when the pieces were cut");
        let (operation, region) = match flight.direction {
            Direction::Pull => (Operation::Read, segment.src_region),
            Direction::Push => {
                // The peer refuses a push without a grant, and it is the one to say so.
                let grant = flight.grant.unwrap_or(GrantToken([0; 16]));
                (Operation::Write(grant), segment.dst_region)
            }
        };
        let mut head = Vec::with_capacity(flight.runs.segments[piece.segment].runs.len().min(512) * RUN_BYTES + 32);
        head.extend_from_slice(&Request { operation, region, runs, bytes: piece.bytes }.encode());
        for run in flight.runs.walk(piece) {
            let offset = if flight.direction == Direction::Pull { run.src } else { run.dst };
            head.extend_from_slice(&encode_run(offset, run.len));
        }
        self.socket.write_all(&head, &patience)?;
        match flight.direction {
            Direction::Pull => Ok(()),
            Direction::Push => self.socket.send(&mut self.span(flight, piece, segment), &patience),
        }
    }

    /// The peer's answer to a piece. An error of this function is the end of the connection; a refusal is the piece's alone.
    fn answer(&self, flight: &Flight, piece: Piece) -> Result<Result<(), TransportError>, TransportError> {
        let patience = |stalled| self.patience(flight, stalled);
        let mut answer = [0; ANSWER_BYTES];
        self.socket.read_exact(&mut answer, &patience)?;
        let answer = Answer::decode(&answer)
            .map_err(|what| TransportError::Protocol { peer: self.socket.peer().to_owned(), what })?;
        let end = match flight.direction {
            Direction::Pull => End::Source,
            Direction::Push => End::Destination,
        };
        if answer == Answer::Done && flight.direction == Direction::Pull {
            let mut span = self.span(flight, piece, &flight.runs.segments[piece.segment]);
            self.socket.receive(&mut span, &patience, |write| flight.unless_failed(write))?;
        }
        Ok(answer.result(end))
    }

    /// Our end of a piece.
    fn span(&self, flight: &Flight, piece: Piece, segment: &Segment) -> Span<'_> {
        let mut span = Span::default();
        let region = match flight.direction {
            Direction::Pull => &self.regions[usize::from(segment.dst_region)],
            Direction::Push => &self.regions[usize::from(segment.src_region)],
        };
        for run in flight.runs.walk(piece) {
            let offset = if flight.direction == Direction::Pull { run.dst } else { run.src };
            span.push(region, offset, run.len).expect("validated when the flight was admitted");
        }
        span
    }

    /// Ends what is late, here and behind us in the queue: a connection that hangs must not hold up deadlines.
    fn patience(&self, flight: &Flight, stalled: Duration) -> Result<(), TransportError> {
        let now = Instant::now();
        self.inflight.sweep(now, |late| late.end(late.lateness(now)));
        if stalled < GRACE_MAX || !flight.failed() {
            return Ok(());
        }
        Err(TransportError::io("transfer", self.socket.peer(), std::io::Error::from(std::io::ErrorKind::TimedOut)))
    }
}
