//! A peer: what links see of it, and its requests as the driver holds them.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use super::help::{Answer, Asker, Heard};
use super::pack::{Help, Packer};
use super::packs::{Around, Given, Packs};
use super::{Description, GRACE_MAX, HelpDescription, RegionDescription};
use crate::ffi::nixl::{self, Agent, MemoryType, NixlError, Progress, Remote, Span, Transfer};
use crate::memory::{Region, to_usize};
use crate::transport::flight::Flight;
use crate::transport::identity::Reach;
use crate::transport::process::Process;
use crate::transport::{Direction, Piece, TransportError};

/// Most requests in flight to one peer: enough that one is being carried while the next is prepared and the last is noticed.
const REQUESTS_MAX: usize = 4;
/// Fewer slots than this would be filled and emptied in turn, never at once.
const SLOTS_MIN: usize = 2;

/// What a peer's links share with the driver.
pub(super) struct PeerState {
    name: String,
    /// Known where the peer runs on this host: its end is then noticed at once.
    process: Option<Process>,
    broken: AtomicBool,
    /// Bytes of a slot where runs go packed; 0 where they do not.
    slot_bytes: AtomicU64,
}

impl PeerState {
    pub(super) fn of(description: &Description) -> Result<Self, TransportError> {
        let owner = &description.owner;
        let reach =
            owner.reach().map_err(|error| TransportError::io("look for the process", &description.agent, error))?;
        let process = match reach {
            Reach::Here | Reach::Gone => Some(Process::open(owner, "nixl")?),
            Reach::OtherHost | Reach::OtherNamespace => None,
        };
        let name = process
            .as_ref()
            .map_or_else(|| format!("agent {}", description.agent), |process| process.name().to_owned());
        Ok(Self { name, process, broken: AtomicBool::new(false), slot_bytes: AtomicU64::new(0) })
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether its connection is beyond use.
    pub(super) fn broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    /// Bytes of a slot, where short runs may go packed.
    pub(super) fn slot_bytes(&self) -> Option<u64> {
        Some(self.slot_bytes.load(Ordering::SeqCst)).filter(|bytes| *bytes > 0)
    }

    /// Whether it is a process of this host.
    pub(super) fn is_near(&self) -> bool {
        self.process.is_some()
    }

    pub(super) fn gone(&self) -> bool {
        self.process.as_ref().is_some_and(Process::gone)
    }

    /// That its process has ended, if that is known.
    pub(super) fn ended(&self) -> Option<TransportError> {
        self.gone().then(|| TransportError::PeerGone { peer: self.name.clone() })
    }

    pub(super) fn unreachable(&self, reason: String) -> TransportError {
        TransportError::Unreachable { path: "nixl", peer: self.name.clone(), reason }
    }

    fn failed(&self, error: &NixlError) -> TransportError {
        self.ended().unwrap_or_else(|| self.unreachable(error.to_string()))
    }
}

/// Our regions, as requests name them.
pub(super) struct Ours {
    pub(super) regions: Vec<Arc<Region>>,
    pub(super) memory: MemoryType,
    pub(super) device: u64,
    /// Longer runs go as several.
    pub(super) span_bytes_max: u64,
}

/// A peer as the driver holds it. Field order is drop order: requests, then what they go over.
pub(super) struct Peer {
    pub(super) agent: String,
    pub(super) state: Arc<PeerState>,
    /// How many links use it.
    pub(super) links: usize,
    requests: Vec<Request>,
    pub(super) packs: Packs,
    queue: VecDeque<Arc<Flight>>,
    pairs: Vec<(Span, Span)>,
    memory: MemoryType,
    regions: Vec<RegionDescription>,
    metadata: Vec<u8>,
    /// Where it may be asked to pack, and whether that is being found out.
    pub(super) help: Option<HelpDescription>,
    pub(super) asking: Option<Asker>,
    /// Absent only while our agent is being replaced.
    remote: Option<Rc<Remote>>,
    dying: Option<Dying>,
}

/// A connection that failed. Nothing more is posted; what was posted is waited for, but not for ever.
struct Dying {
    cause: TransportError,
    until: Instant,
}

/// One request that was begun.
struct Request {
    transfer: Transfer,
    flight: Arc<Flight>,
    pace: Pace,
}

/// How long something stands still.
#[derive(Default)]
pub(super) struct Pace {
    /// When its transfer was first seen to have failed otherwise.
    failed_at: Option<Instant>,
}

impl Peer {
    pub(super) fn new(description: Description, state: Arc<PeerState>) -> Self {
        let Description { agent, memory, regions, metadata, help, .. } = description;
        Self {
            agent,
            state,
            links: 0,
            requests: Vec::new(),
            packs: Packs::default(),
            queue: VecDeque::new(),
            pairs: Vec::new(),
            memory,
            regions,
            metadata,
            help,
            asking: None,
            remote: None,
            dying: None,
        }
    }

