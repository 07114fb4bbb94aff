//! GPUs of one host with peer access, or one GPU: a peer's allocations are mapped, and one kernel launch moves the run list
//! straight from block to block. The process that submits makes the whole copy, and the peer does nothing.
#![forbid(unsafe_code)]

mod peer;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::peer::Peer;
use super::flight::{Flight, locked};
use super::flight_queue::FlightQueue;
use super::identity::Identity;
use super::mapped::{self, Mapped, PeerMemory, Reach};
use super::threads::Threads;
use super::{Export, Piece, RunList, Sums, TransportError};
use crate::config::Path;
use crate::ffi::cuda::{CudaError, Device, IpcHandle};
use crate::memory::{GpuCopies, GpuRuns, Launches, Region};

/// Most multiprocessors that a copy takes from the engine. Between two H200 over NVLink 8 pull 359 GB/s, 16 pull 371, all 132
/// of them 372, of the 394 of a plain copy.
const MULTIPROCESSORS_MAX: u32 = 24;
/// Within one GPU the memory itself is the link: half of its reads and writes each, and only all of them fill it.
const MULTIPROCESSORS_WITHIN_MAX: u32 = 256;
/// Bounds of what is copied in one go: a cancel, and what TR-3 waits for, take no longer than this.
const COPY_BYTES_MAX: u64 = 1 << 30;
/// What the thread that submits copies itself, if nobody copies: it is done before another thread would have woken up.
const SMALL_BYTES_MAX: u64 = 64 << 10;
const SMALL_RUNS_MAX: u64 = 16;
/// How long the copying thread stays awake for more.
const AWAKE: Duration = Duration::from_micros(100);

/// Most runs of a piece.
const RUNS_MAX: usize = 1 << 20;
/// Lists of so many bytes are made faster than the link moves them.
const LAUNCHES: Launches = Launches { first_bytes: 4 << 20, most_bytes: 32 << 20, in_place_from: u64::MAX };
/// Within a GPU 4 MiB are copied before the next launch is made. 64 MiB in runs of 4 KiB take 47 us there with their list in place, 61 with a
/// list on the GPU, 43 in one run.
const LAUNCHES_WITHIN: Launches = Launches { first_bytes: 16 << 20, most_bytes: 64 << 20, in_place_from: 4 << 10 };

/// What a peer needs to reach our memory.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    owner: Identity,
    /// The GPU's own number, the same in every process.
    gpu: [u8; 16],
    allocations: Vec<SharedAllocation>,
    regions: Vec<RegionDescription>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SharedAllocation {
    handle: IpcHandle,
    len: u64,
}

/// Where a region is to be found.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct RegionDescription {
    allocation: u32,
    offset: u64,
    len: u64,
}

/// The `cuda-ipc` path of this process.
pub type CudaIpc = Mapped<GpuReach>;

/// One thread that launches copies.
pub struct GpuReach {
    device: Arc<Device>,
    copies: Arc<Mutex<Copies>>,
    queue: Arc<FlightQueue<Arc<Peer>>>,
    threads: Threads,
}

fn unusable(reason: String) -> TransportError {
    mapped::unusable(Path::CudaIpc, reason)
}

impl CudaIpc {
    /// Offers `regions`, all of one GPU.
    pub fn new(regions: &[Arc<Region>]) -> Result<Self, TransportError> {
        let device = regions.first().and_then(|region| region.device()).cloned();
        let device = device.ok_or_else(|| unusable("there is no GPU memory to offer".to_owned()))?;
        if regions.iter().any(|region| region.device().is_none_or(|other| other.ordinal() != device.ordinal())) {
            return Err(unusable("its regions lie on several GPUs; start one worker for each".to_owned()));
        }
        let description = describe(&device, regions)?;
        let copies = Copies::on(&device).map_err(|error| unusable(error.to_string()))?;
        let (copies, queue, threads) = (Arc::new(Mutex::new(copies)), Arc::new(FlightQueue::new()), Threads::default());
        let (work, thread_copies) = (queue.clone(), copies.clone());
        threads
            .spawn("pdlink-cuda".to_owned(), move || carry_all(&work, &thread_copies))
            .map_err(|error| unusable(format!("no thread: {error}")))?;
        Ok(Self::offering(regions, Export::encode(&description), GpuReach { device, copies, queue, threads }))
    }
}

