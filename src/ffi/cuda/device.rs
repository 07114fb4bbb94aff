//! One GPU, as this process sees it, and memory on it.

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::driver::{
    Context, CudaError, DevicePtr, Driver, INVALID_DEVICE, OUT_OF_MEMORY, RawIpcHandle, Status, Stream, visible_devices,
};
use super::{sight, stream};

const MULTIPROCESSOR_COUNT: i32 = 16;
/// Lets a mapped peer GPU be reached over NVLink or PCIe without a call of its own.
const LAZY_PEER_ACCESS: u32 = 1;
/// Fixed for every context of the process.
const PORTABLE_MAPPED: u32 = 1 | 2;

/// What all devices' memory that was allocated here adds up to. Memory of the engine is not in it.
static ALLOCATED_BYTES: AtomicU64 = AtomicU64::new(0);

/// Bytes of GPU memory that pdlink has allocated in this process and not freed: staging and lists, not the engine's own.
pub fn allocated_bytes() -> u64 {
    ALLOCATED_BYTES.load(Ordering::Relaxed)
}

/// A GPU, with the context that PyTorch and everybody else in the process uses too.
#[derive(Debug)]
pub struct Device {
    driver: &'static Driver,
    ordinal: i32,
    handle: i32,
    context: Context,
}

// SAFETY: a context may be current on any number of threads; every call makes it current on its own thread first.
unsafe impl Send for Device {}
// SAFETY: as above, and the driver serialises what must be.
unsafe impl Sync for Device {}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

/// An allocation that an address lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allocation {
    pub base: u64,
    pub len: u64,
}

/// Names an allocation to other processes of this host.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IpcHandle(Vec<u8>);

impl Device {
    /// The GPU of number `ordinal` among those that `CUDA_VISIBLE_DEVICES` leaves.
    pub fn open(ordinal: i32) -> Result<Arc<Self>, CudaError> {
        let driver = Driver::get()?;
        let handle = sight::handle(driver, ordinal).map_err(|error| no_such_gpu(driver, ordinal, error))?;
        let mut context: Context = std::ptr::null_mut();
        // SAFETY: writes one pointer; released when the device is dropped.
        let status = unsafe { (driver.primary_retain)(&raw mut context, handle) };
        driver.check("cuDevicePrimaryCtxRetain", status)?;
        Ok(Arc::new(Self { driver, ordinal, handle, context }))
    }

    pub fn ordinal(&self) -> i32 {
        self.ordinal
    }

    /// The number that names this GPU on any machine.
    pub fn uuid(&self) -> Result<[u8; 16], CudaError> {
        sight::uuid_of(self.driver, self.handle)
    }

