//! Scattered copies by one kernel launch: a list of pieces in pinned memory, a few blocks of threads that work it off.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use super::device::{Device, DeviceMemory};
use super::driver::{CudaError, DevicePtr, Driver, Event, Function, Module, NOT_READY, Stream};

/// The kernel in the driver's portable language, ended by a zero as the driver wants it.
const KERNEL: &str = concat!(include_str!("copy_runs.ptx"), "\0");
const KERNEL_NAME: &std::ffi::CStr = c"pdlink_copy_runs";
const THREADS: c_uint = 1024;
/// Warps of one block.
const WARPS: c_uint = THREADS / 32;
/// Bytes that one warp takes at a time, as the kernel has it.
const CHUNK_BYTES: u64 = 4096;
/// Lists up to this long are read where they are; longer ones are worth a copy into the GPU's memory first.
const PIECES_IN_PLACE_MAX: usize = 32;
/// Most pieces of one launch.
const PIECES_MAX: usize = 64 * 1024;
const NON_BLOCKING_STREAM: c_uint = 1;
/// Waits sleep instead of spinning, and take no time stamps.
const BLOCKING_EVENT: c_uint = 1 | 2;
/// Reachable from every context, and from the GPU at the same address.
const PORTABLE_MAPPED: c_uint = 1 | 2;
/// How often an event is asked before the thread goes to sleep for it: small copies end within microseconds.
const ASK_MAX: u32 = 20_000;

/// One stretch to copy; addresses as the GPU sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct CopyPiece {
    pub src: u64,
    pub dst: u64,
    pub len: u64,
}

/// A stream with our kernel and room for one list of pieces. One copy at a time: the caller is its only user.
pub struct Copier {
    device: Arc<Device>,
    stream: Stream,
    event: Event,
    module: Module,
    kernel: Function,
    pieces: *mut CopyPiece,
    /// The list's place on the GPU.
    list: DeviceMemory,
    blocks: c_uint,
}

// SAFETY: the handles may be used from any thread that makes the context current, which every method does; `&mut self` keeps
// it to one at a time.
unsafe impl Send for Copier {}

impl Copier {
    /// Copies with at most `blocks_max` multiprocessors at once.
    pub fn new(device: Arc<Device>, blocks_max: u32) -> Result<Self, CudaError> {
        let blocks = device.multiprocessors()?.min(blocks_max).max(1);
        let mut copier = Self {
            stream: std::ptr::null_mut(),
            event: std::ptr::null_mut(),
            module: std::ptr::null_mut(),
            kernel: std::ptr::null_mut(),
            pieces: std::ptr::null_mut(),
            list: device.allocate(PIECES_MAX * size_of::<CopyPiece>())?,
            blocks,
            device: Arc::clone(&device),
        };
        device.current(|driver| copier.prepare(driver))?;
        Ok(copier)
    }

    /// Pieces that one copy can have at most.
    pub const fn pieces_max() -> usize {
        PIECES_MAX
    }

    fn prepare(&mut self, driver: &Driver) -> Result<(), CudaError> {
        // SAFETY: writes one handle, destroyed in `drop`.
        let status = unsafe { (driver.stream_create)(&raw mut self.stream, NON_BLOCKING_STREAM) };
        driver.check("cuStreamCreate", status)?;
        // SAFETY: writes one handle, destroyed in `drop`.
        let status = unsafe { (driver.event_create)(&raw mut self.event, BLOCKING_EVENT) };
        driver.check("cuEventCreate", status)?;
        // SAFETY: the text is terminated; writes one handle, unloaded in `drop`.
        let status = unsafe { (driver.module_load)(&raw mut self.module, KERNEL.as_ptr().cast::<c_void>()) };
        driver.check("cuModuleLoadData", status)?;
        // SAFETY: the name is terminated; writes one handle that lives as long as the module.
        let status = unsafe { (driver.module_function)(&raw mut self.kernel, self.module, KERNEL_NAME.as_ptr()) };
        driver.check("cuModuleGetFunction", status)?;
        let mut memory: *mut c_void = std::ptr::null_mut();
        let bytes = PIECES_MAX * size_of::<CopyPiece>();
        // SAFETY: writes one pointer to that many bytes of page-aligned memory, freed in `drop`.
        let status = unsafe { (driver.host_allocate)(&raw mut memory, bytes, PORTABLE_MAPPED) };
        driver.check("cuMemHostAlloc", status)?;
        self.pieces = memory.cast::<CopyPiece>();
        Ok(())
    }

