//! Digests of tensors, made while their bytes pass (WT-5).
//!
//! Sender and receiver each run a [`StreamDigests`] over the stream, bucket by bucket in order; it yields the digest of a
//! tensor with the last of its bytes. XXH3 with 128 bits reads as fast as memory gives. It finds what goes wrong on the way;
//! it is no defence against somebody who forges weights on purpose: for that there is the run's secret.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use xxhash_rust::xxh3::Xxh3Default;

use super::manifest::{Manifest, Piece};
use crate::memory::{AccessError, Region, to_u64, to_usize};

/// Bytes are read in lumps of this size: they fit the second-level cache.
const LUMP_BYTES: usize = 128 * 1024;

/// The digest of one tensor's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorDigest(pub [u8; 16]);

/// The digest of a whole set of weights: names, dtypes, shapes and bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WeightsDigest(pub [u8; 16]);

impl WeightsDigest {
    /// Of a manifest and the digest of each of its tensors.
    pub fn of(manifest: &Manifest, digests: &[TensorDigest]) -> Self {
        assert_eq!(manifest.tensors().len(), digests.len(), "a digest for each tensor");
        let mut hasher = Sha256::new();
        hasher.update(b"pdlink weights");
        for (tensor, digest) in manifest.tensors().iter().zip(digests) {
            let described = postcard::to_stdvec(tensor).expect("plain data always encodes");
            hasher.update(to_u64(described.len()).to_le_bytes());
            hasher.update(described);
            hasher.update(digest.0);
        }
        let mut short = [0; 16];
        short.copy_from_slice(&hasher.finalize()[..16]);
        Self(short)
    }
}

impl fmt::Display for WeightsDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for WeightsDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Digests of all tensors in order, as the stream passes.
pub(super) struct StreamDigests {
    /// Boxed: it holds half a kilobyte of lanes, and is handed from task to task.
    open: Box<Xxh3Default>,
    done: Vec<TensorDigest>,
    lump: Vec<u8>,
}

impl Default for StreamDigests {
    fn default() -> Self {
        Self { open: Box::new(Xxh3Default::new()), done: Vec::new(), lump: vec![0; LUMP_BYTES] }
    }
}

impl StreamDigests {
    /// Takes the next bytes of the stream, which lie at `at` in `region`. `range` must begin where the last one ended.
    /// Yields the digests of the tensors that ended.
    pub(super) fn pass(
        &mut self,
        manifest: &Manifest,
        range: Range<u64>,
        region: &Region,
        at: u64,
    ) -> Result<&[TensorDigest], AccessError> {
        let before = self.done.len();
        for piece in manifest.pieces(range.clone()) {
            let offset = at + (piece.stream.start - range.start);
            self.pass_piece(&piece, region, offset)?;
        }
        Ok(&self.done[before..])
    }

    fn pass_piece(&mut self, piece: &Piece, region: &Region, mut offset: u64) -> Result<(), AccessError> {
        assert_eq!(piece.tensor, self.done.len(), "tensors pass in order");
        let mut left = piece.stream.end - piece.stream.start;
        while left > 0 {
            let take = left.min(to_u64(self.lump.len()));
            let lump = &mut self.lump[..to_usize(take)];
            region.copy_out(offset, lump)?;
            self.open.update(lump);
            offset += take;
            left -= take;
        }
        if piece.is_last {
            self.done.push(TensorDigest(self.open.digest128().to_le_bytes()));
            self.open.reset();
        }
        Ok(())
    }

    /// Of all tensors that have ended.
    pub(super) fn done(&self) -> &[TensorDigest] {
        &self.done
    }
}

#[cfg(test)]
mod tests {
    use super::super::manifest::{Buckets, Dtype, Tensor};
    use super::*;

    #[test]
    fn wt_5_digests_do_not_depend_on_buckets_and_each_byte_counts() {
        let tensor = |name: &str, bytes| Tensor { name: name.to_owned(), dtype: Dtype::U8, shape: vec![bytes] };
        let manifest = Manifest::new(vec![tensor("a", 300), tensor("b", 0), tensor("c", 1000)]).unwrap();
        let region = Region::shared(to_usize(manifest.stream_bytes())).unwrap();
        let bytes: Vec<u8> = (0..manifest.stream_bytes()).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
        region.copy_in(0, &bytes).unwrap();
        let digests = |bucket_bytes| {
            let mut digests = StreamDigests::default();
            let buckets = Buckets::new(manifest.stream_bytes(), bucket_bytes);
            for range in (0..buckets.count()).map(|bucket| buckets.range(bucket)) {
                digests.pass(&manifest, range.clone(), &region, range.start).unwrap();
            }
            digests.done().to_vec()
        };
        let want = digests(1 << 20);
        assert_eq!(want.len(), 3);
        assert_eq!(digests(256), want);
        let whole = WeightsDigest::of(&manifest, &want);
        for at in [0, 299, 512, 1511] {
            let old = region.to_vec(at, 1).unwrap()[0];
            region.copy_in(at, &[old ^ 1]).unwrap();
            assert_ne!(WeightsDigest::of(&manifest, &digests(256)), whole, "byte {at}");
            region.copy_in(at, &[old]).unwrap();
        }
        // Between tensors lies nothing.
        region.copy_in(300, &[0xFF]).unwrap();
        assert_eq!(WeightsDigest::of(&manifest, &digests(512)), whole);
    }
}