    pub(super) fn driver(&self) -> &'static Driver {
        self.driver
    }

    pub(super) fn handle(&self) -> i32 {
        self.handle
    }

    pub fn multiprocessors(&self) -> Result<u32, CudaError> {
        let mut count = 0;
        // SAFETY: writes one int.
        let status = unsafe { (self.driver.device_attribute)(&raw mut count, MULTIPROCESSOR_COUNT, self.handle) };
        self.driver.check("cuDeviceGetAttribute", status).map(|()| u32::try_from(count).unwrap_or(1))
    }

    /// Runs `work` with this GPU current on the calling thread: for libraries that use whatever is current.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> Result<T, CudaError> {
        self.current(|_| Ok(work()))
    }

    /// Runs `calls` with this GPU's context current on the calling thread, and puts back what was current before.
    pub(super) fn current<T>(&self, calls: impl FnOnce(&Driver) -> Result<T, CudaError>) -> Result<T, CudaError> {
        // SAFETY: the context is retained for as long as `self` lives.
        self.driver.check("cuCtxPushCurrent", unsafe { (self.driver.context_push)(self.context) })?;
        let result = calls(self.driver);
        let mut popped: Context = std::ptr::null_mut();
        // SAFETY: writes one pointer; what is popped was pushed above.
        let status = unsafe { (self.driver.context_pop)(&raw mut popped) };
        self.driver.check("cuCtxPopCurrent", status).and(result)
    }

    /// The allocation that `address` lies in.
    pub fn allocation_of(&self, address: u64) -> Result<Allocation, CudaError> {
        self.current(|driver| {
            let (mut base, mut len) = (0, 0_usize);
            // SAFETY: writes two numbers; any address may be asked about.
            let status = unsafe { (driver.memory_range)(&raw mut base, &raw mut len, address) };
            driver.check("cuMemGetAddressRange", status).map(|()| Allocation { base, len: len as u64 })
        })
    }

    /// What other processes need to map the allocation that starts at `base`.
    pub fn share(&self, base: u64) -> Result<IpcHandle, CudaError> {
        self.current(|driver| {
            let mut handle = RawIpcHandle([0; 64]);
            // SAFETY: writes 64 bytes; an address that is none is answered with an error.
            let status = unsafe { (driver.ipc_handle)(&raw mut handle, base) };
            driver.check("cuIpcGetMemHandle", status).map(|()| IpcHandle(handle.0.to_vec()))
        })
    }

    /// Maps another process's allocation for this GPU.
    pub fn map(self: &Arc<Self>, handle: &IpcHandle) -> Result<Mapped, CudaError> {
        let invalid = || CudaError::Kernel(format!("a memory handle has 64 bytes, this one {}", handle.0.len()));
        let raw = RawIpcHandle(handle.0.as_slice().try_into().map_err(|_| invalid())?);
        self.current(|driver| {
            let mut address = 0;
            // SAFETY: writes one address; unmapped once, when `Mapped` is dropped.
            let status = unsafe { (driver.ipc_open)(&raw mut address, raw, LAZY_PEER_ACCESS) };
            driver.check("cuIpcOpenMemHandle", status).map(|()| Mapped { device: Arc::clone(self), address })
        })
    }

    /// Bytes of this GPU's memory that nobody has.
    pub fn free_bytes(&self) -> Result<u64, CudaError> {
        self.current(|driver| memory_info(driver).map(|(free, _)| free))
    }

    /// `len` bytes of this GPU's memory.
    pub fn allocate(self: &Arc<Self>, len: usize) -> Result<DeviceMemory, CudaError> {
        self.current(|driver| {
            let mut address = 0;
            // SAFETY: writes one address; freed once, when `DeviceMemory` is dropped.
            let status = unsafe { (driver.memory_allocate)(&raw mut address, len) };
            if status == OUT_OF_MEMORY {
                return Err(self.no_room(driver, len, status));
            }
            driver.check("cuMemAlloc", status)?;
            ALLOCATED_BYTES.fetch_add(len as u64, Ordering::Relaxed);
            Ok(DeviceMemory { device: Arc::clone(self), address, len: len as u64 })
        })
    }

    fn no_room(&self, driver: &Driver, len: usize, status: Status) -> CudaError {
        // Where the driver cannot say either, that nothing is free is as good as known.
        let (free, total) = memory_info(driver).unwrap_or((0, 0));
        let (ordinal, bytes, name) = (self.ordinal, len as u64, driver.name(status));
        CudaError::NoRoom { ordinal, bytes, free, total, code: status, name }
    }

    /// Fixes host memory in place, for copies at the full speed of the bus, and for kernels that read it.
    ///
    /// # Safety
    /// `len` bytes from `host` on must stay mapped until what is answered is dropped.
    pub unsafe fn pin(self: &Arc<Self>, host: *mut u8, len: usize) -> Result<Pin, CudaError> {
        self.current(|driver| {
            // SAFETY: the caller vouches for the memory; released once, when `Pin` is dropped.
            let status = unsafe { (driver.host_register)(host.cast::<c_void>(), len, PORTABLE_MAPPED) };
            driver.check("cuMemHostRegister", status)
        })?;
        // From here on it is released when this is dropped.
        let mut pin = Pin { device: Arc::clone(self), host, address: 0 };
        self.current(|driver| {
            // SAFETY: writes one address, of memory that was just registered.
            let status = unsafe { (driver.host_address)(&raw mut pin.address, host.cast::<c_void>(), 0) };
            driver.check("cuMemHostGetDevicePointer", status)
        })?;
        Ok(pin)
    }

    /// Copies `len` bytes at `host` to `address`.
    ///
    /// # Safety
    /// `address` must be that many writable bytes that this GPU can address, and `host` readable ones of this process.
    pub unsafe fn copy_in(&self, address: DevicePtr, host: *const u8, len: usize) -> Result<(), CudaError> {
        self.current(|driver| {
            // SAFETY: the caller vouches for both.
            let status = unsafe { (driver.copy_in)(address, host.cast::<c_void>(), len) };
            driver.check("cuMemcpyHtoD", status)
        })
    }

    /// Copies `len` bytes at `address` to `host`.
    ///
    /// # Safety
    /// `address` must be that many readable bytes that this GPU can address, and `host` writable ones of this process.
    pub unsafe fn copy_out(&self, address: DevicePtr, host: *mut u8, len: usize) -> Result<(), CudaError> {
        self.current(|driver| {
            // SAFETY: the caller vouches for both.
            let status = unsafe { (driver.copy_out)(host.cast::<c_void>(), address, len) };
            driver.check("cuMemcpyDtoH", status)
        })
    }

    /// As [`Device::copy_in`], on a stream of its own: much memory, which the work of everybody else must not wait for.
    ///
    /// # Safety
    /// As [`Device::copy_in`].
    pub unsafe fn copy_in_beside(&self, address: DevicePtr, host: *const u8, len: usize) -> Result<(), CudaError> {
        self.beside(|driver, stream| {
            // SAFETY: the caller vouches for both, until the stream has been waited for.
            let status = unsafe { (driver.copy_in_async)(address, host.cast::<c_void>(), len, stream) };
            driver.check("cuMemcpyHtoDAsync", status)
        })
    }

    /// As [`Device::copy_out`], on a stream of its own.
    ///
    /// # Safety
    /// As [`Device::copy_out`].
    pub unsafe fn copy_out_beside(&self, address: DevicePtr, host: *mut u8, len: usize) -> Result<(), CudaError> {
        self.beside(|driver, stream| {
            // SAFETY: the caller vouches for both, until the stream has been waited for.
            let status = unsafe { (driver.copy_out_async)(host.cast::<c_void>(), address, len, stream) };
            driver.check("cuMemcpyDtoHAsync", status)
        })
    }

    /// Puts work on a new stream, which waits for no other, and waits for it.
    fn beside(&self, work: impl FnOnce(&Driver, Stream) -> Result<(), CudaError>) -> Result<(), CudaError> {
        self.current(|driver| {
            let stream = stream::create(driver)?;
            let begun = work(driver, stream);
            // SAFETY: the handle is ours. Also if the work failed: part of it may run.
            let status = unsafe { (driver.stream_synchronize)(stream) };
            let ended = driver.check("cuStreamSynchronize", status);
            // SAFETY: as above, and nothing runs on it.
            let status = unsafe { (driver.stream_destroy)(stream) };
            let destroyed = driver.check("cuStreamDestroy", status);
            begun.and(ended).and(destroyed)
        })
    }

    /// Copies `len` bytes from one address to another.
    ///
    /// # Safety
    /// Both must be that many bytes that this GPU can address, and `dst` writable.
    pub unsafe fn copy_within(&self, src: DevicePtr, dst: DevicePtr, len: usize) -> Result<(), CudaError> {
        self.current(|driver| {
            // SAFETY: the caller vouches for both.
            driver.check("cuMemcpyDtoD", unsafe { (driver.copy_within)(dst, src, len) })?;
            // Between two places on GPUs the call above only starts the copy.
            // SAFETY: the null stream, where it runs, is always there.
            driver.check("cuStreamSynchronize", unsafe { (driver.stream_synchronize)(std::ptr::null_mut()) })
        })
    }

    /// Sets `len` bytes to `byte`.
    ///
    /// # Safety
    /// `address` must be that many writable bytes that this GPU can address.
    pub unsafe fn fill(&self, address: DevicePtr, byte: u8, len: usize) -> Result<(), CudaError> {
        self.current(|driver| {
            // SAFETY: the caller vouches for `address`.
            driver.check("cuMemsetD8", unsafe { (driver.memory_set)(address, byte, len) })
        })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once, in `open`. At the end of the process the driver may be gone already, and says so.
        let _ = unsafe { (self.driver.primary_release)(self.handle) };
    }
}

