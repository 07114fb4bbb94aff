//! Scattered copies by one kernel launch: a list of pieces, a few blocks of threads that work it off. Few short runs need no list.

use std::ffi::{CStr, c_uint, c_void};
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
/// Most slots of the list of one launch.
const SLOTS_MAX: usize = 64 * 1024;
/// A list spends so many bits of a slot's numbers on an address, and the rest on the length.
const ADDRESS_BITS: u32 = 48;

/// The kernels, each at its place in the module.
const KERNELS: [&CStr; 3] = [c"pdlink_copy_runs", c"pdlink_copy_rows", c"pdlink_copy_few"];
const RUNS: usize = 0;
const ROWS: usize = 1;
const FEW: usize = 2;

static IDLE: Idle<ListKernel<CopySlot>> = Idle::new();

/// What a list is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(16))]
pub struct CopySlot([u64; 2]);

/// What all items of a launch are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyKind {
    /// One slot each.
    Runs,
    /// Runs of one length at equal distances: two slots each.
    Rows,
}

impl CopyKind {
    pub fn slots(self) -> usize {
        match self {
            Self::Runs => 1,
            Self::Rows => 2,
        }
    }
}

/// Runs of one length at equal distances; addresses as the GPU sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CopyRows {
    pub src: u64,
    pub dst: u64,
    /// Of one row.
    pub len: u32,
    pub rows: u32,
    /// From one row to the next.
    pub src_step: u32,
    pub dst_step: u32,
}

impl CopySlot {
    /// One run. `None`: an address or the length has more bits than there is room for.
    pub fn run(src: u64, dst: u64, len: u32) -> Option<Self> {
        let fits = (src | dst) >> ADDRESS_BITS == 0;
        let (low, high) = (u64::from(len & 0xffff), u64::from(len >> 16));
        fits.then_some(Self([src | low << ADDRESS_BITS, dst | high << ADDRESS_BITS]))
    }

    pub fn rows(rows: &CopyRows) -> [Self; 2] {
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        [Self([rows.src, rows.dst]), Self([pair(rows.len, rows.rows), pair(rows.src_step, rows.dst_step)])]
    }
}

/// Runs that a launch brings with it, as the kernel has them: chunks enough for one block, of few runs.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(16))]
pub struct CopyFew {
    runs: [CopySlot; Self::RUNS_MAX],
    count: c_uint,
    /// Of the longest run.
    chunks: c_uint,
}

impl CopyFew {
    pub const RUNS_MAX: usize = 8;

    /// `None`: they are too many, or the longest of them, of `longest` bytes, is too long for so many.
    pub fn new(runs: &[CopySlot], longest: u64) -> Option<Self> {
        let mut few = Self { runs: [CopySlot::default(); Self::RUNS_MAX], count: 0, chunks: chunks(longest) };
        few.runs.get_mut(..runs.len())?.copy_from_slice(runs);
        few.count = c_uint::try_from(runs.len()).ok()?;
        few.count.checked_mul(few.chunks).filter(|warps| (1..=WARPS).contains(warps)).map(|_| few)
    }
}

/// Chunks of the longest piece of a launch.
fn chunks(longest: u64) -> c_uint {
    c_uint::try_from(longest.div_ceil(CHUNK_BYTES)).unwrap_or(c_uint::MAX).max(1)
}

/// Our copy kernel on a stream of its own. One launch at a time: the caller is its only user.
pub struct Copier {
    kernel: Lent<ListKernel<CopySlot>>,
    blocks: c_uint,
    running: bool,
}

impl Copier {
    /// Copies with at most `blocks_max` multiprocessors at once.
    pub fn new(device: &Arc<Device>, blocks_max: u32) -> Result<Self, CudaError> {
        let blocks = device.multiprocessors()?.min(blocks_max).max(1);
        let is_here = |kernel: &ListKernel<CopySlot>| kernel.device().ordinal() == device.ordinal();
        let make = || ListKernel::new(device, KERNEL, &KERNELS, SLOTS_MAX);
        let kernel = IDLE.take(is_here, make)?;
        Ok(Self { kernel, blocks, running: false })
    }

    /// The list of the next launch, to be filled from its start, while the one before runs.
    pub fn list(&mut self) -> &mut [CopySlot] {
        self.kernel.list()
    }

    /// Starts to copy what the first `slots` of the list say, no item with more bytes than `longest`, after waiting for what was
    /// started before. It is there once [`Copier::wait`] has returned. A list that is read `in_place` need not be copied first, but
    /// each look of the kernel at an item goes over the bus.
    ///
    /// # Safety
    /// All items must be of that kind, and each run or row bytes that this GPU can read and write until the wait has returned, or the
    /// copier is dropped; no destination may overlap another, or a source. The rows of an item have less than 4 GiB together.
    pub unsafe fn start(
        &mut self,
        kind: CopyKind,
        slots: usize,
        longest: u64,
        in_place: bool,
    ) -> Result<(), CudaError> {
        self.wait()?;
        let device = Arc::clone(self.kernel.device());
        // SAFETY: as the caller promises.
        device.current(|driver| unsafe { self.launch(driver, kind, slots, longest, in_place) })
    }