    /// Makes the peer known to `agent`.
    pub(super) fn load(&mut self, agent: &Agent) -> Result<(), TransportError> {
        let remote = agent.load(&self.metadata).map_err(|error| self.state.unreachable(error.to_string()))?;
        if remote.name() != self.agent {
            let reason = "its metadata is of another agent".to_owned();
            return Err(TransportError::BadExport { path: "nixl", reason });
        }
        self.remote = Some(remote);
        Ok(())
    }

    /// Lets go of what the agent knows of it. Nothing may be in flight.
    pub(super) fn unload(&mut self) {
        self.remote = None;
    }

    /// The peer has lent slots, maybe none.
    fn lent(&mut self, slots: Vec<u16>, packer: &mut Packer) {
        let (Some(asker), Some(help)) = (self.asking.take(), &self.help) else { return };
        if slots.len() < SLOTS_MIN || slots.iter().any(|slot| u64::from(*slot) >= help.lent.len / help.slot_bytes) {
            tracing::info!(peer = self.state.name(), "it has no room for packed runs: they go one by one");
            return;
        }
        self.state.slot_bytes.store(help.slot_bytes.min(packer.own.slot_bytes), Ordering::SeqCst);
        self.packs = Packs::with(Help::new(asker, slots, help.slot_bytes), help);
    }

