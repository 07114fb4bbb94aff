//! Copies between regions that one GPU can address, and digests of what lies there.

use std::sync::Arc;

use super::region::{AccessError, Region};
use super::runs::{ROWS_BYTES_MAX, Rows, Run, RunSlice};
use super::to_u64;
use crate::ffi::cuda::{
    Copier, CopyFew, CopyKind, CopyRows, CopySlot, CudaError, Device, DigestTile, Digester, Reach, SUMS_MAX,
};

/// Longer runs are cut for the kernel, so that all multiprocessors have work.
const CUT_BYTES: u64 = ROWS_BYTES_MAX;

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
    /// The same runs as rows, if somebody has made those.
    pub rows: Option<&'a [Rows]>,
}

/// How the launches of a copy are made.
#[derive(Debug, Clone, Copy)]
pub struct Launches {
    /// Bytes of the first launch. Each takes twice as much as the one before, so that the GPU begins early, and is kept busy while
    /// the next list is made; but every launch costs the processor some 14 us.
    pub first_bytes: u64,
    pub most_bytes: u64,
    /// From so many bytes a slot of the list on, the kernel reads it where the processor made it. Worth it where many
    /// multiprocessors copy: a few of them wait for the bus too often.
    pub in_place_from: u64,
}

impl Launches {
    /// Everything at once: for copies within a GPU that take little longer than a launch.
    pub const ONE: Self = Self { first_bytes: u64::MAX, most_bytes: u64::MAX, in_place_from: 16 << 10 };
}

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
                started.put(&GpuRuns { src, src_offset, dst, dst_offset, runs: RunSlice::whole(&run), rows: None })
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
        if started.filling.slots > 0 {
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
        if let Some(mut rows) = slice.rows {
            while !rows.is_empty() {
                let taken = self.put_some(&places, rows)?;
                if taken == 0 {
                    return Err(CudaError::Kernel("rows are too long".to_owned()).into());
                }
                rows = &rows[taken..];
            }
            return Ok(());
        }
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
            } else {
                runs = &runs[self.put_some(places, runs)?..];
            }
        }
        Ok(())
    }

    /// Puts some of these on the list, and says how many. The first is not too long.
    fn put_some<S: Stretch>(&mut self, places: &Places<'_>, stretches: &[S]) -> Result<usize, AccessError> {
        if self.filling.kind != S::KIND {
            if self.filling.slots > 0 {
                self.launch()?;
            }
            self.filling.kind = S::KIND;
        }
        let list = self.copies.copiers[self.copies.next].list();
        let taken = self.filling.take(list, places, stretches)?;
        if self.filling.is_full(list.len()) {
            self.launch()?;
        }
        Ok(taken)
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
        let Filling { kind, slots, bytes, longest, launch_bytes, first } = self.filling;
        let in_place = bytes / to_u64(slots).max(1) >= launches.in_place_from;
        let few = first.get(..slots).filter(|_| kind == CopyKind::Runs).and_then(|runs| CopyFew::new(runs, longest));
        let copier = &mut copiers[*next];
        match few {
            // SAFETY: every run or row was found to lie inside a region of a GPU's memory, which is borrowed for longer than
            // `started` takes; and when that ends, this has been waited for. Overlaps race among plain bytes of the GPU and harm
            // nothing else.
            Some(few) => unsafe { copier.start_few(few) },
            // SAFETY: as above, and all of it is of one kind.
            None => unsafe { copier.start(kind, slots, longest, in_place) },
        }?;
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
    kind: CopyKind,
    slots: usize,
    bytes: u64,
    longest: u64,
    /// The list is launched once it has so many bytes.
    launch_bytes: u64,
    /// The list's first slots again: the list itself is slow to read.
    first: [CopySlot; CopyFew::RUNS_MAX],
}

impl Filling {
    fn new(launch_bytes: u64) -> Self {
        let first = [CopySlot::default(); CopyFew::RUNS_MAX];
        Self { kind: CopyKind::Runs, slots: 0, bytes: 0, longest: 0, launch_bytes, first }
    }

    fn is_full(&self, slots_max: usize) -> bool {
        self.slots + self.kind.slots() > slots_max || self.bytes >= self.launch_bytes
    }

