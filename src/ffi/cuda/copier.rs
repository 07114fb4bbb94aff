//! Scattered copies by one kernel launch: a list of pieces, a few blocks of threads that work it off.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use super::device::Device;
use super::driver::{CudaError, Driver};
use super::idle::{Idle, Lent};
use super::list_kernel::ListKernel;

/// The kernel in the driver's portable language, ended by a zero as the driver wants it.
const KERNEL: &str = concat!(include_str!("copy_runs.ptx"), "\0");
const THREADS: c_uint = 1024;
/// Warps of one block.
const WARPS: c_uint = THREADS / 32;
/// Bytes that one warp takes at a time, as the kernel has it.
const CHUNK_BYTES: u64 = 4096;
/// Most pieces of one launch.
const PIECES_MAX: usize = 32 * 1024;

static IDLE: Idle<ListKernel<CopyPiece>> = Idle::new();

/// One stretch to copy, or several of one length; addresses as the GPU sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct CopyPiece {
    pub src: u64,
    pub dst: u64,
    /// Of one row.
    pub len: u32,
    pub rows: u32,
    /// From one row to the next; of no meaning for one.
    pub src_step: u32,
    pub dst_step: u32,
}

// What the bus carries at once, and what the kernel takes it for.
const _: () = assert!(size_of::<CopyPiece>() == 32);

/// Our copy kernel on a stream of its own. One launch at a time: the caller is its only user.
pub struct Copier {
    kernel: Lent<ListKernel<CopyPiece>>,
    blocks: c_uint,
    running: bool,
}

impl Copier {
    /// Copies with at most `blocks_max` multiprocessors at once.
    pub fn new(device: &Arc<Device>, blocks_max: u32) -> Result<Self, CudaError> {
        let blocks = device.multiprocessors()?.min(blocks_max).max(1);
        let is_here = |kernel: &ListKernel<CopyPiece>| kernel.device().ordinal() == device.ordinal();
        let make = || ListKernel::new(device, KERNEL, c"pdlink_copy_runs", PIECES_MAX);
        let kernel = IDLE.take(is_here, make)?;
        Ok(Self { kernel, blocks, running: false })
    }

    /// The list of the next launch, to be filled from its start, while the one before runs.
    pub fn list(&mut self) -> &mut [CopyPiece] {
        self.kernel.list()
    }

    /// Starts to copy the first `count` pieces of the list, none with more bytes than `longest`, after waiting for those before. They are
    /// there once [`Copier::wait`] has returned. A list that is read `in_place` need not be copied first, but each look of the
    /// kernel at a piece goes over the bus.
    ///
    /// # Safety
    /// Each row of each piece must be `len` bytes that this GPU can read and write until the wait has returned, or the
    /// copier is dropped; no destination may overlap another, or a source. The rows of a piece have less than 4 GiB together.
    pub unsafe fn start(&mut self, count: usize, longest: u64, in_place: bool) -> Result<(), CudaError> {
        self.wait()?;
        let device = Arc::clone(self.kernel.device());
        // SAFETY: as the caller promises.
        device.current(|driver| unsafe { self.launch(driver, count, longest, in_place) })
    }

    /// # Safety
    /// As [`Copier::start`].
    unsafe fn launch(&mut self, driver: &Driver, count: usize, longest: u64, in_place: bool) -> Result<(), CudaError> {
        let mut chunks = c_uint::try_from(longest.div_ceil(CHUNK_BYTES)).unwrap_or(c_uint::MAX).max(1);
        // Also if something fails from here on: the list may be on its way.
        self.running = true;
        let (mut list, mut count) = self.kernel.stage(driver, count, in_place)?;
        // One number for all chunks of a launch: 32,768 pieces of 256 KiB are 2 M.
        let items = count.checked_mul(chunks).ok_or_else(|| CudaError::Kernel("a piece is too long".to_owned()))?;
        let mut arguments =
            [(&raw mut list).cast::<c_void>(), (&raw mut count).cast::<c_void>(), (&raw mut chunks).cast::<c_void>()];
        let blocks = self.blocks.min(items.div_ceil(WARPS)).max(1);
        // SAFETY: the kernel takes a pointer and two counts, as given, and reads `count` pieces, whose addresses the caller
        // vouches for until they have been waited for.
        unsafe { self.kernel.launch(driver, (blocks, THREADS), &mut arguments) }?;
        self.kernel.signal(driver)
    }

    /// Waits for what was started.
    pub fn wait(&mut self) -> Result<(), CudaError> {
        if !std::mem::take(&mut self.running) {
            return Ok(());
        }
        let device = Arc::clone(self.kernel.device());
        device.current(|driver| self.kernel.wait(driver))
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        // The kernel is somebody else's next: nothing may run on it. A GPU that cannot say has lost its context.
        if self.wait().is_err() {
            self.kernel.discard();
        }
    }
}
