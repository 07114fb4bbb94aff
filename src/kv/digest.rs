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

use std::sync::{Arc, Mutex};

use super::layout::covered_from;
use super::runtime::locked;
use super::shares::Scope;
use super::{BlockId, GroupGeometry, GroupKind, HeadRange, LayerPlacement, Layout, LayoutError};
use crate::memory::{AccessError, GpuDigests, Region, Tile, row, row_key, to_usize};

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

/// Why there is no digest.
#[derive(Debug, thiserror::Error)]
pub(super) enum DigestError {
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Memory(#[from] AccessError),
}

/// The digest of `span` in the memory that `layout` describes, made by the processor.
pub fn digest(layout: &Layout, regions: &[Arc<Region>], span: Span<'_>) -> Result<u64, LayoutError> {
    let (scope, mut host) = (Scope::all(layout), HostRows::default());
    let mut sums = vec![0_u64; scope.len()];
    walk(layout, span, &scope, |sum, region, tile| {
        sums[sum] = sums[sum].wrapping_add(host.add(&regions[usize::from(region)], &tile));
    })?;
    Ok(combine(&scope, &sums))
}

/// The same, of the heads in `scope` alone. What lies on a GPU is digested there, by `gpu`.
pub(super) fn digest_of(
    layout: &Layout,
    regions: &[Arc<Region>],
    span: Span<'_>,
    scope: &Scope,
    gpu: Option<&Mutex<GpuDigests>>,
) -> Result<u64, DigestError> {
    let (mut sums, mut host, mut on_gpu) = (vec![0_u64; scope.len()], HostRows::default(), Vec::new());
    walk(layout, span, scope, |sum, region, tile| {
        let region = &*regions[usize::from(region)];
        if gpu.is_some() && region.device().is_some() {
            on_gpu.push((sum, region, tile));
        } else {
            sums[sum] = sums[sum].wrapping_add(host.add(region, &tile));
        }
    })?;
    if let Some(gpu) = gpu.filter(|_| !on_gpu.is_empty()) {
        locked(gpu).add(on_gpu, &mut sums)?;
    }
    Ok(combine(scope, &sums))
}

/// Goes over all rows of `span`: which of the scope's sums they count to, in which region they lie, and where.
fn walk(
    layout: &Layout,
    span: Span<'_>,
    scope: &Scope,
    mut each: impl FnMut(usize, u16, Tile),
) -> Result<(), LayoutError> {
    let groups = layout.geometry().groups.len();
    if let Some(given) = [span.blocks.len(), span.from.len()].into_iter().find(|given| *given != groups) {
        return Err(LayoutError::Groups { given, groups });
    }
    let (mut planes, mut sums) = (0, 0..);
    for (number, (group, layers)) in layout.groups().enumerate() {
        let (blocks, from, tokens) = (span.blocks[number], span.from[number], span.tokens);
        layout.check_blocks(blocks)?;
        let heads = group.planes_per_half(layout.geometry().tp_size);
        let first_plane = planes;
        planes += group.layers * group.halves() * heads;
        let shares = scope.groups[number].iter().zip(&mut sums);
        if from >= tokens {
            shares.for_each(drop);
            continue;
        }
        let listed_from = covered_from(group, blocks.len(), tokens, from)?;
        if group.opaque_planes.is_some() && !from.is_multiple_of(group.block_size) {
            return Err(LayoutError::FirstToken { first_token: from, block_size: group.block_size });
        }
        let reader = Reader { group, blocks, listed_from, from, tokens, heads, first_plane };
        for (&(heads, rank), sum) in shares {
            let offset = heads.first - first_head(layout, group, rank);
            reader
                .rank(heads, offset, &layout.placements(rank)[layers.clone()], |region, tile| each(sum, region, tile));
        }
    }
    Ok(())
}

/// The digest out of the sums of its shares. Replicas of one head must agree, and count once.
fn combine(scope: &Scope, sums: &[u64]) -> u64 {
    let mut sums = sums.iter();
    let mut total = 0_u64;
    for shares in &scope.groups {
        let mut primary: Option<(HeadRange, u64)> = None;
        for (&(heads, rank), &sum) in shares.iter().zip(&mut sums) {
            match primary {
                Some((first, first_sum)) if first == heads => {
                    if sum != first_sum {
                        total = total.wrapping_add(row_key(rank, 0) | 1);
                    }
                }
                _ => {
                    primary = Some((heads, sum));
                    total = total.wrapping_add(sum);
                }
            }
        }
    }
    total
}

fn first_head(layout: &Layout, group: &GroupGeometry, rank: u32) -> u32 {
    group.heads_of(rank, layout.geometry().tp_size).first
}

/// One KV group of a span.
struct Reader<'a> {
    group: &'a GroupGeometry,
    blocks: &'a [BlockId],
    /// First token of the first block.
    listed_from: u32,
    from: u32,
    tokens: u32,
    /// Heads of the whole group, and the number of the group's first plane: parts of the rows' keys.
    heads: u32,
    first_plane: u32,
}

