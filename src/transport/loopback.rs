//! Transfers inside one process, deterministic: what tests and an engine that prefills for itself run on.
//!
//! All ends of one [`LoopbackHub`] can reach one another. By default a transfer is made inside `submit`. A stepped hub
//! makes none until told, one piece at a time, so that a test can stop a transfer anywhere in its middle.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::flight::{Flight, Inflight, locked};
use super::grant_table::GrantTable;
use super::{
    CLOSE_WAIT_MAX, Completion, Direction, Export, Grant, Link, Piece, RunList, TransferRequest, TransferTicket,
    Transport, TransportError,
};
use crate::config::Path;
use crate::memory::Region;

/// Bytes per step of a stepped hub. Small, so that even a small transfer has a middle.
const STEP_BYTES: u64 = 4096;
const STEP_RUNS: usize = 64;

/// What connects loopback ends with one another.
pub struct LoopbackHub {
    id: u64,
    stepped: bool,
    ends: Mutex<Vec<Arc<Node>>>,
    queue: Mutex<VecDeque<Job>>,
}

/// One end's memory and permissions.
struct Node {
    regions: Vec<Arc<Region>>,
    grants: Arc<GrantTable>,
    gone: AtomicBool,
}

struct Job {
    flight: Arc<Flight>,
    ends: Arc<Ends>,
}

#[derive(Serialize, Deserialize)]
struct Description {
    hub: u64,
    node: u32,
}

impl LoopbackHub {
    /// A hub whose transfers are complete when `submit` returns.
    pub fn new() -> Arc<Self> {
        Self::with(false)
    }

    /// A hub whose transfers move only in [`LoopbackHub::step`].
    pub fn stepped() -> Arc<Self> {
        Self::with(true)
    }

    fn with(stepped: bool) -> Arc<Self> {
        Arc::new(Self { id: rand::random(), stepped, ends: Mutex::default(), queue: Mutex::default() })
    }

    /// A new end that owns `regions`, and calls itself `path` in records.
    pub fn transport(self: &Arc<Self>, path: Path, regions: &[Arc<Region>]) -> Arc<Loopback> {
        let node = Arc::new(Node { regions: regions.to_vec(), grants: Arc::default(), gone: AtomicBool::new(false) });
        let mut ends = locked(&self.ends);
        let number = u32::try_from(ends.len()).expect("a test makes a handful of ends");
        ends.push(node.clone());
        Arc::new(Loopback { hub: self.clone(), node, number, path, links: Mutex::default() })
    }

    /// Moves one piece of the oldest transfer. False if none was waiting.
    pub fn step(&self) -> bool {
        let Some(job) = self.next_job() else { return false };
        job.carry_one();
        if job.flight.has_more() {
            locked(&self.queue).push_front(job);
        }
        true
    }
}

impl LoopbackHub {
    /// The oldest transfer that has not ended otherwise.
    fn next_job(&self) -> Option<Job> {
        let mut queue = locked(&self.queue);
        std::iter::from_fn(|| queue.pop_front()).find(|job| job.flight.has_more())
    }
}

/// One end of a hub.
pub struct Loopback {
    hub: Arc<LoopbackHub>,
    node: Arc<Node>,
    number: u32,
    path: Path,
    links: Mutex<Vec<Weak<LoopbackLink>>>,
}

impl Transport for Loopback {
    fn path(&self) -> Path {
        self.path
    }

    fn export(&self) -> Export {
        Export::encode(&Description { hub: self.hub.id, node: self.number })
    }

    fn connect(&self, peer: &Export, _deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        let Description { hub, node } = peer.decode(self.path)?;
        let name = format!("end {node} of this process");
        let unreachable = |reason: &str| TransportError::Unreachable {
            path: self.path.name(),
            peer: name.clone(),
            reason: reason.to_owned(),
        };
        if hub != self.hub.id {
            return Err(unreachable("it belongs to another hub"));
        }
        let there = locked(&self.hub.ends).get(usize::try_from(node).unwrap_or(usize::MAX)).cloned();
        let there = there.ok_or_else(|| unreachable("there is no such end"))?;
        if there.gone.load(Ordering::SeqCst) {
            return Err(TransportError::PeerGone { peer: name });
        }
        let ends = Arc::new(Ends { here: self.node.clone(), there });
        let link =
            Arc::new(LoopbackLink { hub: self.hub.clone(), path: self.path, ends, inflight: Inflight::new(name) });
        let mut links = locked(&self.links);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        Ok(link)
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        let lens: Vec<u64> = self.node.regions.iter().map(|region| region.len()).collect();
        runs.validate_destinations(&lens)?;
        Ok(self.node.grants.grant(runs))
    }

