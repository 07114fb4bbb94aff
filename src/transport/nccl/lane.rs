//! One end of a communicator, with what packs and unpacks there.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::staging::Slot;
use crate::config::Path;
use crate::ffi::cuda::Device;
use crate::ffi::nccl::{Buffer, Communicator, Half, Library, NcclError, Settings, Side, UniqueId};
use crate::memory::{AccessError, GpuCopies, GpuRun, Launches, Region};
use crate::transport::TransportError;
use crate::transport::wire::Patience;

/// Multiprocessors that packing and unpacking may use, in short bursts: enough to be several times as fast as the link, because a
/// thread packs between two posts.
const PACK_MULTIPROCESSORS_MAX: u32 = 64;
/// Rounds without news before a thread begins to sleep between them, and the bounds of that sleep.
const BUSY_ROUNDS: u32 = 400;
const SLEEP_MIN: Duration = Duration::from_micros(10);
const SLEEP_MAX: Duration = Duration::from_micros(200);

/// What the first bytes of a communicator go from and into.
const SCRATCH_BYTES: usize = 4096;
/// How often whoever waits for a communicator looks whether it still should.
const LOOK_INTERVAL: Duration = Duration::from_millis(5);

/// What every lane of a process is made from.
pub(super) struct Maker {
    pub(super) library: &'static Library,
    pub(super) device: Option<Arc<Device>>,
    pub(super) multiprocessors_max: u32,
}

impl Maker {
    /// Makes this side of the communicator `id`, while the other side makes its own. `patience` is asked while it is not ready.
    ///
    /// That happens in a thread of its own, because the last step waits inside the library for the other side: where that one
    /// hangs, the thread stays until it ends, and nobody waits for the thread.
    pub(super) fn make(
        &self,
        side: Side,
        id: UniqueId,
        peer: &str,
        patience: Patience,
    ) -> Result<Lane, TransportError> {
        let failed = |reason: String| unreachable(peer, reason);
        let scratch = match &self.device {
            Some(device) => Region::allocated_on(device, SCRATCH_BYTES).map_err(|error| failed(error.to_string()))?,
            None => Region::shared(SCRATCH_BYTES).map_err(|error| failed(error.to_string()))?,
        };
        let copies = self
            .device
            .as_ref()
            .map(|device| GpuCopies::on(device, PACK_MULTIPROCESSORS_MAX, Launches::ONE))
            .transpose();
        let copies = copies.map_err(|error| failed(error.to_string()))?;
        let (library, given_up) = (self.library, Arc::new(AtomicBool::new(false)));
        let (device, multiprocessors_max) = (self.device.clone(), self.multiprocessors_max);
        let settings = Settings { side, id, multiprocessors_max, device, scratch };
        let ((tell, told), ask) = (mpsc::sync_channel(1), given_up.clone());
        let make = move || match Communicator::make(library, &settings, &|| ask.load(Ordering::SeqCst)) {
            Ok((communicator, origin)) => {
                // Nobody may wait any more: then it ends here.
                let _ = tell.send(Ok(communicator));
                drop(origin);
            }
            Err(error) => drop(tell.send(Err(error))),
        };
        let thread = std::thread::Builder::new().name("pdlink-nccl-make".to_owned()).spawn(make);
        thread.map_err(|error| failed(format!("no thread: {error}")))?;
        let began = Instant::now();
        let made = loop {
            match told.recv_timeout(LOOK_INTERVAL) {
                Ok(made) => break made.map_err(|error| failed(error.to_string()))?,
                Err(RecvTimeoutError::Timeout) => {
                    patience(began.elapsed()).inspect_err(|_| given_up.store(true, Ordering::SeqCst))?;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(failed("making a communicator broke off".to_owned()));
                }
            }
        };
        Ok(Lane { communicator: made, copies, peer: peer.to_owned() })
    }
}

fn unreachable(peer: &str, reason: String) -> TransportError {
    TransportError::Unreachable { path: Path::Nccl.name(), peer: peer.to_owned(), reason }
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
        unreachable(&self.peer, error.to_string())
    }

    /// Posts one half of a request: `len` bytes from or into `slot`.
    pub(super) fn post(&self, half: Half, slot: &Slot, len: u64) -> Result<(), TransportError> {
        let buffer: Arc<dyn Buffer> = slot.memory().clone();
        self.communicator.post(half, &buffer, 0, len).map_err(|error| self.failed(error))?;
        let marked = match (self.communicator.stream(), slot.mark()) {
            (Some(stream), Some(mark)) => stream.mark(mark),
            _ => Ok(()),
        };
        marked.map_err(|error| self.failed(error))
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