/// What is free of the current GPU's memory, and all of it.
fn memory_info(driver: &Driver) -> Result<(u64, u64), CudaError> {
    let (mut free, mut total) = (0, 0_usize);
    // SAFETY: writes two numbers.
    let status = unsafe { (driver.memory_info)(&raw mut free, &raw mut total) };
    driver.check("cuMemGetInfo", status).map(|()| (free as u64, total as u64))
}

/// The error of asking for a GPU, which says what there is if it is that there is none of that number.
fn no_such_gpu(driver: &Driver, ordinal: i32, error: CudaError) -> CudaError {
    match (error, sight::count(driver)) {
        (CudaError::Call { code: INVALID_DEVICE, .. }, Ok(visible)) => {
            CudaError::NoSuchGpu { ordinal, visible, variable: visible_devices() }
        }
        (error, _) => error,
    }
}

/// Memory that we allocated.
#[derive(Debug)]
pub struct DeviceMemory {
    device: Arc<Device>,
    address: DevicePtr,
    len: u64,
}

impl DeviceMemory {
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        ALLOCATED_BYTES.fetch_sub(self.len, Ordering::Relaxed);
        // SAFETY: allocated once, and nothing uses it after its owner.
        let _ = self.device.current(|driver| driver.check("cuMemFree", unsafe { (driver.memory_free)(self.address) }));
    }
}

/// Host memory that stays where it is.
#[derive(Debug)]
pub struct Pin {
    device: Arc<Device>,
    host: *mut u8,
    address: DevicePtr,
}

impl Pin {
    /// The GPU that it was fixed for.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Where that GPU finds it.
    pub fn address(&self) -> DevicePtr {
        self.address
    }
}

// SAFETY: the address is a name for the driver, and is never looked behind.
unsafe impl Send for Pin {}
// SAFETY: as above.
unsafe impl Sync for Pin {}

impl Drop for Pin {
    fn drop(&mut self) {
        let release = |driver: &Driver| {
            // SAFETY: registered once, and still mapped, as the caller of `Device::pin` promised.
            driver.check("cuMemHostUnregister", unsafe { (driver.host_unregister)(self.host.cast::<c_void>()) })
        };
        let _ = self.device.current(release);
    }
}

/// Another process's allocation, mapped here.
#[derive(Debug)]
pub struct Mapped {
    device: Arc<Device>,
    address: DevicePtr,
}

impl Mapped {
    pub fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        let close = |driver: &Driver| {
            // SAFETY: mapped once, and every copy that named it has ended: its owner waited for them.
            driver.check("cuIpcCloseMemHandle", unsafe { (driver.ipc_close)(self.address) })
        };
        let _ = self.device.current(close);
    }
}