impl Reader<'_> {
    /// `heads` of one rank, which start at the rank's head number `offset`.
    fn rank(&self, heads: HeadRange, offset: u32, placements: &[LayerPlacement], mut each: impl FnMut(u16, Tile)) {
        for (placement, layer) in placements.iter().zip(0..) {
            let base = placement.base + u64::from(offset) * placement.head_stride;
            let (placement, region) = (LayerPlacement { base, ..*placement }, placement.region);
            match self.group.kind {
                GroupKind::State => self.state(heads, layer, &placement, |tile| each(region, tile)),
                _ if self.group.is_opaque() => self.planes(heads, layer, &placement, |tile| each(region, tile)),
                _ => self.layer(heads, layer, &placement, |tile| each(region, tile)),
            }
        }
    }

    fn layer(&self, heads: HeadRange, layer: u32, placement: &LayerPlacement, mut each: impl FnMut(Tile)) {
        let group = self.group;
        let skipped = (self.from - self.listed_from) / group.block_size;
        for (&block, index) in self.blocks.iter().zip(0..).skip(skipped as usize) {
            let block_token = self.listed_from + index * group.block_size;
            let token = block_token.max(self.from);
            let tokens = (self.tokens - block_token).min(group.block_size) - (token - block_token);
            for half in 0..group.halves() {
                each(Tile {
                    offset: placement.base
                        + u64::from(block.0) * placement.block_stride
                        + u64::from(half) * placement.half_stride
                        + u64::from(token - block_token) * placement.token_stride,
                    head_stride: placement.head_stride,
                    token_stride: placement.token_stride,
                    heads: heads.count,
                    tokens,
                    plane: self.first_plane + (layer * group.halves() + half) * self.heads + heads.first,
                    token,
                    content: group.content_bytes(),
                });
            }
        }
    }

    fn planes(&self, heads: HeadRange, layer: u32, placement: &LayerPlacement, mut each: impl FnMut(Tile)) {
        let block_size = self.group.block_size;
        let skipped = (self.from - self.listed_from) / block_size;
        let first = self.listed_from / block_size;
        for (&block, number) in self.blocks.iter().zip(first..).skip(skipped as usize) {
            each(self.plane(heads, layer, placement, block, number));
        }
    }

    /// A state counts as the plane of block 0: sides with unequal block sizes hold the same last state.
    fn state(&self, heads: HeadRange, layer: u32, placement: &LayerPlacement, each: impl FnMut(Tile)) {
        self.blocks.last().map(|&block| self.plane(heads, layer, placement, block, 0)).into_iter().for_each(each);
    }

    fn plane(&self, heads: HeadRange, layer: u32, placement: &LayerPlacement, block: BlockId, number: u32) -> Tile {
        Tile {
            offset: placement.base + u64::from(block.0) * placement.block_stride,
            head_stride: placement.head_stride,
            token_stride: placement.head_stride,
            heads: heads.count,
            tokens: 1,
            plane: self.first_plane + layer * self.heads + heads.first,
            token: number,
            content: self.group.plane_bytes(),
        }
    }
}

/// Reads rows with the processor.
#[derive(Default)]
struct HostRows {
    buffer: Vec<u8>,
}

impl HostRows {
    /// The sum over a tile, along whichever dimension is dense, so that one read brings many rows.
    fn add(&mut self, region: &Region, tile: &Tile) -> u64 {
        let Tile { offset, head_stride, token_stride, heads, tokens, plane, token, content } = *tile;
        let by_head = head_stride <= token_stride && heads > 1;
        let (outer, inner) = if by_head { (tokens, heads) } else { (heads, tokens) };
        let (outer_stride, stride) = if by_head { (token_stride, head_stride) } else { (head_stride, token_stride) };
        (0..outer).fold(0, |sum: u64, line| {
            let offset = offset + u64::from(line) * outer_stride;
            sum.wrapping_add(self.line(region, offset, inner, stride, content, |step| {
                if by_head { row_key(plane + step, token + line) } else { row_key(plane + line, token + step) }
            }))
        })
    }

