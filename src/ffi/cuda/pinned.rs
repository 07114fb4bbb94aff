//! Host memory that a GPU reads and writes.

use std::ffi::{c_uint, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;

use super::device::Device;
use super::driver::{CudaError, DevicePtr};

/// Reachable from every context, and from the GPU at the same address.
const PORTABLE_MAPPED: c_uint = 1 | 2;
/// Past the processor's caches: it need not get back a line that the GPU has read before it writes it again.
const WRITE_COMBINED: c_uint = 4;

/// Host memory that the GPU reads and writes directly. For plain numbers and structures of them.
pub(super) struct Pinned<T> {
    device: Arc<Device>,
    items: *mut T,
    count: usize,
}

impl<T: Copy + Default> Pinned<T> {
    pub(super) fn new(device: &Arc<Device>, count: usize) -> Result<Self, CudaError> {
        Self::of_kind(device, count, PORTABLE_MAPPED)
    }

    /// What the processor writes in order and hardly ever reads: that is slow.
    pub(super) fn written_in_order(device: &Arc<Device>, count: usize) -> Result<Self, CudaError> {
        Self::of_kind(device, count, PORTABLE_MAPPED | WRITE_COMBINED)
    }

    fn of_kind(device: &Arc<Device>, count: usize, kind: c_uint) -> Result<Self, CudaError> {
        let mut memory: *mut c_void = std::ptr::null_mut();
        device.current(|driver| {
            // SAFETY: writes one pointer to that many bytes of page-aligned memory, freed in `drop`.
            let status = unsafe { (driver.host_allocate)(&raw mut memory, count * size_of::<T>(), kind) };
            driver.check("cuMemHostAlloc", status)
        })?;
        let items = memory.cast::<T>();
        // SAFETY: there are so many places, aligned to a page, and nobody else's.
        let places = unsafe { std::slice::from_raw_parts_mut(memory.cast::<MaybeUninit<T>>(), count) };
        places.fill(MaybeUninit::new(T::default()));
        Ok(Self { device: Arc::clone(device), items, count })
    }

    pub(super) fn address(&self) -> DevicePtr {
        self.items.addr() as DevicePtr
    }

    pub(super) fn as_ptr(&self) -> *mut T {
        self.items
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
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
