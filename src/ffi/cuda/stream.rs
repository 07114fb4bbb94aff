//! How streams of ours are made: none waits for another, and what is on them comes after what the model computes.

use std::ffi::{c_int, c_uint};

use super::driver::{CudaError, Driver, Stream};

/// Does not wait for the default stream either, which is the engine's.
const NON_BLOCKING: c_uint = 1;

/// A stream of the lowest priority that there is, or of the usual one where the driver cannot say. To be called with a context
/// current; the caller destroys it.
///
/// Where blocks of two kernels wait for a multiprocessor, the driver starts those of the higher priority first. The usual
/// priority is the lowest of today's GPUs, so this says what holds already there, and keeps it so where it is not. Copies of KV,
/// of weights and digests share it: all of them run while the engine serves, and where it is paused nobody else has work.
pub(super) fn create(driver: &Driver) -> Result<Stream, CudaError> {
    let mut stream: Stream = std::ptr::null_mut();
    if let (Some(create), Some(lowest)) = (driver.stream_create_below, lowest(driver)) {
        // SAFETY: writes one handle, which is the caller's.
        let status = unsafe { create(&raw mut stream, NON_BLOCKING, lowest) };
        return driver.check("cuStreamCreateWithPriority", status).map(|()| stream);
    }
    // SAFETY: as above.
    let status = unsafe { (driver.stream_create)(&raw mut stream, NON_BLOCKING) };
    driver.check("cuStreamCreate", status).map(|()| stream)
}

fn lowest(driver: &Driver) -> Option<c_int> {
    let (mut lowest, mut highest) = (0, 0);
    let ask = driver.stream_priorities?;
    // SAFETY: writes two ints.
    (unsafe { ask(&raw mut lowest, &raw mut highest) } == 0).then_some(lowest)
}
