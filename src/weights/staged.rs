//! Weights that a worker has, checked, before it serves them: whole in host memory, or known by their digests alone.

use std::sync::Arc;

use super::digest::{TensorDigest, WeightsDigest};
use super::manifest::Manifest;
use super::tensors::{ReadError, TensorBytes};
use crate::memory::Region;

/// All of one version's weights.
#[derive(Debug)]
pub struct Staged {
    manifest: Arc<Manifest>,
    digests: Vec<TensorDigest>,
    digest: WeightsDigest,
    region: Option<Arc<Region>>,
}

impl Staged {
    /// `region` holds the whole stream; without one the bytes have gone elsewhere.
    pub(super) fn new(manifest: Arc<Manifest>, digests: Vec<TensorDigest>, region: Option<Arc<Region>>) -> Self {
        let digest = WeightsDigest::of(&manifest, &digests);
        Self { manifest, digests, digest, region }
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

    /// Where the stream lies; a tensor's part of it is [`Manifest::place`].
    pub fn region(&self) -> Option<&Arc<Region>> {
        self.region.as_ref()
    }
}

impl TensorBytes for Staged {
    fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    fn read(&self, tensor: usize, skip: u64, len: u64, region: &Region, at: u64) -> Result<(), ReadError> {
        let copied = match &self.region {
            Some(staged) => staged
                .copy_to(self.manifest.place(tensor).start + skip, region, at, len)
                .map_err(|error| error.to_string()),
            None => Err("it was not kept".to_owned()),
        };
        let tensor = || self.manifest.tensors()[tensor].name.clone();
        copied.map_err(|why| ReadError { tensor: tensor(), from: "this worker's memory".to_owned(), why })
    }
}
