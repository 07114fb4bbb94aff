//! Digests of tensors, made while their bytes pass (WT-5).
//!
//! Sender and receiver each run a [`StreamDigests`] over the stream, bucket by bucket in order; it yields the digest of a
//! tensor with the last of its bytes. A tensor is rows of [`ROW_BYTES`], the last may be shorter, and its digest the sum of
//! its rows' (`memory::row`): the same on the processor and, by a kernel, on the GPU that the bytes lie on. It finds what
//! goes wrong on the way; it is no defence against somebody who forges weights on purpose: for that there is the run's secret.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::manifest::{ALIGN, Manifest, Piece};
use crate::memory::{AccessError, GpuDigests, Region, Tile, row, row_key, to_u64, to_usize};

/// Bytes of a row. Buckets and tensors begin on such boundaries, so that no row is ever cut.
const ROW_BYTES: u64 = ALIGN;
/// Bytes are read in lumps of this size: they fit the first-level cache.
const LUMP_BYTES: usize = 16 * 1024;
/// Rows that one tile of the kernel's list has: enough tiles for all of a GPU in a bucket, and few enough for one launch.
const TILE_ROWS: u64 = 512;

/// The digest of one tensor's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorDigest(pub u64);

/// The digest of a whole set of weights: names, dtypes, shapes and bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WeightsDigest(pub [u8; 16]);

