//! Memory that weights are staged in, and what earlier weights leave of theirs to later ones.

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::digest::TensorDigest;
use super::manifest::{Buckets, Manifest};
use super::paths::Paths;
use super::stage::StageError;
use super::staged::Staged;
use crate::config::Staging;
use crate::memory::{Device, Region, RegionOptions, host_free_bytes, to_usize};

/// What earlier weights of a worker leave to later ones.
#[derive(Default)]
pub(super) struct Leftover {
    /// Host memory of weights that nobody needs any more. To get as much anew takes longer than to fill it.
    spare: Mutex<Option<Arc<Region>>>,
    /// How many sets of weights are just leaving the GPU.
    leaving: Mutex<usize>,
    left: Condvar,
}

/// Weights are leaving the GPU, until this is dropped.
pub(super) struct Leaving(Arc<Leftover>);

impl Leftover {
    /// Takes over the memory of weights, if they are nobody else's.
    pub(super) fn inherit(&self, staged: Arc<Staged>) {
        let Some(region) = Arc::into_inner(staged).and_then(Staged::into_region) else { return };
        if region.device().is_none() && Arc::strong_count(&region) == 1 {
            let before = locked(&self.spare).replace(region);
            drop(before);
        }
    }

    /// Memory of that many bytes. What has another size is of no use, and given back.
    pub(super) fn take(&self, bytes: u64) -> Option<Arc<Region>> {
        let spare = locked(&self.spare).take();
        spare.filter(|region| region.len() == bytes)
    }

    pub(super) fn leaving(this: &Arc<Self>) -> Leaving {
        *locked(&this.leaving) += 1;
        Leaving(Arc::clone(this))
    }

    /// Waits until no weights are just leaving the GPU.
    fn wait(&self) {
        let leaving = self.left.wait_while(locked(&self.leaving), |leaving| *leaving > 0);
        drop(leaving);
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        *locked(&self.0.leaving) -= 1;
        self.0.left.notify_all();
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
}

impl Room {
    /// May take a while: much memory is made ready, or waited for. Not to be called where tokio's tasks run.
    pub(super) fn of(paths: &Paths, left: &Leftover, buckets: Buckets, stream_bytes: u64) -> Result<Self, StageError> {
        let gpu = paths.device()?;
        if staging(paths, gpu.as_ref()) == Staging::None {
            let region = in_memory(buckets.bucket_bytes() * 2, most(paths), gpu.as_ref())?;
            return Ok(Self { region, lie: Lie::InTurn, buckets });
        }
        Ok(Self { region: whole(paths, left, stream_bytes.max(1))?, lie: Lie::Whole, buckets })
    }

    /// For weights that an engine takes as they come.
    pub(super) fn for_two(paths: &Paths, buckets: Buckets) -> Result<Self, StageError> {
        let region = two_buckets(buckets, paths.device()?.as_ref(), None)?;
        Ok(Self { region, lie: Lie::InTurn, buckets })
    }

    /// Room for two buckets, for a path that cannot write where they are staged.
    pub(super) fn landing(&self, gpu: Option<&Arc<Device>>) -> Result<Arc<Region>, StageError> {
        two_buckets(self.buckets, gpu, self.region.device())
    }

    /// Where a bucket goes. The one after the next takes its place if the room is not for all.
    pub(super) fn at(&self, bucket: u64) -> u64 {
        match self.lie {
            Lie::Whole => self.buckets.range(bucket).start,
            Lie::InTurn => self.in_two(bucket),
        }
    }

    /// Its place where there is room for two.
    pub(super) fn in_two(&self, bucket: u64) -> u64 {
        bucket % 2 * self.buckets.bucket_bytes()
    }