    /// Copies all pieces and returns when they are there.
    ///
    /// # Safety
    /// Each piece must name `len` bytes that this GPU can read at `src` and write at `dst` until this returns; no
    /// destination may overlap another, or a source.
    pub unsafe fn copy(&mut self, pieces: &[CopyPiece]) -> Result<(), CudaError> {
        for part in pieces.chunks(PIECES_MAX) {
            let device = Arc::clone(&self.device);
            // SAFETY: as the caller promises, of this part.
            device.current(|driver| unsafe { self.launch(driver, part) })?;
        }
        Ok(())
    }

    /// # Safety
    /// As [`Copier::copy`], for at most `PIECES_MAX` pieces.
    unsafe fn launch(&mut self, driver: &Driver, pieces: &[CopyPiece]) -> Result<(), CudaError> {
        let mut count = c_uint::try_from(pieces.len()).map_err(|_| CudaError::Kernel("too many pieces".to_owned()))?;
        // SAFETY: `self.pieces` has room for `PIECES_MAX`, and the launch that read it last has ended.
        unsafe { std::ptr::copy_nonoverlapping(pieces.as_ptr(), self.pieces, pieces.len()) };
        let longest = pieces.iter().map(|piece| piece.len).max().unwrap_or(0);
        let mut chunks = c_uint::try_from(longest.div_ceil(CHUNK_BYTES)).unwrap_or(c_uint::MAX).max(1);
        // One number for all chunks of a launch: 65,536 pieces of 256 KiB are 4 M.
        let items = count.checked_mul(chunks).ok_or_else(|| CudaError::Kernel("a piece is too long".to_owned()))?;
        let mut list = self.pieces.addr() as DevicePtr;
        if pieces.len() > PIECES_IN_PLACE_MAX {
            list = self.list.address();
            let bytes = size_of_val(pieces);
            // SAFETY: both lists have room for `PIECES_MAX`, and the stream copies before the kernel behind it reads.
            let status = unsafe { (driver.copy_in_async)(list, self.pieces.cast::<c_void>(), bytes, self.stream) };
            driver.check("cuMemcpyHtoDAsync", status)?;
        }
        let mut arguments =
            [(&raw mut list).cast::<c_void>(), (&raw mut count).cast::<c_void>(), (&raw mut chunks).cast::<c_void>()];
        let (none, blocks) = (std::ptr::null_mut(), self.blocks.min(items.div_ceil(WARPS)).max(1));
        // SAFETY: the kernel takes a pointer and two counts, as given, and reads `count` pieces, whose addresses the caller
        // vouches for. The arguments are read before the call returns.
        let status = unsafe {
            (driver.launch)(self.kernel, blocks, 1, 1, THREADS, 1, 1, 0, self.stream, arguments.as_mut_ptr(), none)
        };
        driver.check("cuLaunchKernel", status)?;
        // SAFETY: both handles are ours.
        driver.check("cuEventRecord", unsafe { (driver.event_record)(self.event, self.stream) })?;
        self.wait(driver)
    }

    /// Waits for the event: awake at first, then asleep.
    fn wait(&self, driver: &Driver) -> Result<(), CudaError> {
        for _ in 0..ASK_MAX {
            // SAFETY: the handle is ours.
            match unsafe { (driver.event_query)(self.event) } {
                NOT_READY => std::hint::spin_loop(),
                status => return driver.check("cuEventQuery", status),
            }
        }
        // SAFETY: the handle is ours.
        driver.check("cuEventSynchronize", unsafe { (driver.event_synchronize)(self.event) })
    }
}

impl Drop for Copier {
    fn drop(&mut self) {
        // Each handle is ours and made once, and the stream is idle: every copy waited for its end. Null handles, of a copier
        // that was never finished, are refused by the driver without harm.
        let _ = self.device.current(|driver| {
            // SAFETY: as above.
            let _ = unsafe { (driver.event_destroy)(self.event) };
            // SAFETY: as above.
            let _ = unsafe { (driver.module_unload)(self.module) };
            // SAFETY: as above.
            let _ = unsafe { (driver.host_free)(self.pieces.cast::<c_void>()) };
            // SAFETY: as above. Not the null stream, which is the whole context's.
            let _ = self.stream.is_null() || unsafe { (driver.stream_destroy)(self.stream) } == 0;
            Ok(())
        });
    }
}
