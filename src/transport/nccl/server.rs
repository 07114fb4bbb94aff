//! The side that owns the memory: packs and sends what a peer reads, receives what it writes and puts it where it was
//! allowed to. Everything is posted in the order in which the peer asked.
//!
//! KV-7: bytes that a peer sends lie in staging until they are put in their places under the grant, and not once it is revoked.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::frame::{self, Answer, Hello, Request, Says, Stretch, Welcome};
use super::lane::{Lane, Maker, Rounds};
use super::staging::{Slot, Staging};
use crate::ffi::nccl::{Half, Side, UniqueId};
use crate::memory::{GpuRun, Region};
use crate::transport::grant_table::{GrantTable, Granted};
use crate::transport::wire::{Serve, Socket};
use crate::transport::{GrantToken, TransportError};

/// Most requests of one peer that are posted at once.
pub(super) const POSTED_MAX: usize = 8;

/// What every connection needs.
pub(super) struct Server {
    pub(super) maker: Arc<Maker>,
    pub(super) staging: Arc<Staging>,
    pub(super) regions: Arc<[Arc<Region>]>,
    pub(super) grants: Arc<GrantTable>,
    /// Silence in the middle of a request after which its connection is closed.
    pub(super) stall_max: Duration,
    /// How long making a communicator may take.
    pub(super) connect_max: Duration,
}

impl Serve for Server {
    fn serve(&self, socket: &Socket, closing: &AtomicBool) -> TransportError {
        let mut opened = match Connection::open(self, socket, closing) {
            Ok(opened) => opened,
            Err(error) => {
                // What was made of it has ended already, and may be why the peer hung up.
                let left = socket.hung_up() && !matches!(error, TransportError::Unreachable { .. });
                return given_up(socket, error, left);
            }
        };
        let Err(error) = opened.serve();
        // Asked while the lane is still there: to end it makes the peer hang up too.
        given_up(socket, error, socket.hung_up())
    }
}

/// Says why a connection ends, unless it is that the peer has left.
fn given_up(socket: &Socket, error: TransportError, left: bool) -> TransportError {
    if !left {
        tracing::warn!(peer = socket.peer(), %error, "an nccl connection is given up");
    }
    error
}

struct Connection<'a> {
    server: &'a Server,
    socket: &'a Socket,
    closing: &'a AtomicBool,
    lane: Lane,
    posted: VecDeque<Posted>,
}

/// One request whose half is posted here.
struct Posted {
    slot: Slot,
    since: Instant,
    /// For bytes that come: where they belong.
    places: Option<Places>,
}

struct Places {
    sequence: u64,
    stretches: Vec<Stretch>,
    granted: Arc<Granted>,
}

impl<'a> Connection<'a> {
    fn open(server: &'a Server, socket: &'a Socket, closing: &'a AtomicBool) -> Result<Self, TransportError> {
        let until = |stalled: Duration| stopped(socket, closing, stalled, server.connect_max);
        let hello: Hello = frame::receive(socket, &until, &until)?;
        let id = hello.communicator.try_into().map_err(|_| TransportError::Protocol {
            peer: socket.peer().to_owned(),
            what: "the name of its communicator is not one".to_owned(),
        })?;
        let lane = server.maker.make(Side::Second, UniqueId(id), socket.peer(), &until)?;
        frame::send(socket, &Welcome { buffer_bytes: server.staging.buffer_bytes() }, &until)?;
        tracing::debug!(peer = socket.peer(), their_buffer_bytes = hello.buffer_bytes, "a communicator is made");
        Ok(Self { server, socket, closing, lane, posted: VecDeque::new() })
    }

    fn protocol(&self, what: String) -> TransportError {
        TransportError::Protocol { peer: self.socket.peer().to_owned(), what }
    }

    fn serve(&mut self) -> Result<std::convert::Infallible, TransportError> {
        let mut rounds = Rounds::default();
        loop {
            let mut news = self.settle()?;
            if self.posted.is_empty() || self.socket.readable() {
                let request = self.next()?;
                self.obey(request)?;
                news = true;
            }
            if news { rounds.news() } else { rounds.quiet() }
        }
    }

    fn next(&self) -> Result<Request, TransportError> {
        // Between requests a peer may be silent for as long as it likes.
        let idle = |_| stopped(self.socket, self.closing, Duration::ZERO, self.server.stall_max);
        let patience = |stalled| stopped(self.socket, self.closing, stalled, self.server.stall_max);
        frame::receive(self.socket, &idle, &patience)
    }

    fn obey(&mut self, request: Request) -> Result<(), TransportError> {
        if self.posted.len() >= POSTED_MAX {
            return Err(self.protocol(format!("more than {POSTED_MAX} requests at once")));
        }
        match request {
            Request::Read { stretches } => {
                // Who reads has posted its half already: there is nothing to answer but bytes.
                let bytes = self.check(&stretches)?.map_err(|says| self.protocol(format!("it reads {says:?}")))?;
                let slot = self.slot(Half::Send)?;
                self.copy(&slot, &stretches, Half::Send)?;
                self.post(Half::Send, slot, bytes, None)
            }
            Request::Write { sequence, grant, stretches } => {
                let allowed = self.check(&stretches)?.and_then(|bytes| Ok((bytes, self.granted(grant, &stretches)?)));
                match allowed {
                    Err(says) => self.say(sequence, says),
                    Ok((bytes, granted)) => {
                        let slot = self.slot(Half::Receive)?;
                        self.say(sequence, Says::Receiving)?;
                        self.post(Half::Receive, slot, bytes, Some(Places { sequence, stretches, granted }))
                    }
                }
            }
        }
    }

