//! NIXL: whatever its backends reach, host or GPU memory. The side that submits makes the whole copy by one-sided reads and
//! writes; the peer's threads do nothing, but for NIXL's own, which wakes when the network needs it to.
//!
//! One thread owns NIXL's agents ([`driver`]). All regions are registered once, when the path is opened, and what a peer must
//! know of them is in the export: no metadata server, no listening thread. Connecting reads one byte, so that a peer that
//! cannot be reached is known then, and the first transfer finds the connection made.
//!
//! TR-3: a read that was begun is waited for, whatever became of its transfer; where a peer hangs, the agent that reads is ended,
//! after which nothing lands. A push writes the peer's memory and so is as in [`super::mapped`]: a grant here is a
//! promise, kv asks the peer, and a push that hung or broke off is unfenced.
#![forbid(unsafe_code)]

mod driver;
mod help;
mod helper;
mod memory;
mod pack;
mod packs;
mod peer;
mod spread;
mod staging;

use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::driver::{Command, Driver, Opening};
use self::helper::Helper;
use self::pack::RUNS_PER_PIECE_MAX;
use self::peer::PeerState;
use self::staging::{Packing, Slots, piece_bytes_max};
use super::flight::{Inflight, locked};
use super::grant_table::GrantTable;
use super::identity::Identity;
use super::links::Links;
use super::mapped::unusable;
use super::threads::Threads;
use super::{
    CLOSE_WAIT_MAX, Completion, Direction, Export, Grant, Link, RunList, TransferRequest, TransferTicket, Transport,
    TransportError,
};
use crate::config::{NixlConfig, Path};
use crate::ffi::nixl::MemoryType;
use crate::memory::{Device, Region};

pub use staging::GPU_STAGING_MB;

/// Most runs of one request to NIXL.
const REQUEST_RUNS_MAX: usize = 1024;

/// How a process takes part in the path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NixlSetup {
    /// NIXL's library itself, if it is known.
    pub library: Option<PathBuf>,
    /// Python environments that may have its wheel, most wanted first.
    pub environments: Vec<PathBuf>,
    /// Which of NIXL's backends, and what it is told.
    pub backend: String,
    pub parameters: Vec<(String, String)>,
    /// Threads among which UCX shares a request over host memory.
    pub threads: usize,
    /// What differs from the rule by which short runs are packed.
    pub staging_mb: Option<u64>,
    pub pack_run_kb: Option<u64>,
    pub pack_runs_min: Option<u64>,
}

impl NixlSetup {
    /// As configured. Where nothing is said, the Python environment that is active is looked into.
    pub fn of(config: &NixlConfig, threads: usize) -> Self {
        let active = || std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
        Self {
            library: config.library.clone(),
            environments: config.environment.clone().or_else(active).into_iter().collect(),
            backend: config.backend.clone(),
            parameters: config.parameters.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
            threads,
            staging_mb: config.staging_mb,
            pack_run_kb: config.pack_run_kb,
            pack_runs_min: None,
        }
    }
}

/// What a peer needs to reach our memory.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    owner: Identity,
    /// Drawn anew by every agent: a process that took the address of another is another peer.
    agent: String,
    memory: MemoryType,
    regions: Vec<RegionDescription>,
    /// NIXL's own.
    metadata: Vec<u8>,
    /// Absent where nothing is packed.
    help: Option<HelpDescription>,
}

/// Where a process of the same host is asked to pack.
#[derive(Debug, Serialize, Deserialize)]
struct HelpDescription {
    name: String,
    word: [u8; 16],
    lent: RegionDescription,
    slot_bytes: u64,
}

/// Staging of this process, and how peers ask about what is lent of it.
struct Staging {
    name: String,
    word: [u8; 16],
    own: Arc<Slots>,
    lent: Arc<Slots>,
}

