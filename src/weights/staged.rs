//! Weights that a worker has, checked, before it serves them: whole in memory, or known by their digests alone.

use std::sync::{Arc, PoisonError, RwLock};

use super::digest::{TensorDigest, WeightsDigest};
use super::manifest::Manifest;
use super::room::{Leftover, on_host};
use super::stage::StageError;
use super::tensors::{ReadError, TensorBytes};
use crate::memory::Region;

/// All of one version's weights.
#[derive(Debug)]
pub struct Staged {
    manifest: Arc<Manifest>,
    digests: Vec<TensorDigest>,
    digest: WeightsDigest,
    region: RwLock<Option<Arc<Region>>>,
}

impl Staged {
    /// `region` holds the whole stream; without one the bytes have gone elsewhere.
    pub(super) fn new(manifest: Arc<Manifest>, digests: Vec<TensorDigest>, region: Option<Arc<Region>>) -> Self {
        let digest = WeightsDigest::of(&manifest, &digests);
        Self { manifest, digests, digest, region: RwLock::new(region) }
    }

    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    pub fn digest(&self) -> WeightsDigest {
        self.digest
    }

    pub(super) fn digests(&self) -> &[TensorDigest] {
        &self.digests
    }

    /// Where the stream lies; a tensor's part of it is [`Manifest::place`]. It stays there for whoever holds what is answered.
    pub fn region(&self) -> Option<Arc<Region>> {
        self.region.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn is_on_gpu(&self) -> bool {
        self.region().is_some_and(|region| region.device().is_some())
    }

    /// Moves what lies on a GPU to host memory, where it is kept: the engine has a copy of its own.
    pub(super) fn leave_gpu(&self, left: &Leftover) -> Result<(), StageError> {
        let Some(region) = self.region().filter(|region| region.device().is_some()) else { return Ok(()) };
        let host = left.take(region.len()).map_or_else(|| on_host(region.len(), None), Ok)?;
        region.copy_to(0, &host, 0, region.len())?;
        *self.region.write().unwrap_or_else(PoisonError::into_inner) = Some(host);
        Ok(())
    }

    pub(super) fn into_region(self) -> Option<Arc<Region>> {
        self.region.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TensorBytes for Staged {
    fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    fn read(&self, tensor: usize, skip: u64, len: u64, region: &Region, at: u64) -> Result<(), ReadError> {
        let copied = match self.region() {
            Some(staged) => staged
                .copy_to(self.manifest.place(tensor).start + skip, region, at, len)
                .map_err(|error| error.to_string()),
            None => Err("it was not kept".to_owned()),
        };
        let tensor = || self.manifest.tensors()[tensor].name.clone();
        copied.map_err(|why| ReadError { tensor: tensor(), from: "this worker's memory".to_owned(), why })
    }
}