    /// Puts stretches on the list up to where it is full, or to one that must be cut, and says how many. All of them were found to
    /// lie where they may when this returns `Ok`: there are many thousand, so their outermost ends are looked at.
    fn take<S: Stretch>(
        &mut self,
        list: &mut [CopySlot],
        places: &Places<'_>,
        stretches: &[S],
    ) -> Result<usize, AccessError> {
        let (mut src_end, mut dst_end, mut taken, mut bytes, mut longest) = (0, 0, 0, self.bytes, self.longest);
        // Each item once and whole: the list lies past the caches.
        for (slots, stretch) in list[self.slots..].chunks_exact_mut(S::KIND.slots()).zip(stretches) {
            let len = stretch.bytes();
            if len > CUT_BYTES || bytes >= self.launch_bytes {
                break;
            }
            stretch.write(places, slots);
            let ends = stretch.ends();
            (src_end, dst_end) = (src_end.max(ends.0), dst_end.max(ends.1));
            (bytes, longest) = (bytes + len, longest.max(len));
            taken += 1;
        }
        let first = self.first.get_mut(self.slots..).unwrap_or_default();
        for (slots, stretch) in first.chunks_exact_mut(S::KIND.slots()).zip(&stretches[..taken]) {
            stretch.write(places, slots);
        }
        (self.slots, self.bytes, self.longest) = (self.slots + taken * S::KIND.slots(), bytes, longest);
        if src_end <= places.src_room && dst_end <= places.dst_room {
            return Ok(taken);
        }
        stretches[..taken].iter().try_for_each(|stretch| places.check(stretch))?;
        Ok(taken)
    }
}

/// What one item of a list copies, of no more than [`CUT_BYTES`].
trait Stretch {
    const KIND: CopyKind;

    /// Writes the slots of its item.
    fn write(&self, places: &Places<'_>, slots: &mut [CopySlot]);

    fn bytes(&self) -> u64;

    fn starts(&self) -> (u64, u64);

    /// The first bytes behind it, at both ends.
    fn ends(&self) -> (u64, u64);
}

impl Stretch for Run {
    const KIND: CopyKind = CopyKind::Runs;

    fn write(&self, places: &Places<'_>, slots: &mut [CopySlot]) {
        debug_assert!(self.len <= CUT_BYTES, "cut by whoever asks");
        let (src, dst) = (places.src.wrapping_add(self.src), places.dst.wrapping_add(self.dst));
        let len = u32::try_from(self.len).unwrap_or(0);
        // What lies in its region fits: those were looked at. What does not is never launched.
        slots[0] = CopySlot::run(src, dst, len).unwrap_or_default();
    }

    fn bytes(&self) -> u64 {
        self.len
    }

    fn starts(&self) -> (u64, u64) {
        (self.src, self.dst)
    }

    fn ends(&self) -> (u64, u64) {
        (self.src.saturating_add(self.len), self.dst.saturating_add(self.len))
    }
}

impl Stretch for Rows {
    const KIND: CopyKind = CopyKind::Rows;

    fn write(&self, places: &Places<'_>, slots: &mut [CopySlot]) {
        let (src, dst) = (places.src.wrapping_add(self.src), places.dst.wrapping_add(self.dst));
        let Self { len, rows, src_step, dst_step, .. } = *self;
        slots.copy_from_slice(&CopySlot::rows(&CopyRows { src, dst, len, rows, src_step, dst_step }));
    }

    fn bytes(&self) -> u64 {
        Self::bytes(self)
    }

    fn starts(&self) -> (u64, u64) {
        (self.src, self.dst)
    }

    fn ends(&self) -> (u64, u64) {
        Self::ends(self)
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
        let ends = (src.saturating_add(src_room), dst.saturating_add(dst_room));
        if CopySlot::run(ends.0, ends.1, 0).is_none() {
            return Err(CudaError::Kernel("an address has more than 48 bits".to_owned()).into());
        }
        Ok(Self { slice, src, src_room, dst, dst_room })
    }

    fn check(&self, stretch: &impl Stretch) -> Result<(), AccessError> {
        let GpuRuns { src, src_offset, dst, dst_offset, .. } = self.slice;
        let (starts, ends) = (stretch.starts(), stretch.ends());
        src.check(src_offset.saturating_add(starts.0), ends.0 - starts.0)?;
        Ok(dst.check(dst_offset.saturating_add(starts.1), ends.1 - starts.1)?)
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
        let mut on_bus = false;
        for (number, region, tile) in tiles {
            let address = seen(region, tile.offset, tile.reach().unwrap_or(u64::MAX))?;
            on_bus |= region.device().is_none();
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
        let reach = if on_bus { Reach::Bus } else { Reach::Memory };
        // SAFETY: every tile was found to lie inside a region of a GPU's memory, or of host memory that is fixed for one, which
        // `tiles` borrows for longer than this call takes, and to name one of `sums`.
        Ok(unsafe { self.digester.add(&self.tiles, sums, reach) }?)
    }
}

/// Where a kernel that only reads finds it.
fn seen(region: &Region, offset: u64, len: u64) -> Result<u64, AccessError> {
    region.check(offset, len)?;
    region.seen_from_gpu().map(|(_, address)| address + offset).ok_or(AccessError::NotGpu)
}

fn start(region: &Region, offset: u64, len: u64) -> Result<u64, AccessError> {
    region.check(offset, len)?;
    if region.device().is_none() {
        return Err(AccessError::NotGpu);
    }
    Ok(region.address() + offset)
}