    /// Adds up `count` rows that lie `stride` bytes apart. As many as lie close together are read at once.
    fn line(
        &mut self,
        region: &Region,
        offset: u64,
        count: u32,
        stride: u64,
        content: u64,
        key: impl Fn(u32) -> u64,
    ) -> u64 {
        let apart = stride.max(content);
        let dense = stride >= content && apart <= 2 * content;
        let at_once = if dense { u32::try_from(LUMP_BYTES / apart).unwrap_or(u32::MAX).max(1) } else { 1 };
        let (mut sum, mut done) = (0_u64, 0);
        while done < count {
            let lump = at_once.min(count - done);
            self.buffer.resize(to_usize(u64::from(lump - 1) * apart + content), 0);
            let at = offset + u64::from(done) * stride;
            region.copy_out(at, &mut self.buffer).expect("a layout stays within its regions");
            for (bytes, step) in self.buffer.chunks(to_usize(apart)).zip(done..) {
                sum = sum.wrapping_add(row(key(step), &bytes[..to_usize(content)]));
            }
            done += lump;
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Arrangement, Cache, Shape};
    use super::*;
    use crate::memory::Device;

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

    /// The same bytes on a GPU.
    fn on_gpu(device: &Arc<Device>, cache: &Cache) -> Vec<Arc<Region>> {
        let moved = cache.regions.iter().map(|region| {
            let there = Region::allocated_on(device, to_usize(region.len())).unwrap();
            there.copy_in(0, &region.to_vec(0, region.len()).unwrap()).unwrap();
            there
        });
        moved.collect()
    }

    #[test]
    #[ignore = "needs a GPU"]
    fn kv_4_a_gpu_makes_the_same_digest_of_every_layout() {
        let device = Device::open(0).unwrap();
        let gpu = Mutex::new(GpuDigests::on(&device).unwrap());
        let shapes = [
            Shape {
                layers: 2,
                kv_heads: 8,
                head_size: 128,
                block_size: 16,
                tp_size: 2,
                num_blocks: 64,
                ..Shape::default()
            },
            Shape { layers: 1, kv_heads: 4, head_size: 5, block_size: 3, num_blocks: 16, ..Shape::default() },
            Shape {
                layers: 3,
                kv_heads: 1,
                head_size: 7,
                block_size: 4,
                mla: true,
                num_blocks: 16,
                ..Shape::default()
            },
            Shape {
                layers: 2,
                kv_heads: 2,
                head_size: 6,
                block_size: 4,
                opaque: true,
                num_blocks: 16,
                ..Shape::default()
            },
        ];
        for shape in shapes {
            for arrangement in Arrangement::ALL {
                let tokens = shape.block_size * 5 - if shape.opaque { 0 } else { 2 };
                let blocks = shape.scattered_blocks(tokens, 3);
                let cache = Cache::of_tokens(&shape, arrangement, &blocks, tokens, 5);
                let there = on_gpu(&device, &cache);
                let scope = Scope::all(&cache.layout);
                for from in [0, shape.block_size] {
                    let blocks = &blocks[(from / shape.block_size) as usize..];
                    let span = Span { blocks: &[blocks], from: &[from], tokens };
                    let made = digest_of(&cache.layout, &there, span, &scope, Some(&gpu)).unwrap();
                    assert_eq!(made, of(&cache, blocks, from, tokens), "{shape:?}, {arrangement:?}, from {from}");
                }
                let placement = cache.layout.map().ranks[0][0];
                let changed = &there[usize::from(placement.region)];
                let byte = changed.to_vec(placement.base, 1).unwrap()[0];
                changed.copy_in(placement.base, &[byte ^ 1]).unwrap();
                let all: Vec<BlockId> = (0..shape.num_blocks).map(BlockId).collect();
                let span = Span { blocks: &[&all], from: &[0], tokens: shape.num_blocks * shape.block_size };
                let sound = digest_of(&cache.layout, &cache.regions, span, &scope, None).unwrap();
                assert_ne!(digest_of(&cache.layout, &there, span, &scope, Some(&gpu)).unwrap(), sound, "{shape:?}");
            }
        }
    }
}