impl Staging {
    /// `None`: too little of it to be of use.
    fn open(bytes: u64, memory: MemoryType, gpu: Option<&Arc<Device>>) -> Result<Option<Self>, String> {
        let half = || Slots::new(bytes / 2, memory, gpu);
        let (Some(own), Some(lent)) = (half()?, half()?) else { return Ok(None) };
        let name = format!("pdlink/nixl/{:032x}", rand::random::<u128>());
        Ok(Some(Self { name, word: rand::random(), own: Arc::new(own), lent: Arc::new(lent) }))
    }
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct RegionDescription {
    address: u64,
    len: u64,
    device: u64,
}

/// The `nixl` path of this process.
pub struct Nixl {
    export: Export,
    lens: Arc<[u64]>,
    memory: MemoryType,
    packing: Packing,
    commands: Sender<Command>,
    threads: Threads,
    /// Absent where nothing is packed, and once the path is closed.
    helper: Mutex<Option<Helper>>,
    grants: Arc<GrantTable>,
    links: Links<NixlLink>,
}

impl Nixl {
    /// Offers `regions`, all of one kind of memory.
    pub fn new(regions: &[Arc<Region>], setup: &NixlSetup) -> Result<Self, TransportError> {
        let failed = |reason: String| unusable(Path::Nixl, reason);
        let gpu = memory::gpu_of(regions).map_err(|reason| failed(reason.to_owned()))?;
        let owner = Identity::of_self().map_err(|error| failed(error.to_string()))?;
        let (commands, orders) = mpsc::channel();
        let (started, starting) = mpsc::sync_channel(1);
        let memory = if gpu.is_some() { MemoryType::Gpu } else { MemoryType::Host };
        let (packing, grants) = (Packing::of(setup, memory), Arc::<GrantTable>::default());
        let opened = Staging::open(packing.staging_bytes, memory, gpu.as_ref()).and_then(|staging| {
            let help = |staging: &Staging| {
                let (name, lent) = (staging.name.as_bytes(), staging.lent.clone());
                Helper::start(name, staging.word, regions, lent, grants.clone(), gpu.clone())
            };
            let helper = staging.as_ref().map(help).transpose().map_err(|error| error.to_string())?;
            Ok((staging, helper))
        });
        let (staging, helper) = opened.unwrap_or_else(|reason| {
            tracing::warn!(reason, "no staging for NIXL: short runs go one by one");
            (None, None)
        });
        let opening = Opening { setup: setup.clone(), regions: regions.to_vec(), memory, owner, staging };
        let (threads, refused) = (Threads::default(), started.clone());
        let run = move || match Driver::start(opening) {
            Ok((mut driver, export)) => {
                let _ = started.send(Ok(export));
                driver.run(&orders);
            }
            Err(error) => drop(started.send(Err(error))),
        };
        // The backends use the GPU that is current where they are called.
        let run = move || match gpu {
            None => run(),
            Some(gpu) => gpu.within(run).unwrap_or_else(|error| {
                let _ = refused.send(Err(unusable(Path::Nixl, error.to_string())));
            }),
        };
        threads.spawn("pdlink-nixl".to_owned(), run).map_err(|error| failed(format!("no thread: {error}")))?;
        let ended = |_| Err(failed("its thread ended".to_owned()));
        let export = starting.recv().unwrap_or_else(ended)?;
        Ok(Self {
            export,
            lens: regions.iter().map(|region| region.len()).collect(),
            memory,
            packing,
            commands,
            threads,
            helper: Mutex::new(helper),
            grants,
            links: Links::default(),
        })
    }
}

impl Transport for Nixl {
    fn path(&self) -> Path {
        Path::Nixl
    }

    fn export(&self) -> Export {
        self.export.clone()
    }