    /// # Safety
    /// As [`Copier::start`].
    unsafe fn launch(
        &mut self,
        driver: &Driver,
        kind: CopyKind,
        slots: usize,
        longest: u64,
        in_place: bool,
    ) -> Result<(), CudaError> {
        let mut chunks = chunks(longest);
        // Also if something fails from here on: the list may be on its way.
        self.running = true;
        let (mut list, slots) = self.kernel.stage(driver, slots, in_place)?;
        let (kernel, mut count) = match kind {
            CopyKind::Runs => (RUNS, slots),
            CopyKind::Rows => (ROWS, slots / 2),
        };
        // One number for all chunks of a launch: 65,536 pieces of 256 KiB are 4 M.
        let items = count.checked_mul(chunks).ok_or_else(|| CudaError::Kernel("a piece is too long".to_owned()))?;
        let mut arguments =
            [(&raw mut list).cast::<c_void>(), (&raw mut count).cast::<c_void>(), (&raw mut chunks).cast::<c_void>()];
        let blocks = self.blocks.min(items.div_ceil(WARPS)).max(1);
        // SAFETY: both kernels take a pointer and two counts, as given, and read `count` items of their kind, whose addresses the
        // caller vouches for until they have been waited for.
        unsafe { self.kernel.launch(driver, kernel, (blocks, THREADS), &mut arguments) }?;
        self.kernel.signal(driver)
    }

    /// As [`Copier::start`], of runs that are not on the list.
    ///
    /// # Safety
    /// As [`Copier::start`].
    pub unsafe fn start_few(&mut self, few: CopyFew) -> Result<(), CudaError> {
        self.wait()?;
        let device = Arc::clone(self.kernel.device());
        // SAFETY: as the caller promises.
        device.current(|driver| unsafe { self.launch_few(driver, few) })
    }

    /// # Safety
    /// As [`Copier::start`].
    unsafe fn launch_few(&mut self, driver: &Driver, mut few: CopyFew) -> Result<(), CudaError> {
        self.running = true;
        let threads = few.count * few.chunks * (THREADS / WARPS);
        let (mut word, mut value) = self.kernel.signal_by_kernel();
        let mut arguments =
            [(&raw mut few).cast::<c_void>(), (&raw mut word).cast::<c_void>(), (&raw mut value).cast::<c_void>()];
        // SAFETY: the kernel takes runs by value, a pointer and a number, as given. The caller vouches for the runs' addresses until
        // they have been waited for; the number's place is there until the stream is idle.
        unsafe { self.kernel.launch(driver, FEW, (1, threads), &mut arguments) }
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

#[cfg(test)]
mod tests {
    use super::super::fake_cuda;
    use super::*;

    #[test]
    fn a_slot_holds_every_address_and_length_that_the_kernel_reads_from_it() {
        let address = (1_u64 << ADDRESS_BITS) - 1;
        for len in [0, 1, 0xffff, 0x1_0000, 256 << 10, u32::MAX] {
            let CopySlot([src, dst]) = CopySlot::run(address - 16, address, len).unwrap();
            assert_eq!((src & address, dst & address), (address - 16, address));
            assert_eq!(src >> ADDRESS_BITS | dst >> ADDRESS_BITS << 16, u64::from(len));
        }
        assert_eq!((CopySlot::run(address + 1, 0, 1), CopySlot::run(0, address + 1, 1)), (None, None));
    }

    #[test]
    fn runs_are_few_where_one_block_has_a_warp_for_each_chunk() {
        let runs = [CopySlot::default(); CopyFew::RUNS_MAX + 1];
        for (count, longest, want) in [
            (0, 1, None),
            (1, 0, Some(1)),
            (1, CHUNK_BYTES * 32, Some(32)),
            (1, CHUNK_BYTES * 32 + 1, None),
            (5, CHUNK_BYTES * 6, Some(30)),
            (5, CHUNK_BYTES * 7, None),
            (8, CHUNK_BYTES * 4, Some(32)),
            (8, u64::MAX, None),
            (9, 1, None),
        ] {
            let got = CopyFew::new(&runs[..count], longest).map(|few| few.count * few.chunks);
            assert_eq!(got, want, "{count} runs of up to {longest} bytes");
        }
        // As the kernel has them.
        assert_eq!((size_of::<CopyFew>(), std::mem::offset_of!(CopyFew, count)), (144, 128));
    }

    /// The number of a launch that failed never comes: nobody waits for it, and the next launch has one of its own.
    #[test]
    fn a_failed_launch_holds_nobody_up() {
        if !fake_cuda::is_here() {
            return;
        }
        let device = Device::open(0).unwrap();
        let (src, dst) = (device.allocate(64).unwrap(), device.allocate(64).unwrap());
        let few = |src: u64, len: u32| CopyFew::new(&[CopySlot::run(src, dst.address(), len).unwrap()], len.into());
        let mut copier = Copier::new(&device, 8).unwrap();
        for _ in 0..3 {
            // SAFETY: the stand-in refuses what was not allocated, and looks at nothing there.
            let failed = unsafe { copier.start_few(few(64, 64).unwrap()) };
            assert!(failed.unwrap_err().to_string().contains("ILLEGAL_ADDRESS"));
            copier.wait().unwrap();
            // SAFETY: both are so long, and there until the wait has returned.
            unsafe { copier.start_few(few(src.address(), 64).unwrap()) }.unwrap();
            copier.wait().unwrap();
        }
    }
}
