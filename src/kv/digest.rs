//! A digest over the KV of a range of tokens (KV-4), the same whatever the layout, the block size or the number of ranks.
//!
//! The KV is a set of rows, one for each (layer, half, head, token), of little-endian 8-byte words; the last word is filled
//! up with zeros. The digest is the wrapping sum, over all words, of a mix of the word with a key made of its place:
//!
//! ```text
//! row key  = scatter((layer · halves + half) · heads + head, token)
//! word key = row key + word number · GOLDEN
//! x        = word ^ word key
//! mix      = low 32 bits of x · high 32 bits of x + word rotated by 32
//! ```
//!
//! A sum does not depend on order, so ranks, threads and GPU blocks may each add up their share. The product makes place
//! matter, the added word keeps a zero factor from hiding the other half. It finds errors, wrong blocks and torn reads; it
//! is no defence against somebody who forges KV on purpose, and such a one would need the run's secret first.
//!
//! Replicated heads count once. A replica that differs from its first copy changes the digest, so it cannot pass.
//! Opaque planes are rows of their own: (layer, head, block), since nobody can tell K, V and tokens in them apart.

use std::sync::Arc;

use super::layout::covered_from;
use super::shares::Scope;
use super::{BlockId, GroupGeometry, GroupKind, HeadRange, LayerPlacement, Layout, LayoutError};
use crate::memory::{Region, to_usize};

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
/// Rows are read in lumps of about this many bytes: small enough for the first-level cache.
const LUMP_BYTES: u64 = 8192;

/// The KV of one request on one side.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// For each KV group, a list that reaches to the last token.
    pub blocks: &'a [&'a [BlockId]],
    /// For each KV group, the first token that counts.
    pub from: &'a [u32],
    pub tokens: u32,
}

/// The digest of `span` in the memory that `layout` describes.
pub fn digest(layout: &Layout, regions: &[Arc<Region>], span: Span<'_>) -> Result<u64, LayoutError> {
    digest_of(layout, regions, span, &Scope::all(layout))
}

/// The same, of the heads in `scope` alone.
pub(super) fn digest_of(
    layout: &Layout,
    regions: &[Arc<Region>],
    span: Span<'_>,
    scope: &Scope,
) -> Result<u64, LayoutError> {
    let groups = layout.geometry().groups.len();
    if let Some(given) = [span.blocks.len(), span.from.len()].into_iter().find(|given| *given != groups) {
        return Err(LayoutError::Groups { given, groups });
    }
    let (mut total, mut planes, mut buffer) = (0_u64, 0, Vec::new());
    for (number, (group, layers)) in layout.groups().enumerate() {
        let (blocks, from, tokens) = (span.blocks[number], span.from[number], span.tokens);
        layout.check_blocks(blocks)?;
        let heads = group.planes_per_half(layout.geometry().tp_size);
        let first_plane = planes;
        planes += group.layers * group.halves() * heads;
        if from >= tokens {
            continue;
        }
        let listed_from = covered_from(group, blocks.len(), tokens, from)?;
        if group.opaque_planes.is_some() && !from.is_multiple_of(group.block_size) {
            return Err(LayoutError::FirstToken { first_token: from, block_size: group.block_size });
        }
        let mut reader =
            Reader { group, regions, blocks, listed_from, from, tokens, heads, first_plane, buffer: &mut buffer };
        let mut primary: Option<(HeadRange, u64)> = None;
        for &(heads, rank) in &scope.groups[number] {
            let sum = reader.rank(
                heads,
                heads.first - first_head(layout, group, rank),
                &layout.placements(rank)[layers.clone()],
            );
            match primary {
                Some((first, first_sum)) if first == heads => {
                    if sum != first_sum {
                        total = total.wrapping_add(scatter(rank, 0) | 1);
                    }
                }
                _ => {
                    primary = Some((heads, sum));
                    total = total.wrapping_add(sum);
                }
            }
        }
    }
    Ok(total)
}

fn first_head(layout: &Layout, group: &GroupGeometry, rank: u32) -> u32 {
    group.heads_of(rank, layout.geometry().tp_size).first
}