    pub(super) fn staged(&self, manifest: Arc<Manifest>, digests: Vec<TensorDigest>) -> Staged {
        Staged::new(manifest, digests, (self.lie == Lie::Whole).then(|| Arc::clone(&self.region)))
    }
}

/// Memory for all of a set of weights. May take a while, as [`Room::of`].
pub(super) fn whole(paths: &Paths, left: &Leftover, bytes: u64) -> Result<Arc<Region>, StageError> {
    let gpu = paths.device()?;
    let most = most(paths);
    match (staging(paths, gpu.as_ref()), &gpu) {
        (Staging::Device, None) => Err(StageError::NoGpu),
        (Staging::Device, Some(gpu)) => on_gpu(bytes, gpu, most).or_else(|_| {
            left.wait();
            on_gpu(bytes, gpu, most)
        }),
        (Staging::Host | Staging::None, _) => match left.take(bytes) {
            Some(region) => Ok(region),
            None => in_memory(bytes, most, gpu.as_ref()),
        },
    }
}

/// Where weights are staged. Those that an engine could take as they come, but that come from elsewhere than a sender of ours, are staged
/// like any others.
fn staging(paths: &Paths, gpu: Option<&Arc<Device>>) -> Staging {
    match paths.weights.staging {
        Staging::None if gpu.is_some() || paths.streams => Staging::Host,
        staging => staging,
    }
}

fn most(paths: &Paths) -> u64 {
    paths.weights.staging_bytes_max.unwrap_or(u64::MAX)
}

/// On a GPU, or in host memory that `reader` copies from.
fn two_buckets(
    buckets: Buckets,
    gpu: Option<&Arc<Device>>,
    reader: Option<&Arc<Device>>,
) -> Result<Arc<Region>, StageError> {
    let bytes = buckets.bucket_bytes() * 2;
    match gpu {
        Some(gpu) => {
            let mend = "let vLLM leave more (--gpu-memory-utilization), or have the sender lower weights.bucket_bytes";
            fits(bytes, gpu.free_bytes()?, "GPU", mend)?;
            Ok(Region::allocated_on(gpu, to_usize(bytes))?)
        }
        None => on_host(bytes, reader),
    }
}

fn on_gpu(bytes: u64, gpu: &Arc<Device>, most: u64) -> Result<Arc<Region>, StageError> {
    let mend = "let vLLM leave more (--gpu-memory-utilization), set weights.staging = \"host\", or raise \
                weights.staging_bytes_max";
    fits(bytes, gpu.free_bytes()?.min(most), "GPU", mend)?;
    Ok(Region::allocated_on(gpu, to_usize(bytes))?)
}

fn in_memory(bytes: u64, most: u64, gpu: Option<&Arc<Device>>) -> Result<Arc<Region>, StageError> {
    let mend = "free some, set weights.staging = \"none\", or raise weights.staging_bytes_max";
    fits(bytes, host_free_bytes(Path::new("/")).unwrap_or(u64::MAX).min(most), "host", mend)?;
    on_host(bytes, gpu)
}

fn fits(bytes: u64, available: u64, memory: &'static str, mend: &'static str) -> Result<(), StageError> {
    if bytes <= available { Ok(()) } else { Err(StageError::TooLarge { bytes, available, memory, mend }) }
}

/// Host memory, fixed in place where a GPU copies from and to it.
pub(super) fn on_host(bytes: u64, gpu: Option<&Arc<Device>>) -> Result<Arc<Region>, StageError> {
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::weights::manifest::{Dtype, Tensor};

    fn staged(region: &Arc<Region>) -> Arc<Staged> {
        let tensor = Tensor { name: "a".to_owned(), dtype: Dtype::U8, shape: vec![region.len()] };
        let manifest = Arc::new(Manifest::new(vec![tensor]).unwrap());
        Arc::new(Staged::new(manifest, vec![TensorDigest(0)], Some(Arc::clone(region))))
    }

    #[test]
    fn memory_is_taken_over_only_from_its_last_owner() {
        let left = Leftover::default();
        let region = Region::shared(4096).unwrap();
        let address = region.address();
        left.inherit(staged(&region));
        assert!(left.take(4096).is_none(), "somebody reads it still");
        let weights = staged(&region);
        drop(region);
        left.inherit(Arc::clone(&weights));
        assert!(left.take(4096).is_none(), "somebody has the weights still");
        left.inherit(weights);
        assert_eq!(left.take(4096).unwrap().address(), address);
        assert!(left.take(4096).is_none(), "it is taken");
        left.inherit(staged(&Region::shared(4096).unwrap()));
        assert!(left.take(4097).is_none(), "another size");
        assert!(left.take(4096).is_none(), "what has another size is given back");
    }

    #[test]
    fn who_finds_no_room_waits_for_all_that_leave() {
        let left = Arc::new(Leftover::default());
        left.wait();
        let (one, other) = (Leftover::leaving(&left), Leftover::leaving(&left));
        let waiting = std::thread::spawn({
            let left = Arc::clone(&left);
            move || left.wait()
        });
        drop(one);
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        drop(other);
        waiting.join().unwrap();
    }
}
