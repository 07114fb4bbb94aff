//! One end of a communicator, with what packs and unpacks there.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::staging::Slot;
use crate::config::Path;
use crate::ffi::cuda::Device;
use crate::ffi::nccl::{Buffer, Communicator, Half, Library, NcclError, Settings, Side, UniqueId};
use crate::memory::{AccessError, GpuCopies, GpuRun};
use crate::transport::TransportError;
use crate::transport::wire::Patience;

/// Multiprocessors that packing and unpacking may use, in short bursts: enough to be several times as fast as the link, because a
/// thread packs between two posts.
const PACK_MULTIPROCESSORS_MAX: u32 = 64;
/// Rounds without news before a thread begins to sleep between them, and the bounds of that sleep.
const BUSY_ROUNDS: u32 = 400;
const SLEEP_MIN: Duration = Duration::from_micros(10);
const SLEEP_MAX: Duration = Duration::from_micros(200);

/// What every lane of a process is made from.
pub(super) struct Maker {
    pub(super) library: &'static Library,
    pub(super) device: Option<Arc<Device>>,
    pub(super) multiprocessors_max: u32,
}

impl Maker {
    /// Makes this side of the communicator `id`, while the other side makes its own. `patience` is asked while it is not ready.
    pub(super) fn make(
        &self,
        side: Side,
        id: UniqueId,
        peer: &str,
        patience: Patience,
    ) -> Result<Lane, TransportError> {
        let device = self.device.as_ref();
        let settings = Settings { side, id, multiprocessors_max: self.multiprocessors_max, device };
        let failed =
            |reason: String| TransportError::Unreachable { path: Path::Nccl.name(), peer: peer.to_owned(), reason };
        let communicator = Communicator::begin(self.library, &settings).map_err(|error| failed(error.to_string()))?;
        let copies = device.map(|device| GpuCopies::on(device, PACK_MULTIPROCESSORS_MAX)).transpose();
        let copies = copies.map_err(|error| failed(error.to_string()))?;
        let lane = Lane { communicator, copies, peer: peer.to_owned() };
        lane.settle(patience)?;
        Ok(lane)
    }
}

/// What one thread sends and receives by. Dropping it ends whatever still runs, here.
pub(super) struct Lane {
    communicator: Communicator,
    /// Absent for host memory, where the processor copies.
    copies: Option<GpuCopies>,
    peer: String,
}

impl Lane {
    fn failed(&self, error: impl ToString) -> TransportError {
        TransportError::Unreachable { path: Path::Nccl.name(), peer: self.peer.clone(), reason: error.to_string() }
    }

    /// Posts one half of a request: `len` bytes from or into `slot`.
    pub(super) fn post(&self, half: Half, slot: &Slot, len: u64, patience: Patience) -> Result<(), TransportError> {
        let buffer: Arc<dyn Buffer> = slot.memory().clone();
        self.communicator.post(half, &buffer, 0, len).map_err(|error| self.failed(error))?;
        self.settle(patience)?;
        let marked = match (self.communicator.stream(), slot.mark()) {
            (Some(stream), Some(mark)) => stream.mark(mark),
            _ => Ok(()),
        };
        marked.map_err(|error| self.failed(error))
    }

    /// Waits until the last call has ended, which without a first connection takes microseconds.
    fn settle(&self, patience: Patience) -> Result<(), TransportError> {
        let began = Instant::now();
        let mut rounds = Rounds::default();
        while !self.communicator.settled().map_err(|error| self.failed(error))? {
            patience(began.elapsed())?;
            rounds.quiet();
        }
        Ok(())
    }

    /// Whether what was posted for `slot` has been done.
    pub(super) fn passed(&self, slot: &Slot) -> Result<bool, TransportError> {
        // An error shows here first: what failed never passes.
        let settled = self.communicator.settled().map_err(|error: NcclError| self.failed(error))?;
        match slot.mark() {
            Some(mark) => mark.passed().map_err(|error| self.failed(error)),
            None => Ok(settled),
        }
    }

    /// Copies runs between regions and slots of this process, and returns when the bytes are there.
    pub(super) fn copy<'a>(&mut self, runs: impl IntoIterator<Item = GpuRun<'a>>) -> Result<(), TransportError> {
        let copied = match &mut self.copies {
            Some(copies) => copies.copy(runs),
            None => copy_on_host(runs),
        };
        copied.map_err(|error| self.failed(error))
    }
}

fn copy_on_host<'a>(runs: impl IntoIterator<Item = GpuRun<'a>>) -> Result<(), AccessError> {
    let copy = |run: GpuRun<'a>| run.src.copy_to(run.src_offset, run.dst, run.dst_offset, run.len);
    runs.into_iter().try_for_each(copy)
}

/// Looks often at first, then seldom.
#[derive(Default)]
pub(super) struct Rounds(u32);

impl Rounds {
    pub(super) fn news(&mut self) {
        self.0 = 0;
    }

    /// A round without news.
    pub(super) fn quiet(&mut self) {
        self.0 += 1;
        match self.0.checked_sub(BUSY_ROUNDS) {
            None => std::thread::yield_now(),
            Some(over) => std::thread::sleep((SLEEP_MIN * (over + 1)).min(SLEEP_MAX)),
        }
    }
}
