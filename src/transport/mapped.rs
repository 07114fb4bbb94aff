//! What `shm` and `cuda-ipc` share: the process that submits has the peer's memory open, makes the whole copy itself, and the
//! peer's threads do nothing. How memory is opened and who copies is each path's own ([`Reach`]).
//!
//! A pusher writes the peer's memory itself, so a grant here is a promise, not a fence ([`super::Fence::AskPeer`]): kv asks the
//! peer whether its transfer is over, or waits until [`Link::peer_gone`] (KV-7).
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::flight::{Flight, Inflight, locked};
use super::links::Links;
use super::{
    CLOSE_WAIT_MAX, Completion, Direction, Export, Grant, GrantToken, Link, Piece, RunList, Sums, TransferRequest,
    TransferTicket, Transport, TransportError,
};
use crate::config::Path;
use crate::memory::Region;

/// Lists from this length on take longer to be read through than a thread takes to be woken.
const ROUSING_RUNS_MIN: usize = 1024;

/// One peer process with its memory open. Dropping it unmaps everything.
pub trait PeerMemory: Send + Sync + 'static {
    /// The peer's name in messages.
    fn name(&self) -> &str;

    /// Whether the process has ended. Cannot be wrong about a reused process id.
    fn gone(&self) -> bool;

    /// Lengths of our regions and of the peer's.
    fn lens(&self) -> (&[u64], &[u64]);
}

/// How a path opens a peer's memory, and who copies.
pub trait Reach: Send + Sync + 'static {
    const PATH: Path;
    type Peer: PeerMemory;

    /// Opens what a peer exported, for copies from and to `ours`.
    fn open(&self, peer: &Export, ours: &Arc<[Arc<Region>]>) -> Result<Self::Peer, TransportError>;

    /// Told before a long list is read through, so that who carries it may wake up meanwhile.
    fn rouse(&self) {}

    /// Cuts a run list into what is copied in one go.
    fn pieces(&self, runs: &RunList, sums: &Sums) -> Vec<Piece>;

    /// Carries a flight to its end.
    fn carry(&self, flight: Arc<Flight>, peer: Arc<Self::Peer>);

    /// Lets go of flights that have ended while they waited, and of the peers that came with them.
    fn forget_ended(&self);

    /// Fails what waits, ends the threads and waits for them.
    fn close(&self);
}

/// Such a path, as this process offers it.
pub struct Mapped<R: Reach> {
    regions: Arc<[Arc<Region>]>,
    export: Export,
    reach: Arc<R>,
    links: Links<MappedLink<R>>,
}

impl<R: Reach> Mapped<R> {
    pub(super) fn offering(regions: &[Arc<Region>], export: Export, reach: R) -> Self {
        Self { regions: regions.into(), export, reach: Arc::new(reach), links: Links::default() }
    }
}

/// Why this process cannot offer a path.
pub(super) fn unusable(path: Path, reason: String) -> TransportError {
    TransportError::Unreachable { path: path.name(), peer: "this process".to_owned(), reason }
}

impl<R: Reach> Transport for Mapped<R> {
    fn path(&self) -> Path {
        R::PATH
    }

    fn export(&self) -> Export {
        self.export.clone()
    }

    fn connect(&self, peer: &Export, _deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        let peer = self.reach.open(peer, &self.regions)?;
        let inflight = Inflight::new(peer.name().to_owned());
        let link = Arc::new(MappedLink { peer: Mutex::new(Some(Arc::new(peer))), reach: self.reach.clone(), inflight });
        self.links.keep(&link);
        Ok(link)
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        let lens: Vec<u64> = self.regions.iter().map(|region| region.len()).collect();
        runs.validate_destinations(&lens)?;
        Ok(Grant::unenforced(GrantToken::random()))
    }

    fn close(&self) {
        self.links.close();
        self.reach.close();
    }
}

impl<R: Reach> Drop for Mapped<R> {
    fn drop(&mut self) {
        self.close();
    }
}

struct MappedLink<R: Reach> {
    /// Taken when the link closes: the peer's memory is unmapped once the last transfer has let go of it.
    peer: Mutex<Option<Arc<R::Peer>>>,
    reach: Arc<R>,
    inflight: Arc<Inflight>,
}

impl<R: Reach> MappedLink<R> {
    fn peer(&self) -> Option<Arc<R::Peer>> {
        locked(&self.peer).clone()
    }

    fn closed(&self) -> TransportError {
        TransportError::LinkClosed { peer: self.inflight.peer().to_owned() }
    }
}

impl<R: Reach> Link for MappedLink<R> {
    fn path(&self) -> Path {
        R::PATH
    }

    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket {
        if request.runs.runs() >= ROUSING_RUNS_MIN {
            self.reach.rouse();
        }
        let peer = self.peer();
        let (ticket, flight) = self.inflight.admit(request, done, |request| {
            let peer = peer.as_ref().ok_or_else(|| self.closed())?;
            let (ours, theirs) = peer.lens();
            let sums = match request.direction {
                Direction::Pull => request.runs.validate(theirs, ours)?,
                Direction::Push => request.runs.validate(ours, theirs)?,
            };
            Ok((sums.totals, self.reach.pieces(&request.runs, &sums)))
        });
        if let (Some(flight), Some(peer)) = (flight, peer) {
            flight.posted(flight.totals.posts);
            self.reach.carry(flight, peer);
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
        self.reach.forget_ended();
        drop(locked(&self.peer).take());
    }
}

impl<R: Reach> Drop for MappedLink<R> {
    fn drop(&mut self) {
        self.close();
    }
}
