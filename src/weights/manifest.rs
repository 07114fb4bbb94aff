//! What one set of weights consists of: names, dtypes and shapes, and where each tensor lies in the stream of bytes.
//!
//! The stream is the tensors' bytes one after the other, each on a boundary of [`ALIGN`], so that a receiver can hand out views of
//! what it staged. Senders of ours put tensors in order of their names, however a checkpoint was cut into files; what another sender
//! sends has its own order. What is not known until the bytes were read, a digest for each tensor, comes with the bytes.
//!
//! Every number is checked before anything is allocated for it: a manifest comes from another process.

use std::collections::HashSet;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Most tensors of one set of weights. A mixture of 256 experts in 100 layers has some 80,000.
pub(super) const TENSORS_MAX: usize = 1 << 20;
/// Longest name, in bytes.
pub(super) const NAME_BYTES_MAX: usize = 1024;
/// Most dimensions of a tensor.
pub(super) const DIMENSIONS_MAX: usize = 16;
/// Most bytes of one set of weights: 64 TiB, some ten times what anybody has.
pub(super) const STREAM_BYTES_MAX: u64 = 1 << 46;
/// Tensors begin on a multiple of this many bytes: a cache line of every GPU and processor, and any dtype's alignment.
pub(super) const ALIGN: u64 = 256;

/// What the elements of a tensor are. Order and number of the variants are what is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(non_camel_case_types, reason = "the names that checkpoints have")]
pub enum Dtype {
    BOOL,
    U8,
    I8,
    F8_E5M2,
    F8_E4M3,
    F8_E8M0,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
    F4,
    F6_E2M3,
    F6_E3M2,
}

impl Dtype {
    /// Bits of one element.
    pub fn bits(self) -> u64 {
        match self {
            Self::F4 => 4,
            Self::F6_E2M3 | Self::F6_E3M2 => 6,
            Self::BOOL | Self::U8 | Self::I8 | Self::F8_E5M2 | Self::F8_E4M3 | Self::F8_E8M0 => 8,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 16,
            Self::I32 | Self::U32 | Self::F32 => 32,
            Self::F64 | Self::I64 | Self::U64 => 64,
        }
    }
}

/// One tensor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<u64>,
}

impl Tensor {
    /// Bytes of the tensor; `None` if that is no whole number, or one that cannot be.
    pub fn bytes(&self) -> Option<u64> {
        let elements = self.shape.iter().try_fold(1_u64, |product, &size| product.checked_mul(size))?;
        let bits = elements.checked_mul(self.dtype.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

/// Why tensors make no manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("there are no tensors")]
    Empty,
    #[error("{count} tensors, at most {TENSORS_MAX} are taken")]
    TooMany { count: usize },
    #[error("tensor {number} has a name of {bytes} bytes, 1 to {NAME_BYTES_MAX} are allowed")]
    Name { number: usize, bytes: usize },
    #[error("tensor `{name}` is there twice")]
    Twice { name: String },
    #[error("tensor `{name}` of {dimensions} dimensions has no size in bytes that can be ({dtype:?})")]
    Shape { name: String, dimensions: usize, dtype: Dtype },
    #[error("the tensors take more than {STREAM_BYTES_MAX} bytes")]
    TooLong,
}

/// Checked: names that differ, sizes that can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    tensors: Vec<Tensor>,
    /// Where each tensor begins in the stream.
    starts: Vec<u64>,
    stream_bytes: u64,
}

impl Manifest {
    /// `tensors` in order of their bytes.
    pub fn new(tensors: Vec<Tensor>) -> Result<Self, ManifestError> {
        if tensors.is_empty() {
            return Err(ManifestError::Empty);
        }
        if tensors.len() > TENSORS_MAX {
            return Err(ManifestError::TooMany { count: tensors.len() });
        }
        let mut starts = Vec::with_capacity(tensors.len());
        let mut end = 0_u64;
        let mut names = HashSet::with_capacity(tensors.len());
        for (number, tensor) in tensors.iter().enumerate() {
            let bytes = checked(number, tensor)?;
            if !names.insert(tensor.name.as_str()) {
                return Err(ManifestError::Twice { name: tensor.name.clone() });
            }
            let start = end.next_multiple_of(ALIGN);
            end = start.checked_add(bytes).filter(|&end| end <= STREAM_BYTES_MAX).ok_or(ManifestError::TooLong)?;
            starts.push(start);
        }
        Ok(Self { tensors, starts, stream_bytes: end })
    }

    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Bytes of the stream, what lies between tensors included.
    pub fn stream_bytes(&self) -> u64 {
        self.stream_bytes
    }

    /// Where a tensor lies in the stream.
    pub fn place(&self, tensor: usize) -> Range<u64> {
        let start = self.starts[tensor];
        start..start + self.tensors[tensor].bytes().expect("checked when the manifest was made")
    }

    /// How many tensors begin before `end` of the stream; at its very end, all.
    pub(super) fn begun_by(&self, end: u64) -> usize {
        if end >= self.stream_bytes { self.tensors.len() } else { self.starts.partition_point(|&start| start < end) }
    }

    /// The tensors that have bytes in `range` of the stream or end in it, in order, each cut to it.
    pub fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Piece> + '_ {
        let after = self.starts.partition_point(|&start| start < range.start);
        let straddles = after.checked_sub(1).filter(|&before| self.place(before).end > range.start);
        let first = straddles.unwrap_or(after);
        let is_last = range.end >= self.stream_bytes;
        (first..self.tensors.len())
            .map(|tensor| (tensor, self.place(tensor)))
            .take_while(move |(_, place)| place.start < range.end || is_last)
            .map(move |(tensor, place)| {
                let stream = place.start.max(range.start)..place.end.min(range.end);
                Piece { tensor, skip: stream.start - place.start, is_last: stream.end == place.end, stream }
            })
    }
}

