//! Copies between regions that one GPU can address, and digests of what lies there.

use std::sync::Arc;

use super::region::{AccessError, Region};
use super::runs::{Run, RunSlice};
use super::to_u64;
use crate::ffi::cuda::{Copier, CopyPiece, CudaError, Device, DigestTile, Digester, SUMS_MAX};

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

/// Runs of a copy between two places: their offsets count from there.
#[derive(Debug, Clone, Copy)]
pub struct GpuRuns<'a> {
    pub src: &'a Region,
    pub src_offset: u64,
    pub dst: &'a Region,
    pub dst_offset: u64,
    pub runs: RunSlice<'a>,
}

/// How the launches of a copy are made.
#[derive(Debug, Clone, Copy)]
pub struct Launches {
    /// Bytes of the first launch. Each takes twice as much as the one before, so that the GPU begins early, and is kept busy while
    /// the next list is made; but every launch costs the processor some 14 us.
    pub first_bytes: u64,
    pub most_bytes: u64,
    /// Whether the kernel reads lists of runs of 4 KiB and more where the processor made them. Worth it where many
    /// multiprocessors copy: a few of them wait for the bus too often.
    pub in_place: bool,
}

impl Launches {
    /// Everything at once: for copies within a GPU that take little longer than a launch.
    pub const ONE: Self = Self { first_bytes: u64::MAX, most_bytes: u64::MAX, in_place: true };
}

/// Shorter runs are more than the bus is asked for one by one. Measured from 4 KiB on: 64 MiB of those take 47 us with their list in
/// place, 61 with a list on the GPU, 43 in one run.
const IN_PLACE_RUN_BYTES_MIN: u64 = 4 << 10;

/// Lists in the making and at work.
const LAUNCHES: usize = 2;

/// Copies scattered runs with a few kernel launches, one list of runs at a time.
pub struct GpuCopies {
    copiers: [Copier; LAUNCHES],
    next: usize,
    launches: Launches,
}

impl GpuCopies {
    /// Copies on `device` with at most `multiprocessors_max` of its multiprocessors.
    pub fn on(device: &Arc<Device>, multiprocessors_max: u32, launches: Launches) -> Result<Self, CudaError> {
        let at_once = if launches.most_bytes == u64::MAX { 1 } else { 2 };
        let copier = || Copier::new(device, multiprocessors_max.div_ceil(at_once));
        Ok(Self { copiers: [copier()?, copier()?], next: 0, launches })
    }

    /// Copies all runs and returns when the bytes are there. No destination may overlap another or a source; if one does, its
    /// bytes are a matter of chance.
    pub fn copy<'a>(&mut self, runs: impl IntoIterator<Item = GpuRun<'a>>) -> Result<(), AccessError> {
        self.started(|started| {
            runs.into_iter().try_for_each(|GpuRun { src, src_offset, dst, dst_offset, len }| {
                let run = [Run { src: 0, dst: 0, len }];
                started.put(&GpuRuns { src, src_offset, dst, dst_offset, runs: RunSlice::whole(&run) })
            })
        })
    }

    /// As [`GpuCopies::copy`], of runs that lie in memory already: several times as fast for the processor.
    pub fn copy_slices<'a>(&mut self, slices: impl IntoIterator<Item = GpuRuns<'a>>) -> Result<(), AccessError> {
        self.started(|started| slices.into_iter().try_for_each(|slice| started.put(&slice)))
    }

    fn started(
        &mut self,
        put_all: impl FnOnce(&mut Started<'_>) -> Result<(), AccessError>,
    ) -> Result<(), AccessError> {
        let filling = Filling::new(self.launches.first_bytes);
        // Waits when dropped: whichever way this ends, nothing that is borrowed here is used afterwards.
        let mut started = Started { copies: self, filling };
        put_all(&mut started)?;
        if started.filling.count > 0 {
            started.launch()?;
        }
        Ok(started.copies.wait()?)
    }

    fn wait(&mut self) -> Result<(), CudaError> {
        let [first, second] = &mut self.copiers;
        let (first, second) = (first.wait(), second.wait());
        first.and(second)
    }
}

struct Started<'c> {
    copies: &'c mut GpuCopies,
    filling: Filling,
}