    fn connect(&self, peer: &Export, deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        let description: Description = peer.decode(Path::Nixl)?;
        let their_lens = description.regions.iter().map(|region| region.len).collect();
        let name = format!("agent {}", description.agent);
        if description.memory != self.memory {
            let (theirs, ours) = (memory::name(description.memory), memory::name(self.memory));
            let reason =
                format!("its memory is {theirs} memory, this worker's {ours} memory; one kind on both sides works");
            return Err(TransportError::Unreachable { path: Path::Nixl.name(), peer: name, reason });
        }
        let closed = || TransportError::LinkClosed { peer: "this process".to_owned() };
        let (tell, told) = mpsc::sync_channel(1);
        self.commands
            .send(Command::Connect { description: Box::new(description), deadline, tell })
            .map_err(|_| closed())?;
        let patience = deadline.saturating_duration_since(Instant::now());
        let peer = told.recv_timeout(patience).map_err(|error| match error {
            RecvTimeoutError::Timeout => TransportError::Unreachable {
                path: Path::Nixl.name(),
                peer: name,
                reason: "it did not answer in time".to_owned(),
            },
            RecvTimeoutError::Disconnected => closed(),
        })??;
        let link = Arc::new(NixlLink {
            inflight: Inflight::new(peer.name().to_owned()),
            peer,
            our_lens: self.lens.clone(),
            their_lens,
            request_bytes_max: memory::request_bytes_max(self.memory),
            packing: self.packing,
            commands: Mutex::new(Some(self.commands.clone())),
        });
        self.links.keep(&link);
        Ok(link)
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        runs.validate_destinations(&self.lens)?;
        Ok(self.grants.grant(runs).asking_the_peer())
    }

    fn close(&self) {
        self.links.close();
        let _ = self.commands.send(Command::Close);
        self.threads.join();
        drop(locked(&self.helper).take());
    }
}

impl Drop for Nixl {
    fn drop(&mut self) {
        self.close();
    }
}

struct NixlLink {
    peer: Arc<PeerState>,
    our_lens: Arc<[u64]>,
    their_lens: Vec<u64>,
    request_bytes_max: u64,
    packing: Packing,
    inflight: Arc<Inflight>,
    /// Taken when the link closes: the driver then hears of its end, once.
    commands: Mutex<Option<Sender<Command>>>,
}

impl NixlLink {
    fn closed(&self) -> TransportError {
        TransportError::LinkClosed { peer: self.inflight.peer().to_owned() }
    }
}

impl Link for NixlLink {
    fn path(&self) -> Path {
        Path::Nixl
    }

    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket {
        let mut packed = None;
        let (ticket, flight) = self.inflight.admit(request, done, |request| {
            if self.peer.broken() {
                return Err(self.peer.ended().unwrap_or_else(|| self.closed()));
            }
            let sums = match request.direction {
                Direction::Pull => request.runs.validate(&self.their_lens, &self.our_lens)?,
                Direction::Push => request.runs.validate(&self.our_lens, &self.their_lens)?,
            };
            packed = self.peer.slot_bytes().filter(|_| self.packing.suits(sums.totals));
            let pieces = match packed {
                Some(slot_bytes) => request.runs.pieces(&sums, piece_bytes_max(slot_bytes), RUNS_PER_PIECE_MAX),
                None => request.runs.pieces(&sums, self.request_bytes_max, REQUEST_RUNS_MAX),
            };
            Ok((sums.totals, pieces))
        });
        if let Some(flight) = flight {
            let submit = Command::Submit { flight, peer: self.peer.clone(), packed: packed.is_some() };
            let sent = match &*locked(&self.commands) {
                Some(commands) => commands.send(submit).map_err(|refused| refused.0),
                None => Err(submit),
            };
            if let Err(Command::Submit { flight, .. }) = sent {
                flight.fail(TransportError::Cancelled);
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
        !self.inflight.is_closed() && !self.peer.broken() && !self.peer_gone()
    }

    fn peer_gone(&self) -> bool {
        self.peer.gone()
    }

    fn close(&self) {
        for flight in self.inflight.close(self.closed()) {
            flight.fail(TransportError::Cancelled);
        }
        self.inflight.wait_empty(CLOSE_WAIT_MAX);
        if let Some(commands) = locked(&self.commands).take() {
            let _ = commands.send(Command::Disconnect { peer: self.peer.clone() });
        }
    }
}

impl Drop for NixlLink {
    fn drop(&mut self) {
        self.close();
    }
}

/// How long a request may stand still over a transfer that is already cancelled or late, before the connection is given up.
const GRACE_MAX: Duration = Duration::from_millis(500);
