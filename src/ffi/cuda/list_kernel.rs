//! A stream, kernels of ours, and room for the list that a launch works off.

use std::ffi::{CStr, c_uint, c_void};
use std::sync::Arc;

use super::device::{Device, DeviceMemory};
use super::driver::{CudaError, DevicePtr, Driver, Function, Module, Stream};
use super::pinned::Pinned;
use super::signal::Signal;
use super::stream;

/// Lists up to this long are read where they are; longer ones are worth a copy into the GPU's memory first.
const ITEMS_IN_PLACE_MAX: usize = 32;

/// One launch at a time: the caller is its only user.
pub(super) struct ListKernel<T> {
    device: Arc<Device>,
    stream: Stream,
    signal: Signal,
    module: Module,
    kernels: Vec<Function>,
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
    /// The kernels `names` of `text`, in the driver's portable language and ended by a zero, for lists of up to `items_max`.
    pub(super) fn new(device: &Arc<Device>, text: &str, names: &[&CStr], items_max: usize) -> Result<Self, CudaError> {
        let text = CStr::from_bytes_with_nul(text.as_bytes());
        let text = text.map_err(|error| CudaError::Kernel(format!("its text is not terminated: {error}")))?;
        let mut made = Self {
            stream: std::ptr::null_mut(),
            signal: Signal::new(device)?,
            module: std::ptr::null_mut(),
            kernels: Vec::new(),
            lists: [Pinned::written_in_order(device, items_max)?, Pinned::written_in_order(device, items_max)?],
            next: 0,
            list: device.allocate(items_max * size_of::<T>())?,
            device: Arc::clone(device),
        };
        device.current(|driver| made.prepare(driver, text, names))?;
        Ok(made)
    }

    fn prepare(&mut self, driver: &Driver, text: &CStr, names: &[&CStr]) -> Result<(), CudaError> {
        self.stream = stream::create(driver)?;
        // SAFETY: the text is terminated; writes one handle, unloaded in `drop`.
        let status = unsafe { (driver.module_load)(&raw mut self.module, text.as_ptr().cast::<c_void>()) };
        driver.check("cuModuleLoadData", status)?;
        for name in names {
            let mut kernel: Function = std::ptr::null_mut();
            // SAFETY: the name is terminated; writes one handle that lives as long as the module.
            let status = unsafe { (driver.module_function)(&raw mut kernel, self.module, name.as_ptr()) };
            driver.check("cuModuleGetFunction", status)?;
            self.kernels.push(kernel);
        }
        Ok(())
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
    ///
    /// The kernel reads the list `in_place`, over the bus, or, unless it is short, from the GPU's own memory.
    pub(super) fn stage(
        &mut self,
        driver: &Driver,
        count: usize,
        in_place: bool,
    ) -> Result<(DevicePtr, c_uint), CudaError> {
        let items = &self.lists[self.next];
        let too_many = || CudaError::Kernel(format!("{count} items are more than {}", items.len()));
        let number = c_uint::try_from(count).ok().filter(|_| count <= items.len()).ok_or_else(too_many)?;
        self.next = (self.next + 1) % self.lists.len();
        if in_place || count <= ITEMS_IN_PLACE_MAX {
            return Ok((items.address(), number));
        }
        let (list, from) = (self.list.address(), items.as_ptr().cast::<c_void>());
        // SAFETY: both lists have room for them, and the stream copies before the kernel behind it reads.
        let status = unsafe { (driver.copy_in_async)(list, from, count * size_of::<T>(), self.stream) };
        driver.check("cuMemcpyHtoDAsync", status).map(|()| (list, number))
    }

    /// Starts one of the kernels, by its place among the names.
    ///
    /// # Safety
    /// `arguments` must point to what that kernel takes, and whatever these name must stay good until the stream is idle.
    pub(super) unsafe fn launch(
        &mut self,
        driver: &Driver,
        kernel: usize,
        (blocks, threads): (c_uint, c_uint),
        arguments: &mut [*mut c_void],
    ) -> Result<(), CudaError> {
        let (arguments, none) = (arguments.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: as the caller promises. The arguments are read before the call returns.
        let status = unsafe {
            (driver.launch)(self.kernels[kernel], blocks, 1, 1, threads, 1, 1, 0, self.stream, arguments, none)
        };
        driver.check("cuLaunchKernel", status)
    }

    /// Has [`ListKernel::wait`] wait for what is on the stream now.
    pub(super) fn signal(&mut self, driver: &Driver) -> Result<(), CudaError> {
        // SAFETY: the stream is ours, and there until the signal has been waited for.
        unsafe { self.signal.set(driver, self.stream) }
    }

    /// In place of [`ListKernel::signal`], for the kernel that is launched next: where it writes which number when it is done.
    pub(super) fn signal_by_kernel(&mut self) -> (DevicePtr, u32) {
        self.signal.by_kernel()
    }

    /// Waits for the last signal.
    pub(super) fn wait(&mut self, driver: &Driver) -> Result<(), CudaError> {
        // SAFETY: as above.
        unsafe { self.signal.wait(driver, self.stream) }
    }
}

impl<T> Drop for ListKernel<T> {
    fn drop(&mut self) {
        // Each handle is ours and made once. Null handles, of one that was never finished, are refused by the driver without harm.
        let _ = self.device.current(|driver| {
            // A signal comes a moment before the stream is idle. The null stream is the whole context's.
            // SAFETY: as above.
            let _ = self.stream.is_null() || unsafe { (driver.stream_synchronize)(self.stream) } == 0;
            // SAFETY: as above.
            let _ = unsafe { (driver.module_unload)(self.module) };
            // SAFETY: as above.
            let _ = self.stream.is_null() || unsafe { (driver.stream_destroy)(self.stream) } == 0;
            Ok(())
        });
    }
}
