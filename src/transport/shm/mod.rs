//! Host memory of one host. The regions that a process made itself are memory files: a peer maps them through
//! `/proc/PID/fd/N` and copies with plain loads and stores. Memory that it borrowed is reached by `process_vm_readv` and
//! `process_vm_writev`. Either way the process that submits makes the whole copy, and the peer's threads do nothing.

mod peer;
mod process_vm;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::peer::Peer;
pub(super) use self::process_vm::ProcessVm;
pub use self::process_vm::{allow_peers as allow_peers_to_read, read_byte as read_peer_byte};
use super::copy_pool::CopyPool;
use super::flight::Flight;
use super::identity::Identity;
use super::mapped::{Mapped, Reach, unusable};
use super::{Export, Piece, RunList, Sums, TransportError};
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
pub type Shm = Mapped<HostReach>;

/// Threads that copy between mapped memory, or by system call.
pub struct HostReach {
    pool: CopyPool,
}

impl Shm {
    /// Offers `regions`, and copies with `copy_threads` threads.
    pub fn new(regions: &[Arc<Region>], copy_threads: usize) -> Result<Self, TransportError> {
        let owner = Identity::of_self().map_err(|error| unusable(Path::Shm, error.to_string()))?;
        if regions.iter().any(|region| region.backing() == Backing::Borrowed) {
            process_vm::allow_peers();
        }
        let description = Description { owner, regions: regions.iter().map(|region| describe(region)).collect() };
        let pool = CopyPool::start(copy_threads);
        let pool = pool.map_err(|error| unusable(Path::Shm, format!("no thread: {error}")))?;
        Ok(Self::offering(regions, Export::encode(&description), HostReach { pool }))
    }
}

fn describe(region: &Region) -> RegionDescription {
    let place = match region.backing() {
        Backing::Shared { fd, device, inode, prefault } => Place::File { fd, device, inode, prefault },
        Backing::Borrowed | Backing::Device => Place::Address(region.address()),
    };
    RegionDescription { len: region.len(), place }
}

impl Reach for HostReach {
    const PATH: Path = Path::Shm;
    type Peer = Peer;

    fn open(&self, peer: &Export, ours: &Arc<[Arc<Region>]>) -> Result<Peer, TransportError> {
        let description: Description = peer.decode(Path::Shm)?;
        Peer::open(&description, ours.clone())
    }

    fn pieces(&self, runs: &RunList, sums: &Sums) -> Vec<Piece> {
        self.pool.pieces(runs, sums)
    }

    fn carry(&self, flight: Arc<Flight>, peer: Arc<Peer>) {
        self.pool.carry(flight, peer);
    }

    fn forget_ended(&self) {
        self.pool.forget_ended();
    }

    fn close(&self) {
        self.pool.close();
    }
}