impl WeightsDigest {
    /// Of a manifest and the digest of each of its tensors, in whichever order they came.
    pub fn of(manifest: &Manifest, digests: &[TensorDigest]) -> Self {
        assert_eq!(manifest.tensors().len(), digests.len(), "a digest for each tensor");
        let mut hasher = Sha256::new();
        hasher.update(b"pdlink weights");
        let mut named: Vec<_> = manifest.tensors().iter().zip(digests).collect();
        named.sort_by(|(one, _), (other, _)| one.name.cmp(&other.name));
        for (tensor, digest) in named {
            let described = postcard::to_stdvec(tensor).expect("plain data always encodes");
            hasher.update(to_u64(described.len()).to_le_bytes());
            hasher.update(described);
            hasher.update(digest.0.to_le_bytes());
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
#[derive(Default)]
pub(super) struct StreamDigests {
    /// Of the tensor that has not ended.
    open: u64,
    done: Vec<TensorDigest>,
    lump: Vec<u8>,
    /// Made for the first bytes that a GPU sees: those on it, and those in host memory that is fixed for it, which it reads over the bus
    /// faster than a processor digests it.
    gpu: Option<GpuDigests>,
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
        let offset = |piece: &Piece| at + (piece.stream.start - range.start);
        let pieces: Vec<Piece> = manifest.pieces(range.clone()).collect();
        for part in pieces.chunks(GpuDigests::SUMS_MAX) {
            let sums = match region.digested_by() {
                None => {
                    let sums = part.iter().map(|piece| self.on_host(piece, region, offset(piece)));
                    sums.collect::<Result<Vec<_>, _>>()?
                }
                Some(device) => {
                    let gpu = match &mut self.gpu {
                        Some(gpu) => gpu,
                        none => none.insert(GpuDigests::on(device)?),
                    };
                    let mut sums = vec![0; part.len()];
                    let tiles = part.iter().enumerate().flat_map(|(number, piece)| {
                        tiles(piece, offset(piece)).map(move |tile| (number, region, tile))
                    });
                    gpu.add(tiles, &mut sums)?;
                    sums
                }
            };
            part.iter().zip(sums).for_each(|(piece, sum)| self.passed(piece, sum));
        }
        Ok(&self.done[before..])
    }

    fn passed(&mut self, piece: &Piece, sum: u64) {
        assert_eq!(piece.tensor, self.done.len(), "tensors pass in order");
        self.open = self.open.wrapping_add(sum);
        if piece.is_last {
            self.done.push(TensorDigest(std::mem::take(&mut self.open)));
        }
    }

    fn on_host(&mut self, piece: &Piece, region: &Region, offset: u64) -> Result<u64, AccessError> {
        self.lump.resize(LUMP_BYTES, 0);
        let (mut sum, mut done, len) = (0_u64, 0, piece.stream.end - piece.stream.start);
        while done < len {
            let lump = &mut self.lump[..to_usize((len - done).min(to_u64(LUMP_BYTES)))];
            region.copy_out(offset + done, lump)?;
            let first = (piece.skip + done) / ROW_BYTES;
            for (bytes, number) in lump.chunks(to_usize(ROW_BYTES)).zip(first..) {
                let (plane, token) = place(number);
                sum = sum.wrapping_add(row(row_key(plane, token), bytes));
            }
            done += to_u64(lump.len());
        }
        Ok(sum)
    }

    /// Of all tensors that have ended.
    pub(super) fn done(&self) -> &[TensorDigest] {
        &self.done
    }
}

/// A row's place in its tensor, in the words of the kernel.
fn place(row: u64) -> (u32, u32) {
    let [.., a, b, c, d] = row.to_be_bytes();
    let [high @ .., _, _, _, _] = row.to_be_bytes();
    (u32::from_be_bytes(high), u32::from_be_bytes([a, b, c, d]))
}

/// A piece's rows for the kernel, which lie at `offset`: whole ones in tiles, and the shorter one at a tensor's end.
fn tiles(piece: &Piece, offset: u64) -> impl Iterator<Item = Tile> {
    let len = piece.stream.end - piece.stream.start;
    let (first, whole, rest) = (piece.skip / ROW_BYTES, len / ROW_BYTES, len % ROW_BYTES);
    let tile = move |done: u64, rows: u64, content: u64| {
        let (plane, token) = place(first + done);
        Tile {
            offset: offset + done * ROW_BYTES,
            head_stride: ROW_BYTES,
            token_stride: ROW_BYTES,
            heads: 1,
            tokens: u32::try_from(rows).unwrap_or(0),
            plane,
            token,
            content,
        }
    };
    // Tiles end at multiples of their length, so that no number of a row overflows within one.
    let ends = move |done: u64| ((first + done) / TILE_ROWS + 1) * TILE_ROWS - first;
    let steps = std::iter::successors(Some(0), move |&done| Some(ends(done))).take_while(move |&done| done < whole);
    let wholes = steps.map(move |done| tile(done, ends(done).min(whole) - done, ROW_BYTES));
    wholes.chain((rest > 0).then(|| tile(whole, 1, rest)))
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

    /// What the kernel is given covers each row once, at the place that the processor has it.
    #[test]
    fn wt_5_tiles_are_the_rows_of_a_piece() {
        let region = Region::shared(1 << 20).unwrap();
        let bytes: Vec<u8> = (0..region.len()).map(|at| u8::try_from(at * 131 % 251).unwrap()).collect();
        region.copy_in(0, &bytes).unwrap();
        for (skip, len) in
            [(0, 0), (0, 1), (0, 256), (512, 1000), (256 * 511, 256 * 3), (1 << 40, 300_000), (256, 131_072)]
        {
            let piece = Piece { tensor: 0, skip, stream: 4096..4096 + len, is_last: true };
            let want = StreamDigests::default().on_host(&piece, &region, 256).unwrap();
            let sum = tiles(&piece, 256).fold(0_u64, |sum, tile| {
                let rows = (0..tile.tokens).map(|step| {
                    let bytes = region.to_vec(tile.offset + u64::from(step) * tile.token_stride, tile.content).unwrap();
                    row(row_key(tile.plane, tile.token.wrapping_add(step)), &bytes)
                });
                rows.fold(sum, u64::wrapping_add)
            });
            assert_eq!(sum, want, "{len} bytes from byte {skip} on");
        }
    }

    /// The kernel itself. Needs a GPU.
    #[test]
    #[ignore = "needs a GPU"]
    fn wt_5_a_gpu_digests_like_the_processor() {
        let device = crate::memory::Device::open(0).unwrap();
        let tensor = |name: &str, bytes| Tensor { name: name.to_owned(), dtype: Dtype::U8, shape: vec![bytes] };
        let sizes = [("a", 300), ("b", 0), ("c", 1 << 20), ("d", 8191), ("e", 256), ("f", (3 << 20) + 77)];
        let manifest = Manifest::new(sizes.iter().map(|(name, bytes)| tensor(name, *bytes)).collect()).unwrap();
        let host = Region::shared(to_usize(manifest.stream_bytes())).unwrap();
        let bytes: Vec<u8> = (0..manifest.stream_bytes()).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect();
        host.copy_in(0, &bytes).unwrap();
        let gpu = Region::allocated_on(&device, bytes.len()).unwrap();
        host.copy_to(0, &gpu, 0, host.len()).unwrap();
        let fixed = Region::shared(bytes.len()).unwrap();
        fixed.copy_in(0, &bytes).unwrap();
        fixed.pin_for(&device).unwrap();
        assert!(fixed.digested_by().is_some() && host.digested_by().is_none());
        for bucket_bytes in [256, 64 << 10, 1 << 30] {
            let digests = |region: &Region| {
                let (mut digests, buckets) = (StreamDigests::default(), Buckets::new(host.len(), bucket_bytes));
                for range in (0..buckets.count()).map(|bucket| buckets.range(bucket)) {
                    digests.pass(&manifest, range.clone(), region, range.start).unwrap();
                }
                digests.done().to_vec()
            };
            assert_eq!(digests(&gpu), digests(&host), "buckets of {bucket_bytes}");
            assert_eq!(digests(&fixed), digests(&host), "buckets of {bucket_bytes} in host memory that the GPU reads");
        }
    }
}