impl Started<'_> {
    fn put(&mut self, slice: &GpuRuns<'_>) -> Result<(), AccessError> {
        let places = Places::of(slice)?;
        let (first, between, last) = slice.runs.split();
        self.put_runs(&places, first.as_slice())?;
        self.put_runs(&places, between)?;
        self.put_runs(&places, last.as_slice())
    }

    fn put_runs(&mut self, places: &Places<'_>, mut runs: &[Run]) -> Result<(), AccessError> {
        while let Some(first) = runs.first() {
            if first.len > CUT_BYTES {
                self.put_long(places, *first)?;
                runs = &runs[1..];
                continue;
            }
            let list = self.copies.copiers[self.copies.next].list();
            let taken = self.filling.take(list, places, runs)?;
            runs = &runs[taken..];
            if self.filling.is_full(list) {
                self.launch()?;
            }
        }
        Ok(())
    }

    fn put_long(&mut self, places: &Places<'_>, run: Run) -> Result<(), AccessError> {
        let mut done = 0;
        while done < run.len {
            let len = (run.len - done).min(CUT_BYTES);
            let shorter = Run { src: run.src.saturating_add(done), dst: run.dst.saturating_add(done), len };
            self.put_runs(places, &[shorter])?;
            done += len;
        }
        Ok(())
    }

    fn launch(&mut self) -> Result<(), AccessError> {
        let GpuCopies { copiers, next, launches } = &mut *self.copies;
        let Filling { count, bytes, longest, launch_bytes } = self.filling;
        let in_place = launches.in_place && bytes / to_u64(count).max(1) >= IN_PLACE_RUN_BYTES_MIN;
        // SAFETY: every piece was found to lie inside a region of a GPU's memory, which is borrowed for longer than `started`
        // takes; and when that ends, this has been waited for. Overlaps race among plain bytes of the GPU and harm nothing else.
        unsafe { copiers[*next].start(count, longest, in_place) }?;
        *next = (*next + 1) % LAUNCHES;
        self.filling = Filling::new(launch_bytes.saturating_mul(2).min(launches.most_bytes));
        Ok(())
    }
}

impl Drop for Started<'_> {
    fn drop(&mut self) {
        // What failed has been told, or is about to be by a copier that is dropped.
        let _ = self.copies.wait();
    }
}

/// How far the list of the next launch has been made.
struct Filling {
    count: usize,
    bytes: u64,
    longest: u64,
    /// The list is launched once it has so many bytes.
    launch_bytes: u64,
}

impl Filling {
    fn new(launch_bytes: u64) -> Self {
        Self { count: 0, bytes: 0, longest: 0, launch_bytes }
    }

    fn is_full(&self, list: &[CopyPiece]) -> bool {
        self.count == list.len() || self.bytes >= self.launch_bytes
    }

    /// Puts runs on the list up to where it is full, or to a run that must be cut, and says how many. All of them were found to
    /// lie where they may when this returns `Ok`: there are many thousand, so their outermost ends are looked at.
    fn take(&mut self, list: &mut [CopyPiece], places: &Places<'_>, runs: &[Run]) -> Result<usize, AccessError> {
        let (mut src_end, mut dst_end) = (0, 0);
        let before = self.count;
        for (piece, run) in list[before..].iter_mut().zip(runs) {
            if run.len > CUT_BYTES || self.bytes >= self.launch_bytes {
                break;
            }
            let (src, dst) = (places.src.wrapping_add(run.src), places.dst.wrapping_add(run.dst));
            *piece = CopyPiece { src, dst, len: run.len };
            src_end = src_end.max(run.src.saturating_add(run.len));
            dst_end = dst_end.max(run.dst.saturating_add(run.len));
            self.bytes += run.len;
            self.longest = self.longest.max(run.len);
            self.count += 1;
        }
        let taken = self.count - before;
        if src_end <= places.src_room && dst_end <= places.dst_room {
            return Ok(taken);
        }
        runs[..taken].iter().try_for_each(|run| places.check(run))?;
        Ok(taken)
    }
}

/// Where the runs of a slice count from, for the GPU, and how many bytes there are from there on.
struct Places<'a> {
    slice: &'a GpuRuns<'a>,
    src: u64,
    src_room: u64,
    dst: u64,
    dst_room: u64,
}

impl<'a> Places<'a> {
    fn of(slice: &'a GpuRuns<'a>) -> Result<Self, AccessError> {
        let (src, dst) = (start(slice.src, slice.src_offset, 0)?, start(slice.dst, slice.dst_offset, 0)?);
        let (src_room, dst_room) = (slice.src.len() - slice.src_offset, slice.dst.len() - slice.dst_offset);
        Ok(Self { slice, src, src_room, dst, dst_room })
    }

    fn check(&self, run: &Run) -> Result<(), AccessError> {
        let GpuRuns { src, src_offset, dst, dst_offset, .. } = self.slice;
        src.check(src_offset.saturating_add(run.src), run.len)?;
        Ok(dst.check(dst_offset.saturating_add(run.dst), run.len)?)
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
    /// Most sums of one call.
    pub const SUMS_MAX: usize = SUMS_MAX;

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
