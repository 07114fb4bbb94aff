//! Host memory of one host. The regions that a process made itself are memory files: a peer maps them through
//! `/proc/PID/fd/N` and copies with plain loads and stores. Memory that it borrowed is reached by `process_vm_readv` and
//! `process_vm_writev`. Either way the process that submits makes the whole copy, and the peer's threads do nothing.
//!
//! A pusher writes the peer's memory itself, so a grant here is a promise, not a fence ([`super::Fence::AskPeer`]): kv asks the
//! peer whether its transfer is over, or waits until [`Link::peer_gone`] (KV-7).

mod peer;
mod process_vm;

use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use self::peer::Peer;
use super::copy_pool::CopyPool;
use super::flight::{Inflight, locked};
use super::identity::Identity;
use super::{
    CLOSE_WAIT_MAX, Completion, Direction, Export, Grant, GrantToken, Link, RunList, TransferRequest, TransferTicket,
    Transport, TransportError,
};
use crate::config::Path;
use crate::memory::{Backing, Region};

/// What a peer needs to reach our memory.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    owner: Identity,
    regions: Vec<RegionDescription>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct RegionDescription {
    len: u64,
    place: Place,
}

/// Where a region is to be found.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Place {
    /// Behind a file descriptor of its owner: this very file, and none that has taken its number since.
    File { fd: i32, device: u64, inode: u64, prefault: bool },
    /// At an address of its owner.
    Address(u64),
}

/// The `shm` path of this process.
pub struct Shm {
    regions: Arc<[Arc<Region>]>,
    export: Export,
    pool: Arc<CopyPool>,
    links: Mutex<Vec<Weak<ShmLink>>>,
}

impl Shm {
    /// Offers `regions`, and copies with `copy_threads` threads.
    pub fn new(regions: &[Arc<Region>], copy_threads: usize) -> Result<Self, TransportError> {
        let unusable =
            |reason: String| TransportError::Unreachable { path: "shm", peer: "this process".to_owned(), reason };
        let owner = Identity::of_self().map_err(|error| unusable(error.to_string()))?;
        if regions.iter().any(|region| region.backing() == Backing::Borrowed) {
            process_vm::allow_peers();
        }
        let description = Description { owner, regions: regions.iter().map(|region| describe(region)).collect() };
        let pool = CopyPool::start(copy_threads).map_err(|error| unusable(format!("no thread: {error}")))?;
        let export = Export::encode(&description);
        Ok(Self { regions: regions.into(), export, pool: Arc::new(pool), links: Mutex::default() })
    }
}

fn describe(region: &Region) -> RegionDescription {
    let place = match region.backing() {
        Backing::Shared { fd, device, inode, prefault } => Place::File { fd, device, inode, prefault },
        Backing::Borrowed | Backing::Device => Place::Address(region.address()),
    };
    RegionDescription { len: region.len(), place }
}

impl Transport for Shm {
    fn path(&self) -> Path {
        Path::Shm
    }

    fn export(&self) -> Export {
        self.export.clone()
    }

    fn connect(&self, peer: &Export, _deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        let description: Description = peer.decode(Path::Shm)?;
        let peer = Peer::open(&description, self.regions.clone())?;
        let inflight = Inflight::new(peer.name().to_owned());
        let link = Arc::new(ShmLink { peer: Mutex::new(Some(Arc::new(peer))), pool: self.pool.clone(), inflight });
        let mut links = locked(&self.links);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        Ok(link)
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        let lens: Vec<u64> = self.regions.iter().map(|region| region.len()).collect();
        runs.validate_destinations(&lens)?;
        Ok(Grant::unenforced(GrantToken::random()))
    }

    fn close(&self) {
        let links = std::mem::take(&mut *locked(&self.links));
        links.iter().filter_map(Weak::upgrade).for_each(|link| link.close());
        self.pool.close();
    }
}

impl Drop for Shm {
    fn drop(&mut self) {
        self.close();
    }
}

struct ShmLink {
    /// Taken when the link closes: the peer's memory is unmapped once the last transfer has let go of it.
    peer: Mutex<Option<Arc<Peer>>>,
    pool: Arc<CopyPool>,
    inflight: Arc<Inflight>,
}

impl ShmLink {
    fn peer(&self) -> Option<Arc<Peer>> {
        locked(&self.peer).clone()
    }

    fn closed(&self) -> TransportError {
        TransportError::LinkClosed { peer: self.inflight.peer().to_owned() }
    }
}

impl Link for ShmLink {
    fn path(&self) -> Path {
        Path::Shm
    }

    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket {
        let peer = self.peer();
        let (ticket, flight) = self.inflight.admit(request, done, |request| {
            let peer = peer.as_ref().ok_or_else(|| self.closed())?;
            let (ours, theirs) = peer.lens();
            let totals = match request.direction {
                Direction::Pull => request.runs.validate(theirs, ours)?,
                Direction::Push => request.runs.validate(ours, theirs)?,
            };
            Ok((totals, self.pool.pieces(&request.runs, totals)))
        });
        if let (Some(flight), Some(peer)) = (flight, peer) {
            flight.posted(flight.totals.posts);
            self.pool.carry(flight, peer);
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
        self.peer().is_some_and(|peer| peer.gone())
    }

    fn close(&self) {
        for flight in self.inflight.close(self.closed()) {
            flight.fail(TransportError::Cancelled);
        }
        self.inflight.wait_empty(CLOSE_WAIT_MAX);
        self.pool.forget_ended();
        drop(locked(&self.peer).take());
    }
}

impl Drop for ShmLink {
    fn drop(&mut self) {
        self.close();
    }
}
