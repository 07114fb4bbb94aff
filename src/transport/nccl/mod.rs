//! NCCL: GPUs wherever it reaches. A link is a communicator of two ranks, made when a peer is first connected to, and a
//! connection on which both ends agree what goes over it next. Scattered runs are packed into staging, sent in large pieces and
//! unpacked into their places; the three overlap. No fixed world: peers come and go, each with a communicator of its own.
//!
//! Nothing waits for ever: a transfer that has ended and does not go away, a peer that hangs up, and an error that NCCL finds
//! by itself all end the communicator (`ncclCommAbort`), and the link with it. The next transfer connects anew.
//!
//! Several communicators may run on one GPU at the same time. That is sound as long as all their kernels fit on it together,
//! which is why each is kept to a few multiprocessors.
#![forbid(unsafe_code)]

mod caster;
mod client;
mod frame;
mod lane;
mod server;
mod staging;

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

pub use self::caster::{Caster, Ended, Seat, casts_here, group_name};
use self::client::{Client, PIECE_BYTES_MAX, PIECE_RUNS_MAX};
use self::frame::{Hello, Welcome};
use self::lane::Maker;
use self::server::Server;
use self::staging::Staging;
use super::flight::Inflight;
use super::flight_queue::FlightQueue;
use super::grant_table::GrantTable;
use super::links::Links;
use super::mapped::unusable;
use super::threads::Threads;
use super::wire::{Acceptor, ExportId, Socket, greet};
use super::{
    CLOSE_WAIT_MAX, Completion, Direction, Export, Grant, Link, RunList, TransferRequest, TransferTicket, Transport,
    TransportError,
};
use crate::config::{NcclConfig, Path};
use crate::ffi::Search;
use crate::ffi::nccl::{Library, Side};
use crate::memory::{MemoryKind, Region};
use crate::security::Secret;

/// How long closing a link waits for a peer to answer for pushes, before it closes the connection under them.
const FAREWELL_MAX: Duration = Duration::from_millis(250);
/// Largest staging buffer. NVLink moves sends of 64 MiB at 340 GB/s, of 32 MiB at 322, of 16 MiB at 289; of 40 MiB the default staging
/// has three for each half, so that one is being unpacked while two are on their way.
const BUFFER_BYTES_MAX: u64 = 40 << 20;

/// What [`NcclSetup::stall_max`] is unless somebody knows better.
const STALL_MAX: Duration = Duration::from_secs(20);

/// How a process takes part in the path.
#[derive(Debug, Clone)]
pub struct NcclSetup {
    /// NCCL's library itself, if it is known.
    pub library: Option<PathBuf>,
    /// Python environments that may have its wheel, most wanted first.
    pub environments: Vec<PathBuf>,
    /// Bounds of what is taken of a GPU.
    pub staging_bytes: u64,
    pub multiprocessors_max: u32,
    /// Where the connections' port listens, and the host name or address under which peers reach it.
    pub bind: IpAddr,
    pub advertise_host: String,
    /// Silence in the middle of a request after which a peer's connection is closed.
    pub stall_max: Duration,
    /// How long making a communicator may take.
    pub connect_max: Duration,
}

impl NcclSetup {
    /// As configured. Where nothing is said, the Python environment that is active is looked into.
    pub fn of(config: &NcclConfig, bind: IpAddr, advertise_host: &str) -> Self {
        let active = || std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
        Self {
            library: config.library.clone(),
            environments: config.environment.clone().or_else(active).into_iter().collect(),
            staging_bytes: config.staging_mib << 20,
            multiprocessors_max: config.multiprocessors,
            bind,
            advertise_host: advertise_host.to_owned(),
            stall_max: STALL_MAX,
            connect_max: Duration::from_millis(config.connect_timeout_ms),
        }
    }
}

/// What a peer needs to reach our memory.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    export: ExportId,
    host: String,
    port: u16,
    /// The GPU's own number, the same in every process; host memory has none.
    gpu: Option<[u8; 16]>,
    region_lens: Vec<u64>,
}

