//! What the two kinds of memory ask of the path.
#![forbid(unsafe_code)]

use std::sync::Arc;

use crate::ffi::nixl::MemoryType;
use crate::memory::{Device, Region};

/// Bounds of one request to NIXL. A cancel waits for those that were begun. Large enough that their cost does not show beside
/// the bytes: host memory moves at 10 GB/s, GPU memory at 300.
const HOST_REQUEST_BYTES_MAX: u64 = 4 << 20;
const GPU_REQUEST_BYTES_MAX: u64 = 64 << 20;
/// What a probe of a peer writes into.
const SCRATCH_BYTES: usize = 4096;
/// The part of UCX that moves GPU memory, in the wheels' folder of parts. Without it UCX takes a GPU's address for one of the
/// processor's, and the first copy ends the process.
const UCX_CUDA: &str = "libuct_cuda";

/// How messages call it.
pub(super) fn name(memory: MemoryType) -> &'static str {
    match memory {
        MemoryType::Host => "host",
        MemoryType::Gpu => "GPU",
    }
}

pub(super) fn request_bytes_max(memory: MemoryType) -> u64 {
    match memory {
        MemoryType::Host => HOST_REQUEST_BYTES_MAX,
        MemoryType::Gpu => GPU_REQUEST_BYTES_MAX,
    }
}

/// The GPU that all regions lie on; `None`: all lie in host memory.
pub(super) fn gpu_of(regions: &[Arc<Region>]) -> Result<Option<Arc<Device>>, &'static str> {
    let first = regions.first().and_then(|region| region.device());
    for device in regions.iter().map(|region| region.device()) {
        match (first, device) {
            (None, None) => {}
            (Some(first), Some(device)) if first.ordinal() == device.ordinal() => {}
            (Some(_), Some(_)) => return Err("its regions lie on several GPUs; start one worker for each"),
            (None, Some(_)) | (Some(_), None) => {
                return Err("its regions lie in both host and GPU memory; start one worker for each");
            }
        }
    }
    Ok(first.cloned())
}

/// A little memory of the same kind.
pub(super) fn scratch(gpu: Option<&Arc<Device>>) -> Result<Arc<Region>, String> {
    match gpu {
        Some(gpu) => Region::allocated_on(gpu, SCRATCH_BYTES).map_err(|error| error.to_string()),
        None => Region::shared(SCRATCH_BYTES).map_err(|error| error.to_string()),
    }
}

/// Refuses GPU memory where the backend, once it is up, cannot move it. `maps` is what the process has mapped.
pub(super) fn check_backend(backend: &str, memory: MemoryType, maps: &str) -> Result<(), String> {
    if backend != "UCX" || memory == MemoryType::Host || maps.contains(UCX_CUDA) {
        return Ok(());
    }
    Err(format!(
        "NIXL's UCX has no {UCX_CUDA} here, so it cannot move GPU memory; install nixl-cu13 or nixl-cu12 as the CUDA of the \
         driver is, and leave UCX_MODULES unset"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ucx_without_its_cuda_part_is_refused_for_gpu_memory_alone() {
        let with = "7f00-7f01 r-xp 00000000 00:00 1 /env/nixl_cu13.libs/ucx/libuct_cuda.so.0.0.0\n";
        let without = "7f00-7f01 r-xp 00000000 00:00 1 /env/nixl_cu13.libs/ucx/libuct_cma.so.0.0.0\n";
        assert_eq!(check_backend("UCX", MemoryType::Gpu, with), Ok(()));
        assert_eq!(check_backend("UCX", MemoryType::Host, without), Ok(()));
        assert_eq!(check_backend("LIBFABRIC", MemoryType::Gpu, without), Ok(()));
        let refused = check_backend("UCX", MemoryType::Gpu, without).unwrap_err();
        assert!(refused.contains("no libuct_cuda") && refused.contains("nixl-cu13"), "{refused}");
    }
}
