//! A stream, one kernel of ours, and room for the list that a launch works off.

use std::ffi::{CStr, c_uint, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;

use super::device::{Device, DeviceMemory};
use super::driver::{CudaError, DevicePtr, Driver, Event, Function, Module, NOT_READY, Stream};

/// Lists up to this long are read where they are; longer ones are worth a copy into the GPU's memory first.
const ITEMS_IN_PLACE_MAX: usize = 32;
const NON_BLOCKING_STREAM: c_uint = 1;
/// Waits sleep instead of spinning, and take no time stamps.
const BLOCKING_EVENT: c_uint = 1 | 2;
/// Reachable from every context, and from the GPU at the same address.
const PORTABLE_MAPPED: c_uint = 1 | 2;
/// How often an event is asked before the thread goes to sleep for it: small work ends within microseconds.
const ASK_MAX: u32 = 20_000;

/// Host memory that the GPU reads and writes directly. For plain numbers and structures of them.
pub(super) struct Pinned<T> {
    device: Arc<Device>,
    items: *mut T,
    count: usize,
}

impl<T: Copy + Default> Pinned<T> {
    fn new(device: &Arc<Device>, count: usize) -> Result<Self, CudaError> {
        let mut memory: *mut c_void = std::ptr::null_mut();
        device.current(|driver| {
            // SAFETY: writes one pointer to that many bytes of page-aligned memory, freed in `drop`.
            let status = unsafe { (driver.host_allocate)(&raw mut memory, count * size_of::<T>(), PORTABLE_MAPPED) };
            driver.check("cuMemHostAlloc", status)
        })?;
        let items = memory.cast::<T>();
        // SAFETY: there are so many places, aligned to a page, and nobody else's.
        let places = unsafe { std::slice::from_raw_parts_mut(memory.cast::<MaybeUninit<T>>(), count) };
        places.fill(MaybeUninit::new(T::default()));
        Ok(Self { device: Arc::clone(device), items, count })
    }

    fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: all places were written when they were made, and live as long as `self`. The GPU only reads.
        unsafe { std::slice::from_raw_parts_mut(self.items, self.count) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        let _ = self.device.current(|driver| {
            // SAFETY: allocated once, and the stream that used it is idle.
            driver.check("cuMemFreeHost", unsafe { (driver.host_free)(self.items.cast::<c_void>()) })
        });
    }
}

/// One launch at a time: the caller is its only user.
pub(super) struct ListKernel<T> {
    device: Arc<Device>,
    stream: Stream,
    event: Event,
    module: Module,
    kernel: Function,
    /// A list that may be read by the launch that runs, and the next one's.
    lists: [Pinned<T>; 2],
    /// Which of them is the next one's.
    next: usize,
    /// The list's place on the GPU.
    list: DeviceMemory,
}

// SAFETY: the handles may be used from any thread that makes the context current, which every method does; `&mut self` keeps
// it to one at a time. The list is plain data.
unsafe impl<T: Send> Send for ListKernel<T> {}

impl<T: Copy + Default> ListKernel<T> {
    /// The kernel `name` of `text`, in the driver's portable language and ended by a zero, for lists of up to `items_max`.
    pub(super) fn new(device: &Arc<Device>, text: &str, name: &CStr, items_max: usize) -> Result<Self, CudaError> {
        let text = CStr::from_bytes_with_nul(text.as_bytes());
        let text = text.map_err(|error| CudaError::Kernel(format!("its text is not terminated: {error}")))?;
        let mut made = Self {
            stream: std::ptr::null_mut(),
            event: std::ptr::null_mut(),
            module: std::ptr::null_mut(),
            kernel: std::ptr::null_mut(),
            lists: [Pinned::new(device, items_max)?, Pinned::new(device, items_max)?],
            next: 0,
            list: device.allocate(items_max * size_of::<T>())?,
            device: Arc::clone(device),
        };
        device.current(|driver| made.prepare(driver, text, name))?;
        Ok(made)
    }

    fn prepare(&mut self, driver: &Driver, text: &CStr, name: &CStr) -> Result<(), CudaError> {
        // SAFETY: writes one handle, destroyed in `drop`.
        let status = unsafe { (driver.stream_create)(&raw mut self.stream, NON_BLOCKING_STREAM) };
        driver.check("cuStreamCreate", status)?;
        // SAFETY: writes one handle, destroyed in `drop`.
        let status = unsafe { (driver.event_create)(&raw mut self.event, BLOCKING_EVENT) };
        driver.check("cuEventCreate", status)?;
        // SAFETY: the text is terminated; writes one handle, unloaded in `drop`.
        let status = unsafe { (driver.module_load)(&raw mut self.module, text.as_ptr().cast::<c_void>()) };
        driver.check("cuModuleLoadData", status)?;
        // SAFETY: the name is terminated; writes one handle that lives as long as the module.
        let status = unsafe { (driver.module_function)(&raw mut self.kernel, self.module, name.as_ptr()) };
        driver.check("cuModuleGetFunction", status)
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }

    pub(super) fn stream(&self) -> Stream {
        self.stream
    }

    /// The list of the next launch. It may be written while the launch before runs.
    pub(super) fn list(&mut self) -> &mut [T] {
        self.lists[self.next].as_mut_slice()
    }

    /// Puts the first `count` items of the list where the kernel finds them: the address, and how many. The launch before must
    /// have been waited for: its list is the next one's from now on.
    pub(super) fn stage(&mut self, driver: &Driver, count: usize) -> Result<(DevicePtr, c_uint), CudaError> {
        let items = &self.lists[self.next];
        let too_many = || CudaError::Kernel(format!("{count} items are more than {}", items.count));
        let number = c_uint::try_from(count).ok().filter(|_| count <= items.count).ok_or_else(too_many)?;
        self.next = (self.next + 1) % self.lists.len();
        if count <= ITEMS_IN_PLACE_MAX {
            return Ok((items.items.addr() as DevicePtr, number));
        }
        let (list, from) = (self.list.address(), items.items.cast::<c_void>());
        // SAFETY: both lists have room for them, and the stream copies before the kernel behind it reads.
        let status = unsafe { (driver.copy_in_async)(list, from, count * size_of::<T>(), self.stream) };
        driver.check("cuMemcpyHtoDAsync", status).map(|()| (list, number))
    }

    /// Starts the kernel.
    ///
    /// # Safety
    /// `arguments` must point to what the kernel takes, and whatever these name must stay good until the stream is idle.
    pub(super) unsafe fn launch(
        &mut self,
        driver: &Driver,
        (blocks, threads): (c_uint, c_uint),
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let (arguments, none) = (arguments.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: as the caller promises. The arguments are read before the call returns.
        let status =
            unsafe { (driver.launch)(self.kernel, blocks, 1, 1, threads, 1, 1, 0, self.stream, arguments, none) };
        driver.check("cuLaunchKernel", status)
    }

    /// Waits until the stream is idle: awake at first, then asleep.
    pub(super) fn wait(&mut self, driver: &Driver) -> Result<(), CudaError> {
        // SAFETY: both handles are ours.
        driver.check("cuEventRecord", unsafe { (driver.event_record)(self.event, self.stream) })?;
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

impl<T> Drop for ListKernel<T> {
    fn drop(&mut self) {
        // Each handle is ours and made once, and the stream is idle: every launch was waited for. Null handles, of one that was
        // never finished, are refused by the driver without harm.
        let _ = self.device.current(|driver| {
            // SAFETY: as above.
            let _ = unsafe { (driver.event_destroy)(self.event) };
            // SAFETY: as above.
            let _ = unsafe { (driver.module_unload)(self.module) };
            // SAFETY: as above. Not the null stream, which is the whole context's.
            let _ = self.stream.is_null() || unsafe { (driver.stream_destroy)(self.stream) } == 0;
            Ok(())
        });
    }
}