/// The `nccl` path of this process.
pub struct Nccl {
    regions: Arc<[Arc<Region>]>,
    lens: Arc<[u64]>,
    secret: Secret,
    gpu: Option<[u8; 16]>,
    maker: Arc<Maker>,
    staging: Arc<Staging>,
    export: Export,
    grants: Arc<GrantTable>,
    acceptor: Acceptor,
    links: Links<NcclLink>,
    connect_max: Duration,
}

impl Nccl {
    /// Offers `regions`, all of one GPU, to peers that know `secret`. Host memory is taken too, for a stand-in of the library
    /// that moves it; NCCL itself does not.
    pub fn new(regions: &[Arc<Region>], secret: &Secret, setup: &NcclSetup) -> Result<Self, TransportError> {
        let failed = |reason: String| unusable(Path::Nccl, reason);
        let kind = regions.first().map_or(MemoryKind::Host, |region| region.kind());
        if regions.iter().any(|region| region.kind() != kind) {
            return Err(failed("its regions lie on several devices; start one worker for each".to_owned()));
        }
        let device = regions.first().and_then(|region| region.device()).cloned();
        let search = Search { library: setup.library.as_deref(), environments: &setup.environments };
        let library = Library::open(&search).map_err(|error| failed(error.to_string()))?;
        tracing::info!(library = %library.path().display(), version = library.version_text(), "NCCL is in use");
        let gpu = device.as_ref().map(|device| device.uuid()).transpose().map_err(|error| failed(error.to_string()))?;
        let buffer_bytes = BUFFER_BYTES_MAX.min(setup.staging_bytes / 4).max(PIECE_BYTES_MAX);
        let staging = Arc::new(Staging::new(device.as_ref(), setup.staging_bytes, buffer_bytes));
        let maker = Arc::new(Maker { library, device, multiprocessors_max: setup.multiprocessors_max });
        let regions: Arc<[Arc<Region>]> = regions.into();
        let lens: Arc<[u64]> = regions.iter().map(|region| region.len()).collect();
        let grants = Arc::new(GrantTable::default());
        let server = Server {
            maker: maker.clone(),
            staging: staging.clone(),
            regions: regions.clone(),
            grants: grants.clone(),
            stall_max: setup.stall_max,
            connect_max: setup.connect_max,
        };
        let acceptor = Acceptor::start(Path::Nccl.name(), setup.bind, secret, Arc::new(server))?;
        let (export, host) = (acceptor.export(), setup.advertise_host.clone());
        let description = Description { export, host, port: acceptor.port(), gpu, region_lens: lens.to_vec() };
        Ok(Self {
            regions,
            lens,
            secret: secret.clone(),
            gpu,
            maker,
            staging,
            export: Export::encode(&description),
            grants,
            acceptor,
            links: Links::default(),
            connect_max: setup.connect_max,
        })
    }
}

impl Transport for Nccl {
    fn path(&self) -> Path {
        Path::Nccl
    }

    fn export(&self) -> Export {
        self.export.clone()
    }

    fn connect(&self, peer: &Export, deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        let description: Description = peer.decode(Path::Nccl)?;
        let link = NcclLink::connect(self, description, deadline)?;
        self.links.keep(&link);
        Ok(link)
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        runs.validate_destinations(&self.lens)?;
        Ok(self.grants.grant(runs))
    }

    fn close(&self) {
        self.links.close();
        self.acceptor.close();
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.close();
    }
}

struct NcclLink {
    our_lens: Arc<[u64]>,
    their_lens: Vec<u64>,
    inflight: Arc<Inflight>,
    queue: Arc<FlightQueue<()>>,
    socket: Arc<Socket>,
    broken: Arc<AtomicBool>,
    threads: Threads,
}

