//! Learning at once that a stream has got somewhere: the GPU writes a number into host memory, and a look at it asks nobody. The
//! stream writes it, behind whatever is on it, or a kernel does, as the last thing of its own.
//! An event is told of through the driver, and on some virtual machines 30 µs later.

use std::ffi::c_uint;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::device::Device;
use super::driver::{CudaError, DevicePtr, Driver, NOT_READY, NOT_SUPPORTED, Stream};
use super::pinned::Pinned;

/// The number comes behind everything that was written before it.
const WITH_BARRIER: c_uint = 0;
/// How long a thread waits awake: most copies take less. Then it looks after each nap.
const AWAKE: Duration = Duration::from_millis(3);
const NAP: Duration = Duration::from_micros(50);
/// Looks between two questions to the driver, which alone knows of a GPU that has failed.
const LOOKS: u32 = 1024;

pub(super) struct Signal {
    number: Pinned<u32>,
    /// What was written last, or will be. Wraps.
    last: u32,
    /// Looks between two questions to the driver; none where the number may never come.
    looks: u32,
}

impl Signal {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self { number: Pinned::new(device, 1)?, last: 0, looks: LOOKS })
    }

    /// Sets the signal behind everything that is on `stream` now.
    ///
    /// # Safety
    /// `stream` must be a stream of the device, which is current, and idle before `self` goes.
    pub(super) unsafe fn set(&mut self, driver: &Driver, stream: Stream) -> Result<(), CudaError> {
        self.last = self.last.wrapping_add(1);
        let status = driver.stream_write.map_or(NOT_SUPPORTED, |write| {
            // SAFETY: the stream is good, as the caller says; four aligned bytes are there until `self` goes.
            unsafe { write(stream, self.number.address(), self.last, WITH_BARRIER) }
        });
        match status {
            0 => Ok(()),
            status => {
                // A driver or a GPU that cannot do it is no harm: then the driver is asked about the stream.
                self.looks = 0;
                if status == NOT_SUPPORTED { Ok(()) } else { driver.check("cuStreamWriteValue32", status) }
            }
        }
    }

    /// Sets the signal by a kernel that is to be launched next: where it must write, and what. It may end without that, or not be
    /// launched at all: what [`Signal::wait`] does not see it learns from the driver, as where streams cannot write numbers.
    pub(super) fn by_kernel(&mut self) -> (DevicePtr, u32) {
        self.last = self.last.wrapping_add(1);
        (self.number.address(), self.last)
    }

    /// Waits until everything before the last signal has been done.
    ///
    /// # Safety
    /// As for [`Signal::set`], of the same stream.
    pub(super) unsafe fn wait(&self, driver: &Driver, stream: Stream) -> Result<(), CudaError> {
        let began = Instant::now();
        loop {
            for _ in 0..self.looks {
                if self.written() == self.last {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            // SAFETY: the stream is good, as the caller says.
            match unsafe { (driver.stream_query)(stream) } {
                NOT_READY if began.elapsed() > AWAKE => std::thread::sleep(NAP),
                NOT_READY => {}
                // Nothing is on it any more, the signal neither.
                status => return driver.check("cuStreamQuery", status),
            }
        }
    }

    fn written(&self) -> u32 {
        // SAFETY: the number is there as long as `self`, aligned, and written whole by the GPU alone.
        unsafe { AtomicU32::from_ptr(self.number.as_ptr()) }.load(Ordering::Acquire)
    }
}
