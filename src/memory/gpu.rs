//! Copies between regions that one GPU can address.

use std::sync::Arc;

use super::region::{AccessError, Region};
use crate::ffi::cuda::{Copier, CopyPiece, CudaError, Device};

/// Longer runs are cut for the kernel, so that all multiprocessors have work.
const CUT_BYTES: u64 = 256 << 10;

/// One run of a copy between two regions.
#[derive(Debug, Clone, Copy)]
pub struct GpuRun<'a> {
    pub src: &'a Region,
    pub src_offset: u64,
    pub dst: &'a Region,
    pub dst_offset: u64,
    pub len: u64,
}

/// Copies scattered runs with one kernel launch, one list at a time.
pub struct GpuCopies {
    copier: Copier,
    pieces: Vec<CopyPiece>,
}

impl GpuCopies {
    /// Copies on `device` with at most `multiprocessors_max` of its multiprocessors.
    pub fn on(device: &Arc<Device>, multiprocessors_max: u32) -> Result<Self, CudaError> {
        Ok(Self { copier: Copier::new(Arc::clone(device), multiprocessors_max)?, pieces: Vec::new() })
    }

    /// Most runs of up to 256 KiB that go into one launch; more take several.
    pub const fn runs_max() -> usize {
        Copier::pieces_max()
    }

    /// Copies all runs and returns when the bytes are there. No destination may overlap another or a source; if one does, its
    /// bytes are a matter of chance.
    pub fn copy<'a>(&mut self, runs: impl IntoIterator<Item = GpuRun<'a>>) -> Result<(), AccessError> {
        self.pieces.clear();
        // Kept until the copy has ended: nothing that is borrowed here can be freed meanwhile.
        let runs: Vec<GpuRun<'a>> = runs.into_iter().collect();
        for run in &runs {
            let (src, dst) = (start(run.src, run.src_offset, run.len)?, start(run.dst, run.dst_offset, run.len)?);
            let mut done = 0;
            while done < run.len {
                let len = (run.len - done).min(CUT_BYTES);
                self.pieces.push(CopyPiece { src: src + done, dst: dst + done, len });
                done += len;
            }
        }
        // SAFETY: every piece was found to lie inside a region of a GPU's memory, which lives as long as `runs` borrows it.
        // Overlaps race among plain bytes of the GPU and harm nothing else.
        Ok(unsafe { self.copier.copy(&self.pieces) }?)
    }
}

fn start(region: &Region, offset: u64, len: u64) -> Result<u64, AccessError> {
    region.check(offset, len)?;
    if region.device().is_none() {
        return Err(AccessError::NotGpu);
    }
    Ok(region.address() + offset)
}
