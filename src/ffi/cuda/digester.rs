//! Digests of KV rows, added up on the GPU that holds them.

use std::ffi::{c_uint, c_void};
use std::sync::Arc;

use super::device::{Device, DeviceMemory};
use super::driver::{CudaError, Driver};
use super::idle::{Idle, Lent};
use super::list_kernel::ListKernel;

/// The kernel in the driver's portable language, ended by a zero as the driver wants it.
const KERNEL: &str = concat!(include_str!("digest_tiles.ptx"), "\0");
const THREADS: c_uint = 256;
/// Warps of one block, and the parts that each tile is cut into, as the kernel has it.
const WARPS: c_uint = THREADS / 32;
const PARTS: c_uint = 8;
/// Blocks that one multiprocessor takes at once.
const BLOCKS_EACH: c_uint = 4;
/// Blocks that fill the bus to host memory: 8 KiB under way in each, where some 100 KiB are what the bus takes in the time of one answer.
/// More would only stand in the way of the model's kernels.
const BLOCKS_ON_BUS: c_uint = 32;
/// Most tiles of one launch.
const TILES_MAX: usize = 32 * 1024;
/// Most sums of one call.
pub const SUMS_MAX: usize = 4096;

/// Rows of KV: `heads` by `tokens`, each of `content` bytes; the address as the GPU sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct DigestTile {
    pub address: u64,
    pub head_stride: u64,
    pub token_stride: u64,
    pub heads: u32,
    pub tokens: u32,
    /// The first row's place: what its key is made of.
    pub plane: u32,
    pub token: u32,
    pub content: u32,
    /// Number of the sum that it counts to.
    pub sum: u32,
}

/// What is between the kernel and the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// They lie in the GPU's own memory.
    Memory,
    /// Some lie in the host's.
    Bus,
}

/// Our digest kernel on a stream of its own. One call at a time: the caller is its only user.
pub struct Digester {
    kernel: Lent<Kernel>,
    failed: bool,
}

struct Kernel {
    kernel: ListKernel<DigestTile>,
    sums: DeviceMemory,
    blocks_max: c_uint,
}

static IDLE: Idle<Kernel> = Idle::new();

impl Digester {
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let is_here = |idle: &Kernel| idle.kernel.device().ordinal() == device.ordinal();
        Ok(Self { kernel: IDLE.take(is_here, || Kernel::new(device))?, failed: false })
    }

    /// Adds the digest of each tile to the sum that it names.
    ///
    /// # Safety
    /// Every row of every tile must be bytes that this GPU can read until this returns, and every tile must name one of `sums`.
    pub unsafe fn add(&mut self, tiles: &[DigestTile], sums: &mut [u64], reach: Reach) -> Result<(), CudaError> {
        // SAFETY: as the caller promises.
        let added = unsafe { self.kernel.add(tiles, sums, reach) };
        self.failed |= added.is_err();
        added
    }
}

impl Drop for Digester {
    fn drop(&mut self) {
        if self.failed {
            self.kernel.discard();
        }
    }
}

impl Kernel {
    fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let blocks_max = device.multiprocessors()?.max(1) * BLOCKS_EACH;
        let kernel = ListKernel::new(device, KERNEL, &[c"pdlink_digest_tiles"], TILES_MAX)?;
        Ok(Self { kernel, sums: device.allocate(SUMS_MAX * size_of::<u64>())?, blocks_max })
    }

    /// # Safety
    /// As [`Digester::add`].
    unsafe fn add(&mut self, tiles: &[DigestTile], sums: &mut [u64], reach: Reach) -> Result<(), CudaError> {
        if sums.len() > SUMS_MAX {
            return Err(CudaError::Kernel(format!("{} sums are more than {SUMS_MAX}", sums.len())));
        }
        let device = Arc::clone(self.kernel.device());
        device.current(|driver| {
            let (place, bytes, stream) = (self.sums.address(), size_of_val(sums), self.kernel.stream());
            // SAFETY: there is room for them on the GPU; plain host memory is read before the call returns.
            let status = unsafe { (driver.copy_in_async)(place, sums.as_ptr().cast::<c_void>(), bytes, stream) };
            driver.check("cuMemcpyHtoDAsync", status)?;
            for part in tiles.chunks(TILES_MAX) {
                // SAFETY: as the caller promises, of this part.
                unsafe { self.add_part(driver, part, reach) }?;
            }
            // SAFETY: as above; plain host memory is written before the call returns.
            let status = unsafe { (driver.copy_out_async)(sums.as_mut_ptr().cast::<c_void>(), place, bytes, stream) };
            driver.check("cuMemcpyDtoHAsync", status)?;
            self.kernel.signal(driver)?;
            self.kernel.wait(driver)
        })
    }

    /// # Safety
    /// As [`Digester::add`], for at most `TILES_MAX` tiles.
    unsafe fn add_part(&mut self, driver: &Driver, tiles: &[DigestTile], reach: Reach) -> Result<(), CudaError> {
        self.kernel.list()[..tiles.len()].copy_from_slice(tiles);
        let (mut list, mut count) = self.kernel.stage(driver, tiles.len(), false)?;
        let mut sums = self.sums.address();
        let mut arguments =
            [(&raw mut list).cast::<c_void>(), (&raw mut count).cast::<c_void>(), (&raw mut sums).cast::<c_void>()];
        let most = if reach == Reach::Bus { BLOCKS_ON_BUS.min(self.blocks_max) } else { self.blocks_max };
        let blocks = most.min((count * PARTS).div_ceil(WARPS)).max(1);
        // SAFETY: the kernel takes a pointer, a count and a pointer, as given, and reads `count` tiles, whose rows and sums the
        // caller vouches for until the wait below has ended.
        unsafe { self.kernel.launch(driver, 0, (blocks, THREADS), &mut arguments) }?;
        // Also because a list after the next takes the place of this one.
        self.kernel.signal(driver)?;
        self.kernel.wait(driver)
    }
}
