//! Weights that go into an engine as they come, staged nowhere: `[weights] staging = "none"`.
//!
//! The connection is opened and the manifest read while the engine serves; the bytes come during the pause, bucket by bucket, into two
//! places in turn: while the engine takes the one, the next bucket comes into the other. So an engine gets tensors in parts. Each tensor's
//! digest is checked with its last part, and all before the commit (WT-5); but nothing brings the old weights back (WT-1 is given up).

use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::digest::WeightsDigest;
use super::manifest::{Buckets, Manifest, Piece};
use super::pull::{Going, Pull};
use super::room::Room;
use super::stage::{Stage, StageError};
use crate::memory::Region;

/// How long one bucket is waited for; the update's own times are shorter.
const BUCKET_MAX: Duration = Duration::from_secs(600);

/// A part of a tensor that has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    /// The tensor's number in the manifest.
    pub tensor: usize,
    /// Bytes of the tensor before this part.
    pub skip: u64,
    /// Where the part begins in the stream's memory.
    pub at: u64,
    pub len: u64,
}

/// What one bucket brought: parts of tensors, or why it did not come.
type Answer = Result<Vec<Arrived>, String>;

/// New weights on their way into an engine.
pub struct Stream {
    manifest: Arc<Manifest>,
    window: Arc<Region>,
    buckets: u64,
    wanted: mpsc::UnboundedSender<()>,
    answers: Mutex<(u64, Receiver<Answer>)>,
    digest: Arc<Mutex<Option<WeightsDigest>>>,
}

impl Stream {
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Where parts are found.
    pub fn region(&self) -> &Arc<Region> {
        &self.window
    }

    /// What the next bucket brings, in order; `None` after the last one. Blocks. What was answered before lies there no more.
    pub fn next(&self) -> Result<Option<Vec<Arrived>>, String> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.0 == self.buckets {
            return Ok(None);
        }
        // The first question finds both places free; each later one frees the place of what was answered before.
        for _ in answers.0.min(1)..2 {
            let _ = self.wanted.send(());
        }
        let gone = |error: RecvTimeoutError| match error {
            RecvTimeoutError::Timeout => format!("no bucket came within {} s", BUCKET_MAX.as_secs()),
            RecvTimeoutError::Disconnected => "the update was given up".to_owned(),
        };
        let arrived = answers.1.recv_timeout(BUCKET_MAX).map_err(gone)??;
        answers.0 += 1;
        Ok(Some(arrived))
    }

    /// Of all that came, once all of it has.
    pub fn digest(&self) -> Option<WeightsDigest> {
        *self.digest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Opens a stream. What is answered second brings the buckets, and has to be run.
pub(super) async fn open(
    stage: Stage,
    address: &str,
) -> Result<(Stream, impl Future<Output = ()> + Send + use<>), StageError> {
    let (pull, manifest, bucket_bytes) = Pull::open(&stage, address).await?;
    let manifest = Arc::new(manifest);
    let buckets = Buckets::new(manifest.stream_bytes(), bucket_bytes);
    let paths = stage.paths.clone();
    let room = Arc::new(spawn_blocking(move || Room::for_two(&paths, buckets)).await??);
    stage.progress.total_bytes.store(manifest.stream_bytes(), Relaxed);
    let (wanted, mut asked) = mpsc::unbounded_channel();
    let (answer, answers) = channel();
    let digest: Arc<Mutex<Option<WeightsDigest>>> = Arc::default();
    let stream = Stream {
        manifest: Arc::clone(&manifest),
        window: Arc::clone(&room.region),
        buckets: buckets.count(),
        wanted,
        answers: Mutex::new((0, answers)),
        digest: Arc::clone(&digest),
    };
    let run = async move {
        let mut going: Option<Going> = None;
        for bucket in 0..buckets.count() {
            if asked.recv().await.is_none() {
                return;
            }
            let came = async {
                let before = match going.take() {
                    Some(going) => going,
                    None => pull.begin(&stage, &room).await?,
                };
                pull.one(before, &stage, &manifest, buckets, bucket, &room).await
            };
            match came.await {
                Ok(after) if bucket + 1 == buckets.count() => {
                    let of = WeightsDigest::of(&manifest, after.digests());
                    *digest.lock().unwrap_or_else(PoisonError::into_inner) = Some(of);
                    pull.end(after, &stage).await;
                }
                Ok(after) => going = Some(after),
                Err(error) => return drop(answer.send(Err(error.to_string()))),
            }
            let _ = answer.send(Ok(arrived(&manifest, buckets, bucket, room.at(bucket))));
        }
    };
    Ok((stream, run))
}

/// What a bucket that lies at `at` has of each tensor.
fn arrived(manifest: &Manifest, buckets: Buckets, bucket: u64, at: u64) -> Vec<Arrived> {
    let range = buckets.range(bucket);
    let part = |piece: Piece| Arrived {
        tensor: piece.tensor,
        skip: piece.skip,
        at: at + (piece.stream.start - range.start),
        len: piece.stream.end - piece.stream.start,
    };
    manifest.pieces(range.clone()).map(part).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::manifest::{Dtype, Tensor};
    use super::*;
    use crate::memory::to_usize;

    proptest! {
        /// Whatever the sizes: every byte of every tensor is found, once and in order.
        #[test]
        fn every_tensor_comes_whole_in_its_parts(
            sizes in prop::collection::vec(0..1500_u64, 1..30), bucket_bytes in 100..4000_u64
        ) {
            let tensor = |(at, &size): (usize, &u64)| {
                Tensor { name: format!("{at:03}"), dtype: Dtype::U8, shape: vec![size] }
            };
            let manifest = Manifest::new(sizes.iter().enumerate().map(tensor).collect()).unwrap();
            let buckets = Buckets::new(manifest.stream_bytes(), bucket_bytes);
            let stream: Vec<u8> = (0..manifest.stream_bytes()).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
            let mut window = vec![0; to_usize(buckets.bucket_bytes() * 2)];
            let mut seen: Vec<Vec<u8>> = vec![Vec::new(); sizes.len()];
            for bucket in 0..buckets.count() {
                let (range, at) = (buckets.range(bucket), bucket % 2 * buckets.bucket_bytes());
                let came = &stream[to_usize(range.start)..to_usize(range.end)];
                window[to_usize(at)..][..came.len()].copy_from_slice(came);
                for part in arrived(&manifest, buckets, bucket, at) {
                    prop_assert_eq!(seen[part.tensor].len(), to_usize(part.skip));
                    seen[part.tensor].extend(&window[to_usize(part.at)..][..to_usize(part.len)]);
                }
            }
            for (tensor, seen) in seen.iter().enumerate() {
                let place = manifest.place(tensor);
                prop_assert_eq!(&seen[..], &stream[to_usize(place.start)..to_usize(place.end)]);
            }
        }
    }
}
