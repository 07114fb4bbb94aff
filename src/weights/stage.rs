//! Gets a whole set of weights to where it waits for its commit, and checks it: from another process or from a folder.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::task::spawn_blocking;

use super::checkpoint::{Checkpoint, CheckpointError};
use super::digest::{StreamDigests, TensorDigest, WeightsDigest};
use super::manifest::{Buckets, Manifest, ManifestError};
use super::paths::Paths;
use super::pull::Pull;
use super::staged::Staged;
use super::tensors::{Packer, ReadError, TensorBytes, lay};
use crate::config::Staging;
use crate::control::{ControlError, WeightSource, WeightsOffer};
use crate::memory::{AccessError, CudaError, Device, Region, RegionOptions, host_free_bytes, to_usize};
use crate::transport::TransportError;

/// Bytes that are read at once where nothing is kept.
const READ_BYTES: u64 = 16 << 20;

/// Why weights were not staged. Each names what it was about.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    #[error("the sender cannot be reached or was lost: {0}")]
    Sender(#[from] ControlError),
    #[error("the sender {peer} refused: {why}")]
    Refused { peer: String, why: String },
    #[error("the sender {peer} said what cannot be: {why}")]
    Malformed { peer: String, why: String },
    #[error("the sender's manifest: {0}")]
    Manifest(#[from] ManifestError),
    #[error("the weights take {bytes} bytes of {memory} memory, and {available} are available; {mend}")]
    TooLarge { bytes: u64, available: u64, memory: &'static str, mend: &'static str },
    #[error("weights.staging = \"device\" needs a GPU, and this worker has none; set it to \"host\"")]
    NoGpu,
    #[error("memory on a GPU: {0}")]
    Gpu(#[from] CudaError),
    #[error("no memory for {bytes} bytes of weights: {why}")]
    Memory { bytes: u64, why: io::Error },
    #[error("no path to the sender {peer}: {why}")]
    Path { peer: String, why: TransportError },
    #[error("bucket {bucket} of {buckets} did not come from {peer}: {why}")]
    Copy { peer: String, bucket: u64, buckets: u64, why: TransportError },
    #[error("tensor `{tensor}` is not what {peer} sent: its digest differs")]
    Digest { peer: String, tensor: String },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("staged memory: {0}")]
    Access(#[from] AccessError),
    #[error("the task that did it ended: {0}")]
    Task(#[from] tokio::task::JoinError),
    #[error("it was given up")]
    GivenUp,
}

/// How far a worker's staging is.
#[derive(Debug, Default)]
pub(super) struct StageProgress {
    pub(super) bytes: AtomicU64,
    pub(super) total_bytes: AtomicU64,
    path: Mutex<Option<&'static str>>,
}

impl StageProgress {
    pub(super) fn path(&self) -> Option<&'static str> {
        *self.path.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn takes(&self, path: &'static str) {
        *self.path.lock().unwrap_or_else(PoisonError::into_inner) = Some(path);
    }
}

/// One staging, whatever the source.
pub(super) struct Stage {
    pub(super) offer: WeightsOffer,
    /// What the worker was started with, where that is to be staged like anything else.
    pub(super) base: Option<String>,
    pub(super) paths: Paths,
    pub(super) progress: Arc<StageProgress>,
    /// By when all of it must be there.
    pub(super) deadline: Instant,
}

/// Where a stream is staged: whole, or bucket by bucket.
pub(super) struct Room {
    pub(super) region: Arc<Region>,
    lie: Lie,
    buckets: Buckets,
}

/// Where buckets lie in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    Whole,
    /// In the one half and in the other, in turn.
    InTurn,
    /// From this byte on, each behind what the last one left over.
    Behind(u64),
}

impl Room {
    /// May take a while: much memory is made ready.
    fn of(paths: &Paths, buckets: Buckets, stream_bytes: u64) -> Result<Self, StageError> {
        let gpu = paths.device()?;
        // Weights that an engine could take as they come, but come from a folder, are staged like any others.
        let staging = match paths.weights.staging {
            Staging::None if gpu.is_some() || paths.streams => Staging::Host,
            staging => staging,
        };
        let lie = if staging == Staging::None { Lie::InTurn } else { Lie::Whole };
        let bytes = if lie == Lie::Whole { stream_bytes.max(1) } else { buckets.bucket_bytes() * 2 };
        let most = paths.weights.staging_bytes_max.unwrap_or(u64::MAX);
        let region = match (staging, &gpu) {
            (Staging::Device, None) => return Err(StageError::NoGpu),
            (Staging::Device, Some(gpu)) => {
                let mend = "let vLLM leave more (--gpu-memory-utilization), set weights.staging = \"host\", or raise \
                            weights.staging_bytes_max";
                fits(bytes, gpu.free_bytes()?.min(most), "GPU", mend)?;
                Region::allocated_on(gpu, to_usize(bytes))?
            }
            _ => {
                let mend = "free some, set weights.staging = \"none\", or raise weights.staging_bytes_max";
                fits(bytes, host_free_bytes(Path::new("/")).unwrap_or(u64::MAX).min(most), "host", mend)?;
                on_host(bytes, gpu.as_ref())?
            }
        };
        Ok(Self { region, lie, buckets })
    }

    /// For weights that an engine takes as they come: a bucket, and before it `front` bytes.
    pub(super) fn window(paths: &Paths, buckets: Buckets, front: u64) -> Result<Self, StageError> {
        let bytes = front + buckets.bucket_bytes();
        let region = match paths.device()? {
            Some(gpu) => Region::allocated_on(&gpu, to_usize(bytes))?,
            None => on_host(bytes, None)?,
        };
        Ok(Self { region, lie: Lie::Behind(front), buckets })
    }

    /// Room for two buckets, for a path that cannot write where they are staged.
    pub(super) fn landing(&self, gpu: Option<&Arc<Device>>) -> Result<Arc<Region>, StageError> {
        let bytes = self.buckets.bucket_bytes() * 2;
        match gpu {
            Some(gpu) => Ok(Region::allocated_on(gpu, to_usize(bytes))?),
            None => on_host(bytes, self.region.device()),
        }
    }

    /// Where a bucket goes. The one after the next takes its place if the room is not for all.
    pub(super) fn at(&self, bucket: u64) -> u64 {
        match self.lie {
            Lie::Whole => self.buckets.range(bucket).start,
            Lie::InTurn => self.in_two(bucket),
            Lie::Behind(front) => front,
        }
    }

    /// Its place where there is room for two.
    pub(super) fn in_two(&self, bucket: u64) -> u64 {
        bucket % 2 * self.buckets.bucket_bytes()
    }

    fn staged(&self, manifest: Arc<Manifest>, digests: Vec<TensorDigest>) -> Staged {
        Staged::new(manifest, digests, (self.lie == Lie::Whole).then(|| Arc::clone(&self.region)))
    }
}

impl Stage {
    /// Runs to the end. `None`: the offer is of what the worker was started with, and there is nothing to stage.
    pub(super) async fn run(self) -> Result<Option<Staged>, StageError> {
        match self.offer.source.clone() {
            WeightSource::Peer(address) => self.pulled(&address).await.map(Some),
            WeightSource::Folder(folder) => self.read(folder).await.map(Some),
            WeightSource::Base => match self.base.clone() {
                Some(folder) => self.read(folder).await.map(Some),
                None => Ok(None),
            },
        }
    }

    async fn pulled(self, address: &str) -> Result<Staged, StageError> {
        let (pull, manifest, bucket_bytes) = Pull::open(&self, address).await?;
        let manifest = Arc::new(manifest);
        let buckets = Buckets::new(manifest.stream_bytes(), bucket_bytes);
        let (paths, stream_bytes) = (self.paths.clone(), manifest.stream_bytes());
        self.progress.total_bytes.store(stream_bytes, Relaxed);
        let room = Arc::new(spawn_blocking(move || Room::of(&paths, buckets, stream_bytes)).await??);
        let digests = pull.run(&self, &manifest, buckets, &room).await?;
        Ok(room.staged(manifest, digests))
    }

    async fn read(self, folder: String) -> Result<Staged, StageError> {
        // Reading does not stop by itself when nobody waits for it any more.
        let given_up = GiveUp::default();
        let flag = Arc::clone(&given_up.0);
        self.progress.takes("file");
        let staged = spawn_blocking(move || self.read_now(Path::new(&folder), &flag)).await?;
        drop(given_up);
        staged
    }

    fn read_now(self, folder: &Path, given_up: &AtomicBool) -> Result<Staged, StageError> {
        let checkpoint = Checkpoint::open(folder)?;
        let manifest = Arc::clone(checkpoint.manifest());
        let buckets =
            Buckets::new(manifest.stream_bytes(), self.paths.weights.bucket_bytes.min(manifest.stream_bytes()));
        self.progress.total_bytes.store(manifest.stream_bytes(), Relaxed);
        let room = Room::of(&self.paths, buckets, manifest.stream_bytes())?;
        let (mut digests, mut packer) = (StreamDigests::default(), Packer::default());
        for bucket in 0..buckets.count() {
            if given_up.load(Relaxed) {
                return Err(StageError::GivenUp);
            }
            let (range, at) = (buckets.range(bucket), room.at(bucket));
            packer.lay(&checkpoint, &range, &room.region, at)?;
            self.progress.bytes.fetch_add(range.end - range.start, Relaxed);
            digests.pass(&manifest, range, &room.region, at)?;
        }
        Ok(room.staged(manifest, digests.done().to_vec()))
    }
}

/// The digest of a checkpoint's tensors, which are read and not kept.
pub fn digest_of_folder(folder: &Path) -> Result<WeightsDigest, StageError> {
    let checkpoint = Checkpoint::open(folder)?;
    let manifest = checkpoint.manifest();
    let buckets = Buckets::new(manifest.stream_bytes(), READ_BYTES.min(manifest.stream_bytes()));
    let bytes = buckets.bucket_bytes();
    let region = Region::shared(to_usize(bytes)).map_err(|why| StageError::Memory { bytes, why })?;
    let mut digests = StreamDigests::default();
    for range in (0..buckets.count()).map(|bucket| buckets.range(bucket)) {
        lay(&checkpoint, &range, &region, 0)?;
        digests.pass(manifest, range, &region, 0)?;
    }
    Ok(WeightsDigest::of(manifest, digests.done()))
}

/// Tells a blocking task that nobody waits for it, when it is dropped.
#[derive(Default)]
struct GiveUp(Arc<AtomicBool>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn fits(bytes: u64, available: u64, memory: &'static str, mend: &'static str) -> Result<(), StageError> {
    if bytes <= available { Ok(()) } else { Err(StageError::TooLarge { bytes, available, memory, mend }) }
}

/// Host memory, fixed in place where a GPU copies from and to it.
fn on_host(bytes: u64, gpu: Option<&Arc<Device>>) -> Result<Arc<Region>, StageError> {
    let huge = RegionOptions { huge_pages: true, ..RegionOptions::default() };
    let region = Region::shared_with(to_usize(bytes), huge).map_err(|why| StageError::Memory { bytes, why })?;
    let Some(gpu) = gpu else { return Ok(region) };
    // Before it is fixed: the driver would fetch it page by page, and keep the engine out meanwhile.
    region.populate().map_err(|why| StageError::Memory { bytes, why })?;
    if let Err(error) = region.pin_for(gpu) {
        tracing::warn!(%error, bytes, "staged memory is not fixed in place: it is loaded more slowly");
    }
    Ok(region)
}