fn checked(number: usize, tensor: &Tensor) -> Result<u64, ManifestError> {
    let name_bytes = tensor.name.len();
    if name_bytes == 0 || name_bytes > NAME_BYTES_MAX {
        return Err(ManifestError::Name { number, bytes: name_bytes });
    }
    let dimensions = tensor.shape.len();
    let bytes = if dimensions <= DIMENSIONS_MAX { tensor.bytes() } else { None };
    bytes.ok_or_else(|| ManifestError::Shape { name: tensor.name.clone(), dimensions, dtype: tensor.dtype })
}

/// A part of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub tensor: usize,
    /// Bytes of the tensor before this part.
    pub skip: u64,
    /// Where the part lies in the stream.
    pub stream: Range<u64>,
    /// The tensor ends with it.
    pub is_last: bool,
}

/// The stream cut into buckets of equal length; the last may be shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Buckets {
    stream_bytes: u64,
    bucket_bytes: u64,
}

impl Buckets {
    /// `bucket_bytes` is rounded up to whole [`ALIGN`]s.
    pub(super) fn new(stream_bytes: u64, bucket_bytes: u64) -> Self {
        let bucket_bytes = bucket_bytes.clamp(1, STREAM_BYTES_MAX).next_multiple_of(ALIGN);
        Self { stream_bytes, bucket_bytes }
    }

    /// At least one, so that weights of no bytes are sent like any others.
    pub(super) fn count(&self) -> u64 {
        self.stream_bytes.div_ceil(self.bucket_bytes).max(1)
    }

    pub(super) fn bucket_bytes(&self) -> u64 {
        self.bucket_bytes
    }

    /// Where a bucket lies in the stream.
    pub(super) fn range(&self, bucket: u64) -> Range<u64> {
        let start = bucket.saturating_mul(self.bucket_bytes).min(self.stream_bytes);
        start..start.saturating_add(self.bucket_bytes).min(self.stream_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor(name: &str, dtype: Dtype, shape: &[u64]) -> Tensor {
        Tensor { name: name.to_owned(), dtype, shape: shape.to_vec() }
    }

    #[test]
    fn tensors_lie_one_behind_the_other_on_boundaries() {
        let tensors = vec![
            tensor("a", Dtype::BF16, &[3, 5]),
            tensor("b", Dtype::F32, &[]),
            tensor("c", Dtype::U8, &[0, 7]),
            tensor("d", Dtype::F4, &[6]),
        ];
        let manifest = Manifest::new(tensors).unwrap();
        let places: Vec<_> = (0..4).map(|tensor| manifest.place(tensor)).collect();
        assert_eq!(places, [0..30, 256..260, 512..512, 512..515]);
        assert_eq!(manifest.stream_bytes(), 515);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let refused = |tensors: Vec<Tensor>| Manifest::new(tensors).unwrap_err().to_string();
        assert_eq!(refused(vec![]), "there are no tensors");
        let twice = vec![tensor("a", Dtype::U8, &[1]), tensor("a", Dtype::U8, &[1])];
        assert!(refused(twice).contains("`a` is there twice"));
        assert!(refused(vec![tensor("", Dtype::U8, &[1])]).contains("name of 0 bytes"));
        assert!(refused(vec![tensor("a", Dtype::F64, &[u64::MAX, 2])]).contains("no size in bytes"));
        assert!(refused(vec![tensor("a", Dtype::F4, &[3])]).contains("no size in bytes"), "half a byte");
        assert!(refused(vec![tensor("a", Dtype::U8, &[1; 17])]).contains("17 dimensions"));
        assert!(refused(vec![tensor("a", Dtype::U8, &[1 << 47])]).contains("more than"));
    }

    proptest! {
        #[test]
        fn buckets_and_pieces_cover_every_byte_of_every_tensor_once(
            sizes in prop::collection::vec(0..700_u64, 1..40), bucket_bytes in 1..2000_u64
        ) {
            let name = |number: usize| format!("{number:04}");
            let tensors = sizes.iter().enumerate().map(|(at, &size)| tensor(&name(at), Dtype::U8, &[size]));
            let manifest = Manifest::new(tensors.collect()).unwrap();
            let buckets = Buckets::new(manifest.stream_bytes(), bucket_bytes);
            let mut next: Vec<u64> = vec![0; sizes.len()];
            let mut ended = vec![0; sizes.len()];
            let mut end = 0;
            for bucket in 0..buckets.count() {
                let range = buckets.range(bucket);
                prop_assert_eq!(range.start, end);
                end = range.end;
                for piece in manifest.pieces(range.clone()) {
                    prop_assert!(piece.stream.start >= range.start && piece.stream.end <= range.end);
                    prop_assert_eq!(piece.skip, next[piece.tensor]);
                    prop_assert_eq!(manifest.place(piece.tensor).start + piece.skip, piece.stream.start);
                    next[piece.tensor] += piece.stream.end - piece.stream.start;
                    ended[piece.tensor] += usize::from(piece.is_last);
                }
            }
            prop_assert_eq!(end, manifest.stream_bytes());
            prop_assert_eq!(next, sizes);
            prop_assert!(ended.iter().all(|&times| times == 1), "{:?}", ended);
        }
    }
}