    /// As if this end's process ended: its links close, and its peers find it gone.
    fn close(&self) {
        self.node.gone.store(true, Ordering::SeqCst);
        let links = std::mem::take(&mut *locked(&self.links));
        links.iter().filter_map(Weak::upgrade).for_each(|link| link.close());
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.close();
    }
}

struct Ends {
    here: Arc<Node>,
    there: Arc<Node>,
}

struct LoopbackLink {
    hub: Arc<LoopbackHub>,
    path: Path,
    ends: Arc<Ends>,
    inflight: Arc<Inflight>,
}

impl Link for LoopbackLink {
    fn path(&self) -> Path {
        self.path
    }

    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket {
        let (ticket, flight) = self.inflight.admit(request, done, |request| self.ends.plan(request));
        if let Some(flight) = flight {
            flight.posted(flight.totals.posts);
            let job = Job { flight, ends: self.ends.clone() };
            if self.hub.stepped {
                locked(&self.hub.queue).push_back(job);
            } else {
                while job.flight.has_more() {
                    job.carry_one();
                }
            }
        }
        ticket
    }

    fn cancel(&self, ticket: TransferTicket) {
        if let Some(flight) = self.inflight.get(ticket) {
            flight.fail(TransportError::Cancelled);
        }
    }

    fn usable(&self) -> bool {
        !self.inflight.is_closed() && !self.peer_gone()
    }

    fn peer_gone(&self) -> bool {
        self.ends.there.gone.load(Ordering::SeqCst)
    }

    fn close(&self) {
        let closed = TransportError::LinkClosed { peer: self.inflight.peer().to_owned() };
        for flight in self.inflight.close(closed) {
            flight.fail(TransportError::Cancelled);
        }
        self.inflight.wait_empty(CLOSE_WAIT_MAX);
    }
}

impl Drop for LoopbackLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl Ends {
    fn ordered(&self, direction: Direction) -> (&Node, &Node) {
        match direction {
            Direction::Pull => (&self.there, &self.here),
            Direction::Push => (&self.here, &self.there),
        }
    }

    fn plan(&self, request: &TransferRequest) -> Result<(super::Totals, Vec<Piece>), TransportError> {
        let (src, dst) = self.ordered(request.direction);
        let lens = |node: &Node| node.regions.iter().map(|region| region.len()).collect::<Vec<_>>();
        let sums = request.runs.validate(&lens(src), &lens(dst))?;
        Ok((sums.totals, request.runs.pieces(&sums, STEP_BYTES, STEP_RUNS)))
    }

    fn carry(&self, flight: &Flight, piece: Piece) -> Result<(), TransportError> {
        if self.there.gone.load(Ordering::SeqCst) {
            return Err(TransportError::PeerGone { peer: "the other end of this process".to_owned() });
        }
        let segment = &flight.runs.segments[piece.segment];
        let (src, dst) = self.ordered(flight.direction);
        let (src, dst) = (&src.regions[usize::from(segment.src_region)], &dst.regions[usize::from(segment.dst_region)]);
        for run in flight.runs.walk(piece) {
            let copy = || src.copy_to(run.src, dst, run.dst, run.len).expect("validated when it was admitted");
            match flight.direction {
                Direction::Pull => copy(),
                Direction::Push => {
                    let refused =
                        TransportError::NotGranted { region: segment.dst_region, offset: run.dst, len: run.len };
                    let granted =
                        flight.grant.and_then(|token| self.there.grants.find(token)).ok_or_else(|| refused.clone())?;
                    granted.check(segment.dst_region, run.dst, run.len)?;
                    granted.unless_revoked(copy).ok_or(refused)?;
                }
            }
        }
        Ok(())
    }
}

impl Job {
    fn carry_one(&self) {
        if self.flight.fail_if_late(Instant::now()) {
            return;
        }
        if let Some(piece) = self.flight.claim() {
            self.flight.account(self.ends.carry(&self.flight, piece));
        }
    }
}
