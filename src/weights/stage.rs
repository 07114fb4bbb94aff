//! Gets a whole set of weights to where it waits for its commit, and checks it: from another process or from a folder.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tokio::task::spawn_blocking;

use super::checkpoint::{Checkpoint, CheckpointError};
use super::digest::{StreamDigests, WeightsDigest};
use super::manifest::{Buckets, ManifestError};
use super::paths::Paths;
use super::prime_rl::{Joined, receive};
use super::pull::Pull;
use super::room::{Leftover, Room};
use super::staged::Staged;
use super::tensors::{Packer, ReadError, TensorBytes, lay};
use crate::control::{ControlError, WeightSource, WeightsOffer};
use crate::memory::{AccessError, CudaError, Region, to_usize};
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
    #[error("{what} of {bytes} bytes did not come from the trainer: {why}")]
    Broadcast { what: &'static str, bytes: u64, why: TransportError },
    #[error(
        "this rank is not in the trainer's NCCL group any more, and the trainer cannot be told to begin again: restart it, so that it \
         calls /init_broadcaster anew"
    )]
    NoTrainer,
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
    pub(super) left: Arc<Leftover>,
    /// By when all of it must be there.
    pub(super) deadline: Instant,
    /// The trainer's group that the weights come from, if they come from one.
    pub(super) trainer: Option<Arc<Joined>>,
}

impl Stage {
    /// Runs to the end. `None`: the offer is of what the worker was started with, and there is nothing to stage.
    pub(super) async fn run(mut self) -> Result<Option<Staged>, StageError> {
        match self.offer.source.clone() {
            WeightSource::Trainer { .. } => match self.trainer.take() {
                Some(joined) => receive(self, joined).await.map(Some),
                None => Err(StageError::NoTrainer),
            },
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
        let (paths, left, stream_bytes) = (self.paths.clone(), Arc::clone(&self.left), manifest.stream_bytes());
        self.progress.total_bytes.store(stream_bytes, Relaxed);
        let room = Arc::new(spawn_blocking(move || Room::of(&paths, &left, buckets, stream_bytes)).await??);
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
        let room = Room::of(&self.paths, &self.left, buckets, manifest.stream_bytes())?;
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