/// The mix of one row. `words` are the row's bytes, least significant first.
pub fn row(key: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut sum = 0_u64;
    let mut word_key = key;
    for word in words {
        sum = sum.wrapping_add(mix(u64::from_le_bytes(*word), word_key));
        word_key = word_key.wrapping_add(GOLDEN);
    }
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        sum = sum.wrapping_add(mix(u64::from_le_bytes(last), word_key));
    }
    sum
}

/// The key of a row: a plane, (layer · halves + half) · heads + head, and a token.
pub fn row_key(plane: u32, token: u32) -> u64 {
    scatter(plane, token)
}

#[inline]
fn mix(word: u64, key: u64) -> u64 {
    let x = word ^ key;
    (x & 0xFFFF_FFFF).wrapping_mul(x >> 32).wrapping_add(word.rotate_left(32))
}

/// The finaliser of splitmix64: neighbouring places get unrelated keys.
fn scatter(plane: u32, token: u32) -> u64 {
    let mut x = (u64::from(plane) << 32 | u64::from(token)).wrapping_add(GOLDEN);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// One KV group of a span.
struct Reader<'a> {
    group: &'a GroupGeometry,
    regions: &'a [Arc<Region>],
    blocks: &'a [BlockId],
    /// First token of the first block.
    listed_from: u32,
    from: u32,
    tokens: u32,
    /// Heads of the whole group, and the number of the group's first plane: parts of the rows' keys.
    heads: u32,
    first_plane: u32,
    buffer: &'a mut Vec<u8>,
}

/// Rows that lie `stride` bytes apart: consecutive tokens of one head, or consecutive heads of one token.
struct Rows {
    offset: u64,
    count: u32,
    stride: u64,
    plane: u32,
    token: u32,
    /// Whether the next row is the next head's, or the next token's.
    by_head: bool,
}

