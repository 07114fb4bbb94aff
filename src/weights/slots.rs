//! The memory that a source's buckets lie in, and the paths to it.
//!
//! A trainer's tensors on a GPU are packed there, for receivers that map its memory. One that comes by a path of host memory,
//! from another host, finds each bucket in host memory too, brought there when it is first asked for.

use std::sync::Arc;

use super::manifest::Buckets;
use super::paths::Paths;
use super::source::SourceError;
use crate::config::KvMemory;
use crate::memory::{Device, Region, to_usize};
use crate::transport::{Offer, Transport, export_all};

/// Buckets that a sender has memory for: one is packed while receivers pull the other.
pub(super) const SLOTS: u64 = 2;

pub(super) struct Slots {
    /// Where buckets are packed, or all of them lie.
    region: Arc<Region>,
    bucket_bytes: u64,
    mirror: Option<Mirror>,
    transports: Vec<Arc<dyn Transport>>,
}

/// Host memory beside a GPU's.
struct Mirror {
    region: Arc<Region>,
    /// For each slot, the bucket that lies there.
    holds: Vec<Option<u64>>,
    under_way: Option<u64>,
}

type Copying = Box<dyn FnOnce() -> Result<(), String> + Send>;

impl Slots {
    /// For buckets that are packed one after the other, on `device` if a path moves them from there.
    pub(super) fn new(buckets: &Buckets, device: Option<&Arc<Device>>, paths: &Paths) -> Result<Self, SourceError> {
        let (bucket_bytes, bytes) = (buckets.bucket_bytes(), buckets.bucket_bytes() * SLOTS.min(buckets.count()));
        if let Some(device) = device.filter(|_| !paths.that_move(KvMemory::Gpu).is_empty()) {
            match Self::on_gpu(device, bytes, bucket_bytes, paths) {
                Ok(slots) => return Ok(slots),
                Err(why) => {
                    tracing::warn!(
                        why,
                        gpu = device.ordinal(),
                        "weights go through host memory: no bucket can be shared"
                    );
                }
            }
        }
        let region = on_host(bytes)?;
        let transports = paths.open(&region)?;
        Ok(Self { region, bucket_bytes, mirror: None, transports })
    }

    fn on_gpu(device: &Arc<Device>, bytes: u64, bucket_bytes: u64, paths: &Paths) -> Result<Self, String> {
        let said = |error: &dyn std::fmt::Display| error.to_string();
        let region = Region::allocated_on(device, to_usize(bytes)).map_err(|error| said(&error))?;
        let mut transports = paths.open(&region).map_err(|error| said(&error))?;
        let mut mirror = None;
        if !paths.that_move(KvMemory::Host).is_empty() {
            // Its pages come when they are first written.
            let region = on_host(bytes).map_err(|error| said(&error))?;
            transports.extend(paths.open(&region).map_err(|error| said(&error))?);
            let slots = to_usize(bytes.div_ceil(bucket_bytes));
            mirror = Some(Mirror { region, holds: vec![None; slots], under_way: None });
        }
        Ok(Self { region, bucket_bytes, mirror, transports })
    }

    /// For buckets that all lie in `region`.
    pub(super) fn whole(region: &Arc<Region>, paths: &Paths) -> Result<Self, SourceError> {
        Ok(Self { transports: paths.open(region)?, region: Arc::clone(region), bucket_bytes: 0, mirror: None })
    }

    pub(super) fn region(&self) -> Arc<Region> {
        Arc::clone(&self.region)
    }

    pub(super) fn offers(&self) -> Vec<Offer> {
        export_all(&self.transports)
    }

    /// Where a bucket is packed.
    pub(super) fn at(&self, bucket: u64) -> u64 {
        bucket % SLOTS * self.bucket_bytes
    }

    /// Whether a bucket that was packed lies in host memory.
    pub(super) fn has_on_host(&self, bucket: u64) -> bool {
        let slot = to_usize(bucket % SLOTS);
        self.mirror.as_ref().is_none_or(|mirror| mirror.holds.get(slot) == Some(&Some(bucket)))
    }

    /// What brings a bucket of `len` bytes there; nothing if that is under way.
    pub(super) fn mirror(&mut self, bucket: u64, len: u64) -> Option<Copying> {
        let at = self.at(bucket);
        let mirror = self.mirror.as_mut().filter(|mirror| mirror.under_way.is_none())?;
        mirror.under_way = Some(bucket);
        let (from, to) = (Arc::clone(&self.region), Arc::clone(&mirror.region));
        Some(Box::new(move || {
            if let Some(Err(error)) = from.device().map(|device| to.pin_for(device)) {
                tracing::debug!(%error, "host memory beside a GPU is not fixed: copies are slower");
            }
            from.copy_to(at, &to, at, len).map_err(|error| format!("a bucket did not come to host memory: {error}"))
        }))
    }

    pub(super) fn mirrored(&mut self, bucket: u64, is_there: bool) {
        let Some(mirror) = &mut self.mirror else { return };
        mirror.under_way = None;
        if is_there && let Some(holds) = mirror.holds.get_mut(to_usize(bucket % SLOTS)) {
            *holds = Some(bucket);
        }
    }

    pub(super) fn close(&self) {
        self.transports.iter().for_each(|transport| transport.close());
    }
}

fn on_host(bytes: u64) -> Result<Arc<Region>, SourceError> {
    Region::shared(to_usize(bytes)).map_err(|why| SourceError::Memory { bytes, why })
}