impl NcclLink {
    fn connect(transport: &Nccl, peer: Description, deadline: Instant) -> Result<Arc<Self>, TransportError> {
        let name = format!("{}:{}", peer.host, peer.port);
        if peer.gpu.is_some() && peer.gpu == transport.gpu {
            let reason = "it is on the same GPU, where NCCL refuses two ranks; cuda-ipc moves KV there".to_owned();
            return Err(TransportError::Unreachable { path: Path::Nccl.name(), peer: name, reason });
        }
        let addresses: Vec<SocketAddr> = (peer.host.as_str(), peer.port)
            .to_socket_addrs()
            .map_err(|error| TransportError::io("look up the address", &name, error))?
            .collect();
        let socket = Arc::new(Socket::connect(&addresses, &name, deadline)?);
        greet(&socket, peer.export, &transport.secret, deadline)?;
        // The first communicator of a process takes longer than connections do.
        let deadline = deadline.max(Instant::now() + transport.connect_max);
        let patience = |_: Duration| match Instant::now() < deadline && !socket.hung_up() {
            true => Ok(()),
            false if socket.hung_up() => Err(TransportError::LinkClosed { peer: name.clone() }),
            false => Err(TransportError::io(
                "make a communicator",
                &name,
                std::io::Error::from(std::io::ErrorKind::TimedOut),
            )),
        };
        let failed = |error: crate::ffi::nccl::NcclError| TransportError::Unreachable {
            path: Path::Nccl.name(),
            peer: name.clone(),
            reason: error.to_string(),
        };
        let id = transport.maker.library.unique_id().map_err(failed)?;
        let buffer_bytes = transport.staging.buffer_bytes();
        frame::send(&socket, &Hello { communicator: id.0.to_vec(), buffer_bytes }, &patience)?;
        let lane = transport.maker.make(Side::First, id, &name, &patience)?;
        let welcome: Welcome = frame::receive(&socket, &patience, &patience)?;
        let link = Arc::new(Self {
            our_lens: transport.lens.clone(),
            their_lens: peer.region_lens,
            inflight: Inflight::new(name.clone()),
            queue: Arc::new(FlightQueue::new()),
            socket: socket.clone(),
            broken: Arc::new(AtomicBool::new(false)),
            threads: Threads::default(),
        });
        let client = Client {
            socket: socket.clone(),
            regions: transport.regions.clone(),
            staging: transport.staging.clone(),
            queue: link.queue.clone(),
            inflight: link.inflight.clone(),
            request_bytes_max: buffer_bytes.min(welcome.buffer_bytes).max(PIECE_BYTES_MAX),
            broken: link.broken.clone(),
        };
        link.threads
            .spawn("pdlink-nccl".to_owned(), move || client.run(lane))
            .map_err(|error| TransportError::io("start a thread", &name, error))?;
        Ok(link)
    }

    fn closed(&self) -> TransportError {
        TransportError::LinkClosed { peer: self.inflight.peer().to_owned() }
    }
}

impl Link for NcclLink {
    fn path(&self) -> Path {
        Path::Nccl
    }

    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket {
        let (ticket, flight) = self.inflight.admit(request, done, |request| {
            let sums = match request.direction {
                Direction::Pull => request.runs.validate(&self.their_lens, &self.our_lens)?,
                Direction::Push => request.runs.validate(&self.our_lens, &self.their_lens)?,
            };
            Ok((sums.totals, request.runs.pieces(&sums, PIECE_BYTES_MAX, PIECE_RUNS_MAX)))
        });
        if let Some(Err(refused)) = flight.map(|flight| self.queue.push(flight, ())) {
            refused.end(self.closed());
        }
        ticket
    }

    fn cancel(&self, ticket: TransferTicket) {
        if let Some(flight) = self.inflight.get(ticket) {
            flight.end(TransportError::Cancelled);
        }
    }

    fn usable(&self) -> bool {
        // What has ended is seen on an idle link before the next transfer finds out.
        let ended = self.inflight.is_empty() && self.socket.hung_up();
        !self.inflight.is_closed() && !self.broken.load(Ordering::SeqCst) && !ended
    }

    fn peer_gone(&self) -> bool {
        false
    }

    fn close(&self) {
        for flight in self.inflight.close(self.closed()) {
            flight.end(TransportError::Cancelled);
        }
        // Pushes wait for the peer's word, which is what fences them; but not for long.
        self.inflight.wait_empty(FAREWELL_MAX);
        for flight in self.queue.close() {
            flight.end(TransportError::Cancelled);
        }
        self.socket.shutdown();
        self.inflight.wait_empty(CLOSE_WAIT_MAX);
        self.threads.join();
    }
}

impl Drop for NcclLink {
    fn drop(&mut self) {
        self.close();
    }
}
