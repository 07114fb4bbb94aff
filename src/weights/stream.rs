//! Weights that go into an engine as they come, staged nowhere: `[weights] staging = "none"`.
//!
//! The connection is opened and the manifest read while the engine serves; the bytes come during the pause, bucket by bucket, into a
//! window: a bucket lands at its end, and what has come of the tensor that the bucket before ended in lies right before it. The window
//! has the length of two buckets, or, where a tensor is longer than one, of a bucket and that tensor.
//! Each tensor's digest is checked before the engine gets it (WT-5), but nothing brings the old weights back (WT-1 is given up).

use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::digest::WeightsDigest;
use super::manifest::{ALIGN, Buckets, Manifest};
use super::pull::{Going, Pull};
use super::room::Room;
use super::stage::{Stage, StageError};
use crate::memory::{AccessError, Region};

/// How long one bucket is waited for; the update's own times are shorter.
const BUCKET_MAX: Duration = Duration::from_secs(600);

/// A tensor that has come whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    /// Its number in the manifest.
    pub tensor: usize,
    /// Where it begins in the stream's memory.
    pub at: u64,
}

/// What one bucket brought: its tensors, or why it did not come.
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

    /// Where tensors are found.
    pub fn region(&self) -> &Arc<Region> {
        &self.window
    }

    /// The tensors that the next bucket completes; `None` after the last one. Blocks. What was answered before lies there no more.
    pub fn next(&self) -> Result<Option<Vec<Arrived>>, String> {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        if answers.0 == self.buckets {
            return Ok(None);
        }
        let _ = self.wanted.send(());
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
    let front = front(&manifest, buckets);
    let paths = stage.paths.clone();
    let room = Arc::new(spawn_blocking(move || Room::window(&paths, buckets, front)).await??);
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
                carry(&manifest, buckets, bucket, front, &room.region)?;
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
            let _ = answer.send(Ok(arrived(&manifest, buckets, bucket, front)));
        }
    };
    Ok((stream, run))
}

/// The first byte of the stream that is still needed when a bucket is asked for: where the tensor begins that the bucket before
/// ended in.
fn needed_from(manifest: &Manifest, buckets: Buckets, bucket: u64) -> u64 {
    let start = buckets.range(bucket).start;
    let straddles = manifest.pieces(buckets.range(bucket)).next().filter(|piece| piece.skip > 0);
    straddles.map_or(start, |piece| manifest.place(piece.tensor).start)
}

/// Where buckets land in the window.
fn front(manifest: &Manifest, buckets: Buckets) -> u64 {
    let bytes = |tensor| manifest.place(tensor).end - manifest.place(tensor).start;
    let longest = (0..manifest.tensors().len()).map(bytes).max().unwrap_or(0);
    longest.next_multiple_of(ALIGN).max(buckets.bucket_bytes())
}

/// Brings that part before the bucket's place. It ends where the bucket before, a whole one, ended.
fn carry(manifest: &Manifest, buckets: Buckets, bucket: u64, front: u64, window: &Region) -> Result<(), AccessError> {
    let (tail, step) = (buckets.range(bucket).start - needed_from(manifest, buckets, bucket), buckets.bucket_bytes());
    let mut left = tail;
    while left > 0 {
        // Each part goes to where the one before it was: so none overlaps itself.
        let len = left.min(step);
        window.copy_to(front + step - left, window, front - left, len)?;
        left -= len;
    }
    Ok(())
}

/// The tensors that end in a bucket, and where they begin in the window.
fn arrived(manifest: &Manifest, buckets: Buckets, bucket: u64, front: u64) -> Vec<Arrived> {
    let start = buckets.range(bucket).start;
    let ended = manifest.pieces(buckets.range(bucket)).filter(|piece| piece.is_last);
    ended
        .map(|piece| Arrived { tensor: piece.tensor, at: front + manifest.place(piece.tensor).start - start })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::manifest::{Dtype, Tensor};
    use super::*;
    use crate::memory::to_usize;

    proptest! {
        /// Whatever the sizes: each is found whole, once.
        #[test]
        fn every_tensor_lies_whole_in_the_window_when_it_arrives(
            sizes in prop::collection::vec(0..1500_u64, 1..30), bucket_bytes in 100..4000_u64
        ) {
            let tensor = |(at, &size): (usize, &u64)| {
                Tensor { name: format!("{at:03}"), dtype: Dtype::U8, shape: vec![size] }
            };
            let manifest = Manifest::new(sizes.iter().enumerate().map(tensor).collect()).unwrap();
            let buckets = Buckets::new(manifest.stream_bytes(), bucket_bytes);
            let front = front(&manifest, buckets);
            let stream: Vec<u8> = (0..manifest.stream_bytes()).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
            let window = Region::shared(to_usize(front + buckets.bucket_bytes())).unwrap();
            let mut seen = Vec::new();
            for bucket in 0..buckets.count() {
                carry(&manifest, buckets, bucket, front, &window).unwrap();
                let range = buckets.range(bucket);
                window.copy_in(front, &stream[to_usize(range.start)..to_usize(range.end)]).unwrap();
                for Arrived { tensor, at } in arrived(&manifest, buckets, bucket, front) {
                    let place = manifest.place(tensor);
                    let want = &stream[to_usize(place.start)..to_usize(place.end)];
                    prop_assert_eq!(&window.to_vec(at, place.end - place.start).unwrap()[..], want);
                    seen.push(tensor);
                }
            }
            prop_assert_eq!(seen, (0..sizes.len()).collect::<Vec<_>>());
        }
    }
}