/// The allocations that the regions lie in, each once, and where.
fn describe(device: &Arc<Device>, regions: &[Arc<Region>]) -> Result<Description, TransportError> {
    let failed = |error: CudaError| unusable(error.to_string());
    let owner = Identity::of_self().map_err(|error| unusable(error.to_string()))?;
    let mut bases = Vec::new();
    let mut allocations = Vec::new();
    let mut places = Vec::new();
    for region in regions {
        let found = device.allocation_of(region.address()).map_err(failed)?;
        let offset = region.address() - found.base;
        if offset.checked_add(region.len()).is_none_or(|end| end > found.len) {
            return Err(unusable("a region reaches over several allocations; turn expandable_segments off".to_owned()));
        }
        let known = bases.iter().position(|base| *base == found.base);
        let allocation = match known {
            Some(known) => known,
            None => {
                let handle = device.share(found.base).map_err(|error| {
                    unusable(format!("{error}; memory of expandable segments or of cuMemCreate cannot be shared"))
                })?;
                bases.push(found.base);
                allocations.push(SharedAllocation { handle, len: found.len });
                allocations.len() - 1
            }
        };
        let allocation = u32::try_from(allocation).unwrap_or(u32::MAX);
        places.push(RegionDescription { allocation, offset, len: region.len() });
    }
    Ok(Description { owner, gpu: device.uuid().map_err(failed)?, allocations, regions: places })
}

/// What copies, by how far the peer's memory is.
struct Copies {
    between: GpuCopies,
    within: GpuCopies,
}

impl Copies {
    fn on(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self {
            between: GpuCopies::on(device, MULTIPROCESSORS_MAX, LAUNCHES)?,
            within: GpuCopies::on(device, MULTIPROCESSORS_WITHIN_MAX, LAUNCHES_WITHIN)?,
        })
    }

    fn for_peer(&mut self, peer: &Peer) -> &mut GpuCopies {
        if peer.on_our_gpu() { &mut self.within } else { &mut self.between }
    }
}

/// Carries pieces until the queue is closed. One thread: one launch fills the link already.
fn carry_all(queue: &FlightQueue<Arc<Peer>>, copies: &Mutex<Copies>) {
    while let Some((flight, peer, piece)) = queue.take_awake(AWAKE) {
        carry_from(&flight, peer, piece, &mut locked(copies));
    }
}

/// Carries `first`, and more pieces of the flight with it.
fn carry_from(flight: &Flight, peer: Arc<Peer>, first: Piece, copies: &mut Copies) {
    let mut pieces = vec![first];
    let carried = if flight.fail_if_late(Instant::now()) {
        Ok(())
    } else {
        gather(flight, &mut pieces);
        carry(flight, &peer, &pieces, copies)
    };
    // First: once the pieces are accounted for, the link may be closed, and nothing of it held here.
    drop(peer);
    pieces.iter().for_each(|_| flight.account(carried.clone()));
}

/// Claims more pieces of a flight. Its segments go together: a launch for each would take longer than most of them.
fn gather(flight: &Flight, pieces: &mut Vec<Piece>) {
    let mut bytes: u64 = pieces.iter().map(|piece| piece.bytes).sum();
    while bytes < COPY_BYTES_MAX
        && let Some(piece) = flight.claim()
    {
        bytes += piece.bytes;
        pieces.push(piece);
    }
}

fn carry(flight: &Flight, peer: &Peer, pieces: &[Piece], copies: &mut Copies) -> Result<(), TransportError> {
    if peer.gone() {
        return Err(TransportError::PeerGone { peer: peer.name().to_owned() });
    }
    let slices = pieces.iter().map(|piece| {
        let segment = &flight.runs.segments[piece.segment];
        let (src, dst) = peer.ends(flight.direction, segment.src_region, segment.dst_region);
        GpuRuns {
            src: src.region,
            src_offset: src.offset,
            dst: dst.region,
            dst_offset: dst.offset,
            runs: flight.runs.slice(*piece),
            rows: flight.runs.rows(*piece),
        }
    });
    copies.for_peer(peer).copy_slices(slices).map_err(|error| TransportError::Unreachable {
        path: "cuda-ipc",
        peer: peer.name().to_owned(),
        reason: error.to_string(),
    })
}

impl Reach for GpuReach {
    const PATH: Path = Path::CudaIpc;
    type Peer = Peer;

    fn open(&self, peer: &Export, ours: &Arc<[Arc<Region>]>) -> Result<Peer, TransportError> {
        let description: Description = peer.decode(Path::CudaIpc)?;
        Peer::open(&self.device, &description, ours.clone())
    }

    fn rouse(&self) {
        self.queue.rouse();
    }

    fn pieces(&self, runs: &RunList, sums: &Sums) -> Vec<Piece> {
        runs.pieces(sums, COPY_BYTES_MAX, RUNS_MAX)
    }

    fn carry(&self, flight: Arc<Flight>, peer: Arc<Peer>) {
        let small = flight.totals.bytes <= SMALL_BYTES_MAX && flight.totals.runs <= SMALL_RUNS_MAX;
        if small
            && let Ok(mut copies) = self.copies.try_lock()
            && let Some(piece) = flight.claim()
        {
            carry_from(&flight, peer, piece, &mut copies);
            return;
        }
        if let Err(flight) = self.queue.push(flight, peer) {
            flight.fail(TransportError::Cancelled);
        }
    }

    fn forget_ended(&self) {
        self.queue.forget_ended();
    }

    fn close(&self) {
        for flight in self.queue.close() {
            flight.fail(TransportError::Cancelled);
        }
        self.threads.join();
    }
}
