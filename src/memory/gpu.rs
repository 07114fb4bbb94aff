//! Copies between regions that one GPU can address, and digests of what lies there.

use std::sync::Arc;

use super::region::{AccessError, Region};
use crate::ffi::cuda::{Copier, CopyPiece, CudaError, Device, DigestTile, Digester};

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
        Ok(Self { copier: Copier::new(device, multiprocessors_max)?, pieces: Vec::new() })
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

/// Rows of equal length in a region: `heads` by `tokens`.
#[derive(Debug, Clone, Copy)]
pub struct Tile {
    pub offset: u64,
    pub head_stride: u64,
    pub token_stride: u64,
    pub heads: u32,
    pub tokens: u32,
    /// Place of the first row, in the digest.
    pub plane: u32,
    pub token: u32,
    /// Bytes of a row.
    pub content: u64,
}

impl Tile {
    /// Bytes from the first row's first to the last row's last; `None`: too many to count.
    fn reach(&self) -> Option<u64> {
        let steps = |stride: u64, count: u32| stride.checked_mul(u64::from(count.checked_sub(1)?));
        let (heads, tokens) = (steps(self.head_stride, self.heads)?, steps(self.token_stride, self.tokens)?);
        heads.checked_add(tokens)?.checked_add(self.content)
    }
}

/// Digests rows of KV with one kernel launch, one list at a time.
pub struct GpuDigests {
    digester: Digester,
    tiles: Vec<DigestTile>,
}

impl GpuDigests {
    pub fn on(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self { digester: Digester::new(device)?, tiles: Vec::new() })
    }

    /// Adds the digest of each tile to the sum whose number stands beside it.
    pub fn add<'a>(
        &mut self,
        tiles: impl IntoIterator<Item = (usize, &'a Region, Tile)>,
        sums: &mut [u64],
    ) -> Result<(), AccessError> {
        self.tiles.clear();
        for (number, region, tile) in tiles {
            let address = start(region, tile.offset, tile.reach().unwrap_or(u64::MAX))?;
            let sum = u32::try_from(number).ok().filter(|_| number < sums.len());
            let sum = sum.ok_or_else(|| CudaError::Kernel(format!("there is no sum number {number}")))?;
            let Tile { head_stride, token_stride, heads, tokens, plane, token, .. } = tile;
            let content = u32::try_from(tile.content).map_err(|_| CudaError::Kernel("a row is too long".to_owned()))?;
            self.tiles.push(DigestTile {
                address,
                head_stride,
                token_stride,
                heads,
                tokens,
                plane,
                token,
                content,
                sum,
            });
        }
        // SAFETY: every tile was found to lie inside a region of a GPU's memory, which `tiles` borrows for longer than this
        // call takes, and to name one of `sums`.
        Ok(unsafe { self.digester.add(&self.tiles, sums) }?)
    }
}

fn start(region: &Region, offset: u64, len: u64) -> Result<u64, AccessError> {
    region.check(offset, len)?;
    if region.device().is_none() {
        return Err(AccessError::NotGpu);
    }
    Ok(region.address() + offset)
}
