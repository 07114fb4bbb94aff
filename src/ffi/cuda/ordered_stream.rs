//! A stream that somebody else's library works on, and marks in it.

use std::ffi::c_void;
use std::sync::Arc;

use super::device::Device;
use super::driver::{CudaError, Event, NOT_READY, Stream};
use super::stream;

/// Marks take no time stamps.
const ASKED_ABOUT: u32 = 2;
/// Who waits for a mark sleeps, and leaves the processor to others. Such a mark costs the GPU an interrupt.
const WAITED_FOR: u32 = 2 | 1;

/// What is put on it runs in order.
#[derive(Debug)]
pub struct OrderedStream {
    device: Arc<Device>,
    stream: Stream,
}

// SAFETY: a stream may be used from any thread that makes its context current, which every method does.
unsafe impl Send for OrderedStream {}

impl OrderedStream {
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        let stream = device.current(stream::create)?;
        Ok(Self { device: Arc::clone(device), stream })
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// For libraries that take a stream.
    pub fn raw(&self) -> *mut c_void {
        self.stream
    }

    /// Sets `mark` behind everything that is on the stream now.
    pub fn mark(&self, mark: &Mark) -> Result<(), CudaError> {
        self.device.current(|driver| {
            // SAFETY: both handles are alive.
            driver.check("cuEventRecord", unsafe { (driver.event_record)(mark.event, self.stream) })
        })
    }

    /// Waits until nothing is on the stream.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.device.current(|driver| {
            // SAFETY: the handle is ours.
            driver.check("cuStreamSynchronize", unsafe { (driver.stream_synchronize)(self.stream) })
        })
    }
}

impl Drop for OrderedStream {
    fn drop(&mut self) {
        // SAFETY: made once; the driver lets what is on it end first.
        let _ = self
            .device
            .current(|driver| driver.check("cuStreamDestroy", unsafe { (driver.stream_destroy)(self.stream) }));
    }
}

/// A place in a stream.
#[derive(Debug)]
pub struct Mark {
    device: Arc<Device>,
    event: Event,
}

// SAFETY: as for the stream.
unsafe impl Send for Mark {}

impl Mark {
    /// A mark that is asked about from time to time.
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Self::of_kind(device, ASKED_ABOUT)
    }

    fn of_kind(device: &Arc<Device>, kind: u32) -> Result<Self, CudaError> {
        let mut event: Event = std::ptr::null_mut();
        device.current(|driver| {
            // SAFETY: writes one handle, destroyed in `drop`.
            driver.check("cuEventCreate", unsafe { (driver.event_create)(&raw mut event, kind) })
        })?;
        Ok(Self { device: Arc::clone(device), event })
    }

    /// A mark behind everything that is on somebody else's stream now. Null is the default stream.
    ///
    /// # Safety
    /// `stream` must be null or a living stream of `device`'s primary context.
    pub unsafe fn behind(device: &Arc<Device>, stream: *mut c_void) -> Result<Self, CudaError> {
        let mark = Self::of_kind(device, WAITED_FOR)?;
        device.current(|driver| {
            // SAFETY: the event is ours, and the caller vouches for the stream.
            driver.check("cuEventRecord", unsafe { (driver.event_record)(mark.event, stream) })
        })?;
        Ok(mark)
    }

    /// Waits until everything before it has been done.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.device.current(|driver| {
            // SAFETY: the handle is ours.
            driver.check("cuEventSynchronize", unsafe { (driver.event_synchronize)(self.event) })
        })
    }

    /// Whether everything before it has been done.
    pub fn passed(&self) -> Result<bool, CudaError> {
        self.device.current(|driver| {
            // SAFETY: the handle is ours.
            match unsafe { (driver.event_query)(self.event) } {
                NOT_READY => Ok(false),
                status => driver.check("cuEventQuery", status).map(|()| true),
            }
        })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // SAFETY: made once, and nothing asks for it any more.
        let _ =
            self.device.current(|driver| driver.check("cuEventDestroy", unsafe { (driver.event_destroy)(self.event) }));
    }
}