    /// How many bytes a peer names. What it names and we have not is answered; what nobody could mean ends the connection.
    fn check(&self, stretches: &[Stretch]) -> Result<Result<u64, Says>, TransportError> {
        let regions = u32::try_from(self.server.regions.len()).unwrap_or(u32::MAX);
        let mut bytes = 0_u64;
        for Stretch { region, offset, len } in stretches.iter().copied() {
            let Some(memory) = self.server.regions.get(usize::from(region)) else {
                return Ok(Err(Says::UnknownRegion { region, regions }));
            };
            if memory.check(offset, len).is_err() {
                return Ok(Err(Says::OutOfRange { region, offset, len, region_len: memory.len() }));
            }
            bytes = bytes.saturating_add(len);
        }
        let buffer_bytes = self.server.staging.buffer_bytes();
        if bytes == 0 || bytes > buffer_bytes {
            return Err(self.protocol(format!("a request of {bytes} bytes; 1 to {buffer_bytes} are taken")));
        }
        Ok(Ok(bytes))
    }

    fn granted(&self, grant: [u8; 16], stretches: &[Stretch]) -> Result<Arc<Granted>, Says> {
        let granted = self.server.grants.find(GrantToken(grant)).ok_or_else(|| refused(stretches))?;
        for Stretch { region, offset, len } in stretches.iter().copied() {
            granted.check(region, offset, len).map_err(|_| Says::NotGranted { region, offset, len })?;
        }
        Ok(granted)
    }

    fn say(&self, sequence: u64, says: Says) -> Result<(), TransportError> {
        let patience = |stalled| stopped(self.socket, self.closing, stalled, self.server.stall_max);
        frame::send(self.socket, &Answer { sequence, says }, &patience)
    }

    /// A staging buffer. What is posted is looked after meanwhile: it may hold the one that is waited for.
    fn slot(&mut self, half: Half) -> Result<Slot, TransportError> {
        let (began, mut rounds) = (Instant::now(), Rounds::default());
        loop {
            let taken = self.server.staging.take(half).map_err(|reason| self.unreachable(reason))?;
            if let Some(slot) = taken {
                return Ok(slot);
            }
            if self.settle()? {
                rounds.news()
            } else {
                rounds.quiet()
            }
            stopped(self.socket, self.closing, began.elapsed(), self.server.stall_max)?;
        }
    }

    fn unreachable(&self, reason: String) -> TransportError {
        TransportError::Unreachable { path: "nccl", peer: self.socket.peer().to_owned(), reason }
    }

    fn post(&mut self, half: Half, slot: Slot, bytes: u64, places: Option<Places>) -> Result<(), TransportError> {
        self.lane.post(half, &slot, bytes)?;
        self.posted.push_back(Posted { slot, since: Instant::now(), places });
        Ok(())
    }

    /// Packs for sending, or puts in their places what was received.
    fn copy(&mut self, slot: &Slot, stretches: &[Stretch], half: Half) -> Result<(), TransportError> {
        let (regions, memory) = (&self.server.regions, &**slot.memory());
        let mut at = 0;
        let runs = stretches.iter().map(|stretch| {
            let (place, staged, len) = (&*regions[usize::from(stretch.region)], at, stretch.len);
            at += len;
            match half {
                Half::Send => GpuRun { src: place, src_offset: stretch.offset, dst: memory, dst_offset: staged, len },
                Half::Receive => {
                    GpuRun { src: memory, src_offset: staged, dst: place, dst_offset: stretch.offset, len }
                }
            }
        });
        self.lane.copy(runs)
    }

    /// Finishes the oldest requests, as many as have been done. Says whether any was.
    fn settle(&mut self) -> Result<bool, TransportError> {
        let mut news = false;
        while let Some(first) = self.posted.front() {
            if !self.lane.passed(&first.slot)? {
                stopped(self.socket, self.closing, first.since.elapsed(), self.server.stall_max)?;
                break;
            }
            let Posted { slot, places, .. } = self.posted.pop_front().expect("just seen");
            if let Some(places) = places {
                self.put(&slot, &places)?;
            }
            news = true;
        }
        Ok(news)
    }

    fn put(&mut self, slot: &Slot, places: &Places) -> Result<(), TransportError> {
        let granted = places.granted.clone();
        let says = match granted.unless_revoked(|| self.copy(slot, &places.stretches, Half::Receive)) {
            Some(copied) => copied.map(|()| Says::Done)?,
            None => refused(&places.stretches),
        };
        self.say(places.sequence, says)
    }
}

fn refused(stretches: &[Stretch]) -> Says {
    let none = Stretch { region: 0, offset: 0, len: 0 };
    let Stretch { region, offset, len } = stretches.first().copied().unwrap_or(none);
    Says::NotGranted { region, offset, len }
}

/// An error if a wait is to end: the peer is gone, everybody is to go, or it has lasted too long.
fn stopped(
    socket: &Socket,
    closing: &AtomicBool,
    stalled: Duration,
    stall_max: Duration,
) -> Result<(), TransportError> {
    if closing.load(Ordering::SeqCst) || socket.hung_up() {
        return Err(TransportError::LinkClosed { peer: socket.peer().to_owned() });
    }
    if stalled <= stall_max {
        return Ok(());
    }
    let what = format!("it stopped in the middle of a request for {} ms", stalled.as_millis());
    Err(TransportError::Protocol { peer: socket.peer().to_owned(), what })
}