    pub(super) fn push(&mut self, flight: Arc<Flight>, packed: bool) {
        match &self.dying {
            None if packed => self.packs.push(flight),
            None => self.queue.push_back(flight),
            Some(dying) => flight.fail(dying.cause.clone()),
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.queue.is_empty() && self.packs.is_idle()
    }

    /// Whether NIXL has something of it.
    pub(super) fn has_requests(&self) -> bool {
        !self.requests.is_empty() || self.packs.is_moving()
    }

    /// Beyond use, with nothing of it left to wait for.
    pub(super) fn is_dead(&self) -> bool {
        self.dying.is_some() && self.is_idle()
    }

    /// Beyond use, with requests that do not end.
    pub(super) fn is_stuck(&self, now: Instant) -> bool {
        (self.has_requests() || self.packs.may_hang()) && self.dying.as_ref().is_some_and(|dying| now >= dying.until)
    }

    /// Starts reading its first byte into `scratch`. `None` where there is none, or it is there already.
    pub(super) fn probe(&self, ours: &Ours, scratch: &Region) -> Result<Option<Transfer>, NixlError> {
        let region = self.regions.iter().find(|region| region.len > 0);
        let (Some(region), Some(remote)) = (region, &self.remote) else { return Ok(None) };
        let here = Span { address: scratch.address(), len: 1, device: ours.device };
        let theirs = Span { address: region.address, len: 1, device: region.device };
        let (transfer, progress) = remote.start(nixl::Direction::Read, ours.memory, self.memory, &[(here, theirs)])?;
        Ok((progress == Progress::Moving).then_some(transfer))
    }

    /// Posts the next piece of the next flight, so that a small transfer never waits for a long one to end, as long as there
    /// is room. Says whether anything happened.
    pub(super) fn post(&mut self, ours: &Ours, packer: Option<&mut Packer>, now: Instant) -> bool {
        let mut happened = false;
        if let Some(packer) = packer {
            let mut around = Around { packer, remote: self.remote.as_ref(), ours, memory: self.memory };
            let posted = self.packs.post(&mut around, now);
            happened |= self.went(posted, now);
        }
        while self.requests.len() < REQUESTS_MAX
            && let Some(remote) = self.remote.clone()
            && let Some(flight) = self.queue.pop_front()
        {
            happened = true;
            if flight.fail_if_late(now) {
                continue;
            }
            let Some(piece) = flight.claim() else { continue };
            if flight.has_more() {
                self.queue.push_back(flight.clone());
            }
            self.pairs(ours, &flight, piece);
            let direction = match flight.direction {
                Direction::Pull => nixl::Direction::Read,
                Direction::Push => nixl::Direction::Write,
            };
            flight.posted(1);
            match remote.start(direction, ours.memory, self.memory, &self.pairs) {
                Ok((transfer, Progress::Moving)) => {
                    self.requests.push(Request { transfer, flight, pace: Pace::default() })
                }
                Ok((transfer, Progress::Done)) => {
                    drop(transfer);
                    flight.account(Ok(()));
                }
                Err(error) => {
                    self.die(self.state.failed(&error), now + GRACE_MAX);
                    self.failed(&flight);
                }
            }
        }
        happened
    }

    /// Looks at what was posted. Says whether anything happened.
    pub(super) fn poll(&mut self, packer: Option<&mut Packer>, now: Instant) -> bool {
        let mut happened = false;
        if let Some(packer) = packer {
            let (polled, given) = self.packs.poll(packer, now);
            happened = self.went(polled, now);
            self.give_up(&given);
        }
        let mut index = 0;
        while let Some(request) = self.requests.get_mut(index) {
            let polled = request.transfer.poll();
            if polled == Ok(Progress::Moving) {
                if request.pace.stands_still(&request.flight, now) {
                    self.die(self.state.unreachable("it does not answer".to_owned()), now);
                }
                index += 1;
                continue;
            }
            happened = true;
            let Request { transfer, flight, .. } = self.requests.swap_remove(index);
            drop(transfer);
            match polled {
                Ok(_) => flight.account(Ok(())),
                Err(error) => {
                    self.die(self.state.failed(&error), now + GRACE_MAX);
                    self.failed(&flight);
                }
            }
        }
        happened
    }

    /// Both ends of a piece's runs, into `self.pairs`.
    fn pairs(&mut self, ours: &Ours, flight: &Flight, piece: Piece) {
        let segment = &flight.runs.segments[piece.segment];
        let (here, there) = match flight.direction {
            Direction::Pull => (segment.dst_region, segment.src_region),
            Direction::Push => (segment.src_region, segment.dst_region),
        };
        let (here, there) = (&ours.regions[usize::from(here)], self.regions[usize::from(there)]);
        self.pairs.clear();
        for run in flight.runs.walk(piece) {
            let (local, remote) = match flight.direction {
                Direction::Pull => (run.dst, run.src),
                Direction::Push => (run.src, run.dst),
            };
            self.pairs.extend((0..run.len).step_by(to_usize(ours.span_bytes_max)).map(|skip| {
                let len = (run.len - skip).min(ours.span_bytes_max);
                let local = Span { address: here.address() + local + skip, len, device: ours.device };
                // Within what the peer announced, and NIXL knows where that is: an address that wraps round is none of it.
                let remote = Span { address: there.address.wrapping_add(remote + skip), len, device: there.device };
                (local, remote)
            }));
        }
    }

    /// The connection is beyond use. What waits ends now; what was begun when it is seen to have ended, by `until`.
    pub(super) fn die(&mut self, cause: TransportError, until: Instant) {
        self.state.broken.store(true, Ordering::SeqCst);
        let dying = self.dying.get_or_insert(Dying { cause, until });
        dying.until = dying.until.min(until);
        let waiting = std::mem::take(&mut self.queue);
        let packed = self.packs.flights();
        let requested = self.requests.iter().map(|request| &request.flight);
        waiting.iter().chain(requested).chain(&packed).for_each(|flight| flight.fail(dying.cause.clone()));
    }

    /// Whether anything happened to what goes packed. The connection does not survive its failing.
    fn went(&mut self, packs: Result<bool, String>, now: Instant) -> bool {
        packs.unwrap_or_else(|reason| {
            let cause = self.state.ended().unwrap_or_else(|| self.state.unreachable(reason));
            self.die(cause, now + GRACE_MAX);
            true
        })
    }

    /// Whether it was asked for slots and has not answered yet.
    pub(super) fn is_asking(&mut self, packer: Option<&mut Packer>) -> bool {
        let (Some(asker), Some(packer)) = (&mut self.asking, packer) else { return false };
        match asker.hear() {
            Ok(Heard::Nothing) => return true,
            Ok(Heard::Message(Answer::Lent { slots })) => self.lent(slots, packer),
            Ok(Heard::Message(_) | Heard::End) | Err(_) => self.lent(Vec::new(), packer),
        }
        false
    }

    /// Tells transfers that were given up.
    pub(super) fn give_up(&self, given: &Given) {
        given.iter().for_each(|(flight, pieces)| (0..*pieces).for_each(|_| self.failed(flight)));
    }

    /// Gives up every request. Their transfers are told by [`Peer::failed`], once the agent is gone.
    pub(super) fn abandon(&mut self, packer: Option<&mut Packer>) -> Given {
        let mut begun: Given = self.requests.drain(..).map(|request| (request.flight, 1)).collect();
        begun.extend(packer.map(|packer| self.packs.abandon(packer)).unwrap_or_default());
        begun
    }

    /// Accounts for a piece of a flight that was begun on a connection that failed. A push may have reached a peer that goes
    /// on, and land there at any time.
    fn failed(&self, flight: &Flight) {
        let cause = self.dying.as_ref().map_or(TransportError::Cancelled, |dying| dying.cause.clone());
        match flight.direction {
            Direction::Push if !self.state.gone() => flight.fail_unfenced(cause),
            Direction::Pull | Direction::Push => flight.fail(cause),
        }
        flight.account(Ok(()));
    }
}

impl Pace {
    /// Whether it has not moved for too long, over a transfer that has ended otherwise.
    pub(super) fn stands_still(&mut self, flight: &Flight, now: Instant) -> bool {
        if !flight.fail_if_late(now) && !flight.failed() {
            return false;
        }
        let failed_at = *self.failed_at.get_or_insert(now);
        now.saturating_duration_since(failed_at) >= GRACE_MAX
    }
}