impl Reader<'_> {
    /// `heads` of one rank, which start at the rank's head number `offset`.
    fn rank(&mut self, heads: HeadRange, offset: u32, placements: &[LayerPlacement]) -> u64 {
        placements.iter().zip(0..).fold(0, |sum: u64, (placement, layer)| {
            let base = placement.base + u64::from(offset) * placement.head_stride;
            let placement = LayerPlacement { base, ..*placement };
            sum.wrapping_add(match self.group.kind {
                GroupKind::State => self.state(heads, layer, &placement),
                _ if self.group.is_opaque() => self.planes(heads, layer, &placement),
                _ => self.layer(heads, layer, &placement),
            })
        })
    }

    fn layer(&mut self, heads: HeadRange, layer: u32, placement: &LayerPlacement) -> u64 {
        let group = self.group;
        let content = group.content_bytes();
        let mut sum = 0_u64;
        let skipped = (self.from - self.listed_from) / group.block_size;
        for (&block, index) in self.blocks.iter().zip(0..).skip(skipped as usize) {
            let block_token = self.listed_from + index * group.block_size;
            let token = block_token.max(self.from);
            let tokens = (self.tokens - block_token).min(group.block_size) - (token - block_token);
            for half in 0..group.halves() {
                let offset = placement.base
                    + u64::from(block.0) * placement.block_stride
                    + u64::from(half) * placement.half_stride
                    + u64::from(token - block_token) * placement.token_stride;
                let plane = self.first_plane + (layer * group.halves() + half) * self.heads + heads.first;
                // Along whichever dimension is dense, so that one read brings many rows.
                if placement.head_stride <= placement.token_stride && heads.count > 1 {
                    for (token, step) in (token..token + tokens).zip(0_u32..) {
                        let offset = offset + u64::from(step) * placement.token_stride;
                        let stride = placement.head_stride;
                        let rows = Rows { offset, count: heads.count, stride, plane, token, by_head: true };
                        sum = sum.wrapping_add(self.rows(placement.region, content, &rows));
                    }
                } else {
                    for step in 0..heads.count {
                        let offset = offset + u64::from(step) * placement.head_stride;
                        let stride = placement.token_stride;
                        let rows = Rows { offset, count: tokens, stride, plane: plane + step, token, by_head: false };
                        sum = sum.wrapping_add(self.rows(placement.region, content, &rows));
                    }
                }
            }
        }
        sum
    }

    fn planes(&mut self, heads: HeadRange, layer: u32, placement: &LayerPlacement) -> u64 {
        let block_size = self.group.block_size;
        let skipped = (self.from - self.listed_from) / block_size;
        let first = self.listed_from / block_size;
        let blocks = self.blocks;
        let each = blocks.iter().zip(first..).skip(skipped as usize);
        each.fold(0, |sum: u64, (block, number)| sum.wrapping_add(self.plane(heads, layer, placement, *block, number)))
    }

    /// A state counts as the plane of block 0: sides with unequal block sizes hold the same last state.
    fn state(&mut self, heads: HeadRange, layer: u32, placement: &LayerPlacement) -> u64 {
        self.blocks.last().map_or(0, |block| self.plane(heads, layer, placement, *block, 0))
    }

    fn plane(&mut self, heads: HeadRange, layer: u32, placement: &LayerPlacement, block: BlockId, number: u32) -> u64 {
        let rows = Rows {
            offset: placement.base + u64::from(block.0) * placement.block_stride,
            count: heads.count,
            stride: placement.head_stride,
            plane: self.first_plane + layer * self.heads + heads.first,
            token: number,
            by_head: true,
        };
        self.rows(placement.region, self.group.plane_bytes(), &rows)
    }

    /// Adds up rows. As many as lie close together are read at once.
    fn rows(&mut self, region: u16, content: u64, rows: &Rows) -> u64 {
        let region = &self.regions[usize::from(region)];
        let stride = rows.stride.max(content);
        let dense = rows.stride >= content && stride <= 2 * content;
        let at_once = if dense { (LUMP_BYTES / stride).max(1) } else { 1 };
        let (mut sum, mut done) = (0_u64, 0_u64);
        while done < u64::from(rows.count) {
            let count = at_once.min(u64::from(rows.count) - done);
            let bytes = (count - 1) * stride + content;
            self.buffer.resize(to_usize(bytes), 0);
            region.copy_out(rows.offset + done * rows.stride, self.buffer).expect("a layout stays within its regions");
            for (step, bytes) in self.buffer.chunks(to_usize(stride)).enumerate() {
                let step = u32::try_from(done).unwrap_or(u32::MAX) + u32::try_from(step).unwrap_or(u32::MAX);
                let key = if rows.by_head {
                    row_key(rows.plane + step, rows.token)
                } else {
                    row_key(rows.plane, rows.token + step)
                };
                sum = sum.wrapping_add(row(key, &bytes[..to_usize(content)]));
            }
            done += count;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Arrangement, Cache, Shape};
    use super::*;

    fn of(cache: &Cache, blocks: &[BlockId], first_token: u32, tokens: u32) -> u64 {
        digest(&cache.layout, &cache.regions, Span { blocks: &[blocks], from: &[first_token], tokens }).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

        #[test]
        fn kv_4_the_digest_depends_on_the_kv_alone(
            layers in 1..3u32, head_log in 0..3u32, head_size in 1..12u32, tokens in 1..20u32, seed in any::<u64>(),
            mla in prop::bool::weighted(0.2),
        ) {
            let base = Shape { layers, kv_heads: if mla { 1 } else { 1 << head_log }, head_size, mla, num_blocks: 32, ..Shape::default() };
            let mut digests = Vec::new();
            for (block_size, tp_log) in [(1, 0), (4, 0), (4, 1), (8, 2), (2, 3)] {
                for arrangement in Arrangement::ALL {
                    let shape = Shape { block_size, tp_size: 1 << tp_log, ..base.clone() };
                    let blocks = shape.scattered_blocks(tokens, seed);
                    let cache = Cache::of_tokens(&shape, arrangement, &blocks, tokens, seed);
                    digests.push(of(&cache, &blocks, 0, tokens));
                }
            }
            prop_assert!(digests.iter().all(|digest| *digest == digests[0]), "{:x?}", digests);
        }
    }

    #[test]
    fn kv_4_every_changed_byte_every_swap_and_every_shift_changes_the_digest() {
        let shape = Shape { layers: 2, kv_heads: 2, head_size: 8, tp_size: 1, num_blocks: 6, ..Shape::default() };
        let blocks = [BlockId(3), BlockId(1)];
        let tokens = 2 * shape.block_size - 1;
        let cache = Cache::of_tokens(&shape, Arrangement::TokenMajor, &blocks, tokens, 5);
        let good = of(&cache, &blocks, 0, tokens);
        assert_eq!(good, of(&cache, &blocks, 0, tokens));
        assert_ne!(good, of(&cache, &[blocks[1], blocks[0]], 0, tokens), "blocks in another order");
        assert_ne!(good, of(&cache, &blocks, 0, tokens - 1), "a token fewer");
        assert_ne!(good, of(&cache, &[BlockId(3), BlockId(2)], 0, tokens), "a foreign block");
        cache.each_byte_of(&blocks, tokens, |region, offset| {
            let byte = region.to_vec(offset, 1).unwrap()[0];
            for flip in [1, 0x80, 0xff] {
                region.copy_in(offset, &[byte ^ flip]).unwrap();
                assert_ne!(of(&cache, &blocks, 0, tokens), good, "byte {offset} ^ {flip}");
            }
            region.copy_in(offset, &[byte]).unwrap();
        });
        assert_eq!(good, of(&cache, &blocks, 0, tokens));
    }

    #[test]
    fn kv_4_a_replica_that_differs_is_seen() {
        let shape = Shape { kv_heads: 1, tp_size: 2, num_blocks: 2, ..Shape::default() };
        let blocks = [BlockId(0)];
        let cache = Cache::of_tokens(&shape, Arrangement::SplitKv, &blocks, shape.block_size, 5);
        let good = of(&cache, &blocks, 0, shape.block_size);
        let placement = cache.layout.map().ranks[1][0];
        let region = &cache.regions[usize::from(placement.region)];
        let byte = region.to_vec(placement.base, 1).unwrap()[0];
        region.copy_in(placement.base, &[byte ^ 1]).unwrap();
        assert_ne!(of(&cache, &blocks, 0, shape.block_size), good);
    }

    #[test]
    fn kv_4_a_digest_may_begin_within_a_block() {
        let (small, large) = (Shape { block_size: 2, ..Shape::default() }, Shape { block_size: 8, ..Shape::default() });
        let (fine, coarse) = (small.scattered_blocks(7, 3), large.scattered_blocks(7, 4));
        let fine_cache = Cache::of_tokens(&small, Arrangement::HeadMajor, &fine, 7, 5);
        let coarse_cache = Cache::of_tokens(&large, Arrangement::TokenMajor, &coarse, 7, 5);
        for from in [0, 2, 4, 6] {
            assert_eq!(of(&fine_cache, &fine[from as usize / 2..], from, 7), of(&coarse_cache, &coarse, from, 7));
        }
    }

    #[test]
    fn spans_outside_the_cache_are_refused() {
        let shape = Shape { num_blocks: 2, ..Shape::default() };
        let cache = Cache::patterned(&shape, Arrangement::SplitKv, 1);
        let size = shape.block_size;
        let span = |blocks: &[_], first_token, tokens| {
            digest(&cache.layout, &cache.regions, Span { blocks: &[blocks], from: &[first_token], tokens })
        };
        assert!(matches!(span(&[BlockId(2)], 0, size), Err(LayoutError::Block { .. })));
        assert!(matches!(span(&[BlockId(1)], 0, size + 1), Err(LayoutError::Uncovered { .. })));
        assert_eq!(span(&[], size, size), Ok(0));
        let packed = Cache::patterned(&Shape { opaque: true, ..shape }, Arrangement::HeadMajor, 1);
        let within = Span { blocks: &[&[BlockId(1)]], from: &[1], tokens: size };
        assert!(matches!(digest(&packed.layout, &packed.regions, within), Err(LayoutError::FirstToken { .. })));
    }
}
