//! One set of weights out of a trainer's group, to where it waits for its commit.
//!
//! A dictionary's tensors of one dtype come into memory of their own, on the GPU where there is one, because NCCL wants them as they were
//! sent. From there each goes to its place behind the one before. How much will come is known from the last time, or guessed from what
//! the worker was started with; where that was too little, more memory is taken and what has come is moved.

use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::spawn_blocking;

use super::super::checkpoint::Checkpoint;
use super::super::digest::StreamDigests;
use super::super::manifest::{ALIGN, Buckets, Manifest, STREAM_BYTES_MAX, Tensor};
use super::super::room::whole;
use super::super::stage::{Stage, StageError};
use super::super::staged::Staged;
use super::super::tensors::TensorBytes;
use super::Joined;
use super::pickled::groups;
use crate::config::Path;
use crate::memory::{Device, Region, to_usize};
use crate::transport::TransportError;

/// Most dictionaries: one for each layer and one for the rest.
const DICTIONARIES_MAX: u64 = 1 << 16;
/// Most bytes of a dictionary's description.
const DESCRIPTION_BYTES_MAX: u64 = 64 << 20;
/// Bytes of the numbers that come before everything else.
const NUMBER_BYTES: u64 = 8;

/// How long before its time ends staging gives up a broadcast that does not come: the error then names it.
const BEFORE_DEADLINE: Duration = Duration::from_millis(200);

/// What the trainer is called in errors.
const TRAINER: &str = "the trainer";

/// Receives all of it. Dropped half-way, or failed, the group is at an end: the trainer cannot be told to begin again.
pub(in super::super) async fn receive(stage: Stage, joined: Arc<Joined>) -> Result<Staged, StageError> {
    let unended = EndsGroup(Some(&joined));
    stage.progress.takes(Path::Nccl.name());
    let device = stage.paths.device()?;
    let mut stream = Stream { stage: &stage, joined: &joined, landing: memory(device.as_ref(), NUMBER_BYTES)?, device };
    let mut heap = Heap::new(&stage, &joined).await?;
    let dictionaries = stream.number("dictionaries", DICTIONARIES_MAX).await?;
    for _ in 0..dictionaries {
        heap = stream.dictionary(heap).await?;
    }
    unended.ended();
    let staged = heap.staged(&stage).await?;
    joined.expect_bytes(staged.manifest().stream_bytes());
    Ok(staged)
}

/// Ends the group when it is dropped before all of the stream has come.
struct EndsGroup<'a>(Option<&'a Joined>);

impl EndsGroup<'_> {
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for EndsGroup<'_> {
    fn drop(&mut self) {
        if let Some(joined) = self.0 {
            joined.caster.give_up();
        }
    }
}

fn malformed(why: impl Into<String>) -> StageError {
    StageError::Malformed { peer: TRAINER.to_owned(), why: why.into() }
}

fn memory(device: Option<&Arc<Device>>, bytes: u64) -> Result<Arc<Region>, StageError> {
    match device {
        Some(device) => Ok(Region::allocated_on(device, to_usize(bytes))?),
        None => Region::shared(to_usize(bytes)).map_err(|why| StageError::Memory { bytes, why }),
    }
}

/// What comes next, in the order of the wire.
struct Stream<'a> {
    stage: &'a Stage,
    joined: &'a Joined,
    device: Option<Arc<Device>>,
    /// Where a broadcast lands.
    landing: Arc<Region>,
}

