//! Bytes with an owner.
//!
//! A [`Region`] is an address, a length, a [`MemoryKind`] and whatever keeps the memory alive. Everything in it is reached
//! by offset and checked against its length. Another process may write a region at any moment, so nothing here ever hands
//! out a `&[u8]` or `&mut [u8]` over one: bytes are copied in, copied out, or read as words through a small buffer. What a
//! torn read yields is for the layers above to judge (KV-3, KV-4).

mod bounce;
mod gpu;
mod host_free;
mod mapping;
mod region;
mod registered;
mod row_digest;
mod runs;
mod stream;
mod words;

// Named in what regions are made of.
pub use crate::ffi::cuda::{CudaError, Device, allocated_bytes as gpu_bytes_taken};
pub use gpu::{GpuCopies, GpuDigests, GpuRun, GpuRuns, Launches, Tile};
pub use host_free::host_free_bytes;
pub use region::{AccessError, Backing, MemoryKind, OutOfRange, Region, RegionOptions};
pub use row_digest::{row, row_key};
pub use runs::{Rows, Run, RunSlice, in_rows};

// Offsets and lengths are `u64` on the wire and in run lists, and `usize` where they meet an address. On the one width we
// build for the two are the same numbers.
const _: () = assert!(size_of::<usize>() == size_of::<u64>(), "pdlink needs 64-bit addresses");

/// `len` as an offset-sized number. Lossless, by the assertion above.
pub fn to_u64(len: usize) -> u64 {
    len as u64
}

/// `len` as an address-sized number. Lossless, by the assertion above.
#[allow(clippy::cast_possible_truncation, reason = "usize is 64 bits wide, asserted in this module")]
pub fn to_usize(len: u64) -> usize {
    len as usize
}
