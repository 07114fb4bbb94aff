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

/// What one launch of a copy takes. Each takes twice as much as the one before, so that the GPU begins early, and is kept busy while
/// the next list is made; but every launch costs the processor some 14 us.
#[derive(Debug, Clone, Copy)]
pub struct LaunchBytes {
    pub first: u64,
    pub most: u64,
}

impl LaunchBytes {
    /// Everything at once: for copies that take little longer than a launch.
    pub const WHOLE: Self = Self { first: u64::MAX, most: u64::MAX };
}

/// Lists in the making and at work.
const LAUNCHES: usize = 2;

/// Copies scattered runs with a few kernel launches, one list of runs at a time.
pub struct GpuCopies {
    copiers: [Copier; LAUNCHES],
    next: usize,
    pieces: Vec<CopyPiece>,
    launch_bytes: LaunchBytes,
}

impl GpuCopies {
    /// Copies on `device` with at most `multiprocessors_max` of its multiprocessors.
    pub fn on(device: &Arc<Device>, multiprocessors_max: u32, launch_bytes: LaunchBytes) -> Result<Self, CudaError> {
        let at_once = if launch_bytes.most == u64::MAX { 1 } else { 2 };
        let copier = || Copier::new(device, multiprocessors_max.div_ceil(at_once));
        Ok(Self { copiers: [copier()?, copier()?], next: 0, pieces: Vec::new(), launch_bytes })
    }

    /// Copies all runs and returns when the bytes are there. No destination may overlap another or a source; if one does, its
    /// bytes are a matter of chance.
    pub fn copy<'a>(&mut self, runs: impl IntoIterator<Item = GpuRun<'a>>) -> Result<(), AccessError> {
        // Waits when dropped: whichever way this ends, nothing that is borrowed here is used afterwards.
        let mut started = Started(self);
        started.start(runs)?;
        Ok(started.0.wait()?)
    }

    fn wait(&mut self) -> Result<(), CudaError> {
        let [first, second] = &mut self.copiers;
        let (first, second) = (first.wait(), second.wait());
        first.and(second)
    }
}

struct Started<'c>(&'c mut GpuCopies);

impl Started<'_> {
    fn start<'a>(&mut self, runs: impl IntoIterator<Item = GpuRun<'a>>) -> Result<(), AccessError> {
        self.0.pieces.clear();
        let LaunchBytes { first, most } = self.0.launch_bytes;
        let (mut bytes, mut launch_bytes) = (0, first);
        let (mut from, mut to) = (None, None);
        for run in runs {
            let src = Window::place(&mut from, run.src, run.src_offset, run.len)?;
            let dst = Window::place(&mut to, run.dst, run.dst_offset, run.len)?;
            let mut done = 0;
            while done < run.len {
                let len = (run.len - done).min(CUT_BYTES);
                self.0.pieces.push(CopyPiece { src: src + done, dst: dst + done, len });
                done += len;
                bytes += len;
                if bytes >= launch_bytes || self.0.pieces.len() == Copier::pieces_max() {
                    self.launch()?;
                    (bytes, launch_bytes) = (0, launch_bytes.saturating_mul(2).min(most));
                }
            }
        }
        if self.0.pieces.is_empty() { Ok(()) } else { self.launch() }
    }

    fn launch(&mut self) -> Result<(), AccessError> {
        let GpuCopies { copiers, next, pieces, .. } = &mut *self.0;
        // SAFETY: every piece was found to lie inside a region of a GPU's memory, which is borrowed for longer than `copy` takes;
        // and when that ends, this has been waited for. Overlaps race among plain bytes of the GPU and harm nothing else.
        unsafe { copiers[*next].start(pieces) }?;
        *next = (*next + 1) % LAUNCHES;
        pieces.clear();
        Ok(())
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        // What failed has been told, or is about to be by a copier that is dropped.
        let _ = self.0.wait();
    }
}

/// A region of a GPU's memory as the last run met it: there are many thousand runs, and nearly all meet the one before's.
struct Window<'a> {
    region: &'a Region,
    address: u64,
    len: u64,
}

impl<'a> Window<'a> {
    /// Where a run starts, for the GPU.
    fn place(last: &mut Option<Self>, region: &'a Region, offset: u64, len: u64) -> Result<u64, AccessError> {
        match last {
            Some(window) if std::ptr::eq(window.region, region) => window.at(offset, len),
            _ => last.insert(Self { region, address: start(region, 0, 0)?, len: region.len() }).at(offset, len),
        }
    }

    fn at(&self, offset: u64, len: u64) -> Result<u64, AccessError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(self.address + offset),
            _ => start(self.region, offset, len),
        }
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