impl Stream<'_> {
    /// The next broadcast, which lies at the beginning of `landing` then.
    async fn next(&mut self, what: &'static str, len: u64) -> Result<(), StageError> {
        if len > self.landing.len() {
            let device = self.device.clone();
            self.landing = spawn_blocking(move || memory(device.as_ref(), len)).await??;
        }
        let (done, came) = oneshot::channel();
        let ended = Box::new(move |result| drop(done.send(result)));
        let deadline = self.stage.deadline.checked_sub(BEFORE_DEADLINE).unwrap_or(self.stage.deadline);
        self.joined.caster.cast(&self.landing, 0, len, deadline, ended);
        let came = came.await.unwrap_or(Err(TransportError::Cancelled));
        came.map_err(|why| StageError::Broadcast { what, bytes: len, why })
    }

    async fn number(&mut self, of: &'static str, most: u64) -> Result<u64, StageError> {
        self.next("a number", NUMBER_BYTES).await?;
        let mut bytes = [0; 8];
        self.landing.copy_out(0, &mut bytes)?;
        let number = u64::from_le_bytes(bytes);
        if number > most {
            return Err(malformed(format!("{number} {of}, at most {most} are taken")));
        }
        Ok(number)
    }

    async fn dictionary(&mut self, mut heap: Heap) -> Result<Heap, StageError> {
        let len = self.number("bytes of a description", DESCRIPTION_BYTES_MAX).await?;
        self.next("a description", len).await?;
        let mut description = vec![0; to_usize(len)];
        self.landing.copy_out(0, &mut description)?;
        let groups =
            groups(&description).map_err(|why| malformed(format!("a description that cannot be read: {why}")))?;
        for (_, tensors) in groups {
            let bytes = total(&tensors)?;
            if bytes > 0 {
                self.next("tensors", bytes).await?;
                self.stage.progress.bytes.fetch_add(bytes, Relaxed);
            }
            let landing = Arc::clone(&self.landing);
            heap = spawn_blocking(move || heap.take(&landing, tensors)).await??;
        }
        Ok(heap)
    }
}

fn total(tensors: &[Tensor]) -> Result<u64, StageError> {
    let sum = tensors.iter().try_fold(0_u64, |sum, tensor| sum.checked_add(tensor.bytes()?));
    sum.filter(|&bytes| bytes <= STREAM_BYTES_MAX).ok_or_else(|| malformed("tensors of a size that cannot be"))
}

/// Tensors one behind the other, as they come.
struct Heap {
    region: Arc<Region>,
    used: u64,
    tensors: Vec<Tensor>,
    grow: Box<dyn Fn(u64) -> Result<Arc<Region>, StageError> + Send>,
}

impl Heap {
    async fn new(stage: &Stage, joined: &Joined) -> Result<Self, StageError> {
        let (base, expected, progress) = (stage.base.clone(), joined.expected_bytes(), Arc::clone(&stage.progress));
        let (paths, left) = (stage.paths.clone(), Arc::clone(&stage.left));
        let grow = Box::new(move |bytes: u64| whole(&paths, &left, bytes));
        spawn_blocking(move || {
            let guessed = || {
                let base = Checkpoint::open(FilePath::new(&base?)).ok()?;
                Some(base.manifest().stream_bytes())
            };
            let bytes = expected.or_else(guessed).unwrap_or(1);
            progress.total_bytes.store(bytes, Relaxed);
            Ok(Self { region: grow(bytes.next_multiple_of(ALIGN))?, used: 0, tensors: Vec::new(), grow })
        })
        .await?
    }

    /// Brings tensors that lie one behind the other in `landing` to their places.
    fn take(mut self, landing: &Region, tensors: Vec<Tensor>) -> Result<Self, StageError> {
        let mut from = 0;
        for tensor in tensors {
            let bytes = tensor.bytes().unwrap_or(0);
            let place = self.used.next_multiple_of(ALIGN);
            self.make_room(place + bytes)?;
            if bytes > 0 {
                landing.copy_to(from, &self.region, place, bytes)?;
            }
            (from, self.used) = (from + bytes, place + bytes);
            self.tensors.push(tensor);
        }
        Ok(self)
    }

    fn make_room(&mut self, bytes: u64) -> Result<(), StageError> {
        if bytes <= self.region.len() {
            return Ok(());
        }
        let more = (self.grow)(bytes.max(self.region.len().saturating_mul(2)).next_multiple_of(ALIGN))?;
        if self.used > 0 {
            self.region.copy_to(0, &more, 0, self.used)?;
        }
        self.region = more;
        Ok(())
    }

    async fn staged(self, stage: &Stage) -> Result<Staged, StageError> {
        let (progress, bucket_bytes) = (Arc::clone(&stage.progress), stage.paths.weights.bucket_bytes);
        spawn_blocking(move || {
            let manifest = Arc::new(Manifest::new(self.tensors)?);
            progress.total_bytes.store(manifest.stream_bytes(), Relaxed);
            progress.bytes.store(manifest.stream_bytes(), Relaxed);
            let (mut digests, buckets) =
                (StreamDigests::default(), Buckets::new(manifest.stream_bytes(), bucket_bytes));
            for range in (0..buckets.count()).map(|bucket| buckets.range(bucket)) {
                digests.pass(&manifest, range.clone(), &self.region, range.start)?;
            }
            Ok(Staged::new(manifest, digests.done().to_vec(), Some(self.region)))
        })
        .await?
    }
}
