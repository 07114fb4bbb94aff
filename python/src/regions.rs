//! Python's memory as regions, vLLM's KV and a trainer's weights: the one place of this crate that has unsafe code.

use std::ptr::NonNull;
use std::sync::Arc;

use pdlink::ffi::cuda::Device;
use pdlink::memory::{Region, to_u64};
use pdlink::transport::StreamMark;
use pyo3::prelude::*;

use crate::errors;

/// One stretch of memory: its address, its length in bytes, the Python object that owns it, and its GPU if it is on one.
pub(crate) type Memory = (usize, usize, Py<PyAny>, Option<i32>);

/// Borrows each stretch for as long as its region lives.
pub(crate) fn borrow(memory: Vec<Memory>) -> PyResult<Vec<Arc<Region>>> {
    memory.into_iter().map(one).collect()
}

/// A mark behind all that PyTorch has put on this stream of the GPU, by `torch.cuda.Stream.cuda_stream`.
pub(crate) fn mark(device: &Arc<Device>, stream: usize) -> PyResult<StreamMark> {
    let stream = std::ptr::with_exposed_provenance_mut(stream);
    // SAFETY: the caller asks PyTorch for the stream that it uses now, of the GPU that the KV is on: PyTorch keeps its streams
    // for as long as the process lives, in the primary context.
    let mark = unsafe { StreamMark::behind(device, stream) };
    mark.map_err(|error| errors::settings("a mark in the engine's stream", &error))
}

fn one((address, len, owner, gpu): Memory) -> PyResult<Arc<Region>> {
    let empty = || errors::settings("a region", &"it has no bytes");
    let ptr = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(address)).filter(|_| len > 0);
    let ptr = ptr.ok_or_else(empty)?;
    let owner = Box::new(owner);
    let Some(gpu) = gpu else {
        // SAFETY: the caller takes address and length from one torch storage in host memory and passes that storage as
        // the owner. The region holds a reference to it, and torch never moves or shrinks a storage that is referenced: the
        // connector lets go of the link before vLLM's sleep mode takes the pages away, and a trainer's tensors are only
        // read. No Rust code makes a reference into it.
        return Ok(unsafe { Region::borrowed(ptr, len, owner) });
    };
    let device = Device::open(gpu).map_err(|error| errors::settings("a region", &error))?;
    // SAFETY: as above, of a storage on that GPU, whose memory PyTorch keeps in the same context.
    let region = unsafe { Region::on_device(device, to_u64(address), to_u64(len), owner) };
    region.ok_or_else(empty)
}
