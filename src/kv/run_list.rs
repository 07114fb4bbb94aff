//! From blocks to runs: what a transfer copies.
//!
//! Both layouts are strides, so everything that can be worked out without block ids is worked out once per pair of
//! workers, in a [`PairPlan`]: which rank sends which heads to which rank, and the pattern of one granule (the tokens of
//! the smaller block size) with all its contiguous dimensions merged: content, heads, tokens, halves and layers alike.
//! A transfer then adds block offsets to the pattern, and merges granules that are adjacent on both sides.
//!
//! The last granule is copied whole, also where the prompt ends inside it: its blocks belong to the request on both
//! sides, and half a granule would be more runs, not fewer bytes that matter.

use std::collections::BTreeMap;

use super::{BlockId, Geometry, LayerPlacement, Layout, LayoutError};
use crate::transport::{Run, RunList, Segment};

/// How KV goes from one layout to another.
#[derive(Debug, Clone)]
pub struct PairPlan {
    src: Side,
    dst: Side,
    /// Tokens per granule.
    granule: u32,
    groups: Vec<Group>,
}

#[derive(Debug, Clone, Copy)]
struct Side {
    block_size: u32,
    num_blocks: u32,
}

/// All that shares regions and strides: the same block offsets apply to every run of the pattern.
#[derive(Debug, Clone)]
struct Group {
    key: GroupKey,
    /// One granule at token 0 of block 0.
    pattern: Vec<Run>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct GroupKey {
    src_region: u16,
    dst_region: u16,
    src_block_stride: u64,
    dst_block_stride: u64,
    src_token_stride: u64,
    dst_token_stride: u64,
}

/// Which tokens a transfer moves, and the blocks that hold them.
#[derive(Debug, Clone, Copy)]
pub struct Extent<'a> {
    /// All of prefill's blocks, from token 0, for each KV group.
    pub src_blocks: &'a [&'a [BlockId]],
    /// Decode's blocks, from `first_token`, for each KV group.
    pub dst_blocks: &'a [&'a [BlockId]],
    pub first_token: u32,
    pub tokens: u32,
}

/// Heads that one rank gives another: offsets from each rank's first head.
struct Share {
    src_rank: usize,
    dst_rank: usize,
    src_head: u32,
    dst_head: u32,
    count: u32,
}

impl PairPlan {
    /// Plans copies from `src` to `dst`, which must fit ([`Layout::check_fits`]).
    pub fn new(src: &Layout, dst: &Layout) -> Result<Self, LayoutError> {
        src.check_fits(dst)?;
        let geometry = src.geometry();
        let granule = geometry.block_size.min(dst.geometry().block_size);
        let mut patterns: BTreeMap<GroupKey, Vec<Run>> = BTreeMap::new();
        for share in shares(geometry, dst.geometry()) {
            let placements = src.map().ranks[share.src_rank].iter().zip(&dst.map().ranks[share.dst_rank]);
            for (src, dst) in placements {
                let pattern = patterns.entry(GroupKey::of(src, dst)).or_default();
                add_granule(pattern, geometry, granule, &share, src, dst);
            }
        }
        let groups = patterns.into_iter().map(|(key, pattern)| Group { key, pattern: merged(pattern) }).collect();
        let side =
            |layout: &Layout| Side { block_size: layout.geometry().block_size, num_blocks: layout.map().num_blocks };
        Ok(Self { src: side(src), dst: side(dst), granule, groups })
    }

    /// The runs of one transfer. Checks every block id.
    pub fn runs(&self, extent: Extent<'_>) -> Result<RunList, LayoutError> {
        let granules = self.granules(extent)?;
        let mut segments: Vec<Segment> = Vec::new();
        for group in &self.groups {
            let GroupKey { src_region, dst_region, .. } = group.key;
            // Groups are in the order of their regions, so equal regions are neighbours: one segment, one post.
            if segments.last().is_none_or(|last| (last.src_region, last.dst_region) != (src_region, dst_region)) {
                segments.push(Segment { src_region, dst_region, runs: Vec::new() });
            }
            let runs = &mut segments.last_mut().expect("pushed above").runs;
            for pattern in &group.pattern {
                add_runs(runs, *pattern, &granules, &group.key);
            }
        }
        Ok(RunList { segments })
    }

    fn granules(&self, extent: Extent<'_>) -> Result<Vec<Granule>, LayoutError> {
        let Extent { src_blocks, dst_blocks, first_token, tokens } = extent;
        let (src_blocks, dst_blocks) = (only_group(src_blocks)?, only_group(dst_blocks)?);
        for (side, blocks, from) in [(self.src, src_blocks, 0), (self.dst, dst_blocks, first_token)] {
            if first_token % side.block_size != 0 {
                return Err(LayoutError::FirstToken { first_token, block_size: side.block_size });
            }
            let needed = u64::from(tokens.saturating_sub(from)).div_ceil(side.block_size.into());
            if (blocks.len() as u64) < needed {
                let (blocks, block_size) = (blocks.len(), side.block_size);
                return Err(LayoutError::Uncovered { blocks, block_size, first_token: from, tokens });
            }
            if let Some(block) = blocks.iter().find(|block| block.0 >= side.num_blocks) {
                return Err(LayoutError::Block { block: block.0, num_blocks: side.num_blocks });
            }
        }
        let count = tokens.saturating_sub(first_token).div_ceil(self.granule);
        let at = |blocks: &[BlockId], block_size: u32, token: u32| {
            let block = blocks[(token / block_size) as usize];
            (u64::from(block.0), u64::from(token % block_size))
        };
        Ok((0..count)
            .map(|index| {
                let token = index * self.granule;
                let (src_block, src_token) = at(src_blocks, self.src.block_size, first_token + token);
                let (dst_block, dst_token) = at(dst_blocks, self.dst.block_size, token);
                Granule { src_block, src_token, dst_block, dst_token }
            })
            .collect())
    }
}

/// The lists of all groups, borrowed.
pub(super) fn by_group(blocks: &[Vec<BlockId>]) -> Vec<&[BlockId]> {
    blocks.iter().map(Vec::as_slice).collect()
}

/// The blocks of the cache's one group.
pub(super) fn only_group<'a>(blocks: &[&'a [BlockId]]) -> Result<&'a [BlockId], LayoutError> {
    match blocks {
        [blocks] => Ok(blocks),
        _ => Err(LayoutError::Groups { given: blocks.len(), groups: 1 }),
    }
}

struct Granule {
    src_block: u64,
    src_token: u64,
    dst_block: u64,
    dst_token: u64,
}

impl GroupKey {
    fn of(src: &LayerPlacement, dst: &LayerPlacement) -> Self {
        Self {
            src_region: src.region,
            dst_region: dst.region,
            src_block_stride: src.block_stride,
            dst_block_stride: dst.block_stride,
            src_token_stride: src.token_stride,
            dst_token_stride: dst.token_stride,
        }
    }
}

/// Who gives which heads to whom. A head that several source ranks hold comes from one of them; the receiving ranks are
/// spread over the holders.
fn shares(src: &Geometry, dst: &Geometry) -> Vec<Share> {
    let mut shares = Vec::new();
    for dst_rank in 0..dst.tp_size {
        let wanted = dst.heads_of(dst_rank);
        let wanted_end = wanted.first + wanted.count;
        let mut head = wanted.first;
        while head < wanted_end {
            let holders = src.holders_of(head);
            let src_rank = holders.start + dst_rank % (holders.end - holders.start);
            let held = src.heads_of(src_rank);
            let count = (held.first + held.count).min(wanted_end) - head;
            shares.push(Share {
                src_rank: src_rank as usize,
                dst_rank: dst_rank as usize,
                src_head: head - held.first,
                dst_head: head - wanted.first,
                count,
            });
            head += count;
        }
    }
    shares
}

/// Adds one layer's part of one granule, dimension by dimension from the widest source stride to the narrowest, so that
/// what is contiguous comes in order.
fn add_granule(
    pattern: &mut Vec<Run>,
    geometry: &Geometry,
    granule: u32,
    share: &Share,
    src: &LayerPlacement,
    dst: &LayerPlacement,
) {
    let src_base = src.base + u64::from(share.src_head) * src.head_stride;
    let dst_base = dst.base + u64::from(share.dst_head) * dst.head_stride;
    let heads = (share.count, src.head_stride, dst.head_stride);
    let mut dims = [heads, (1, 0, 0), (1, 0, 0)];
    let mut len = geometry.plane_bytes();
    if geometry.opaque_planes.is_none() {
        dims[1] = (geometry.halves(), src.half_stride, dst.half_stride);
        dims[2] = (granule, src.token_stride, dst.token_stride);
        len = geometry.content_bytes();
    }
    dims.sort_by_key(|&(_, src_stride, _)| std::cmp::Reverse(src_stride));
    let [outer, middle, inner] = dims;
    for i in (0..outer.0).map(u64::from) {
        for j in (0..middle.0).map(u64::from) {
            for k in (0..inner.0).map(u64::from) {
                let src = src_base + i * outer.1 + j * middle.1 + k * inner.1;
                let dst = dst_base + i * outer.2 + j * middle.2 + k * inner.2;
                push(pattern, Run { src, dst, len });
            }
        }
    }
}

/// Sorts a pattern, and merges what is adjacent on both sides: layers that follow one another, for one.
fn merged(mut pattern: Vec<Run>) -> Vec<Run> {
    pattern.sort_unstable_by_key(|run| (run.src, run.dst));
    let mut merged = Vec::with_capacity(pattern.len());
    for run in pattern {
        push(&mut merged, run);
    }
    merged
}

fn push(runs: &mut Vec<Run>, run: Run) {
    match runs.last_mut() {
        Some(last) if last.src + last.len == run.src && last.dst + last.len == run.dst => last.len += run.len,
        _ => runs.push(run),
    }
}

/// Adds one run of the pattern for every granule.
fn add_runs(runs: &mut Vec<Run>, pattern: Run, granules: &[Granule], key: &GroupKey) {
    let run_of = |granule: &Granule| Run {
        src: pattern.src + granule.src_block * key.src_block_stride + granule.src_token * key.src_token_stride,
        dst: pattern.dst + granule.dst_block * key.dst_block_stride + granule.dst_token * key.dst_token_stride,
        len: pattern.len,
    };
    let Some((first, rest)) = granules.split_first() else { return };
    // The open run is kept out of the list, so that the loop reads no memory but the granules.
    let mut open = run_of(first);
    for granule in rest {
        let run = run_of(granule);
        if open.src + open.len == run.src && open.dst + open.len == run.dst {
            open.len += run.len;
        } else {
            runs.push(open);
            open = run;
        }
    }
    push(runs, open);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Arrangement, Cache, Shape, oracle_copy};
    use super::*;

    fn blocks(ids: &[u32]) -> Vec<BlockId> {
        ids.iter().copied().map(BlockId).collect()
    }

    fn plan(shape: Shape, src: Arrangement, dst: Arrangement) -> PairPlan {
        PairPlan::new(&shape.layout(src), &shape.layout(dst)).unwrap()
    }

    #[test]
    fn adjacent_blocks_of_one_layout_are_one_run_for_each_allocation() {
        let shape = Shape { layers: 3, num_blocks: 8, ..Shape::default() };
        let (src, dst) = (blocks(&[2, 3, 4]), blocks(&[5, 6, 7]));
        let tokens = 3 * shape.block_size;
        let (src, dst): (&[_], &[_]) = (&[&src[..]], &[&dst[..]]);
        let extent = Extent { src_blocks: src, dst_blocks: dst, first_token: 0, tokens };
        let runs = plan(shape.clone(), Arrangement::SplitKv, Arrangement::SplitKv).runs(extent).unwrap();
        assert_eq!((runs.segments.len(), runs.runs()), (3, 3), "a region and a run for each layer");
        let runs = plan(shape.clone(), Arrangement::TokenMajor, Arrangement::TokenMajor).runs(extent).unwrap();
        assert_eq!((runs.segments.len(), runs.runs()), (1, 3), "one region for all layers");
        let runs = plan(shape.clone(), Arrangement::LayersInBlock, Arrangement::LayersInBlock).runs(extent).unwrap();
        assert_eq!((runs.segments.len(), runs.runs()), (1, 1), "all layers of a block are adjacent");
        let scattered = blocks(&[5, 7, 6]);
        let extent = Extent { dst_blocks: &[&scattered], ..extent };
        let runs = plan(shape, Arrangement::SplitKv, Arrangement::SplitKv).runs(extent).unwrap();
        assert_eq!((runs.segments.len(), runs.runs()), (3, 9), "posts stay O(layers)");
    }

    #[test]
    fn bad_extents_are_refused_by_name() {
        let shape = Shape { num_blocks: 4, block_size: 4, ..Shape::default() };
        let plan = plan(shape, Arrangement::SplitKv, Arrangement::HeadMajor);
        let (good, short, beyond) = (blocks(&[0, 1]), blocks(&[0]), blocks(&[0, 4]));
        let runs = |src: &[_], dst: &[_], first_token, tokens| {
            plan.runs(Extent { src_blocks: &[src], dst_blocks: &[dst], first_token, tokens })
        };
        assert!(runs(&good, &good, 0, 8).is_ok());
        assert_eq!(runs(&good, &short, 4, 8).unwrap().bytes(), 2 * runs(&good, &good, 0, 8).unwrap().bytes() / 4);
        assert!(matches!(runs(&short, &good, 0, 8), Err(LayoutError::Uncovered { .. })));
        assert!(matches!(runs(&good, &short, 0, 8), Err(LayoutError::Uncovered { .. })));
        assert!(matches!(runs(&beyond, &good, 0, 8), Err(LayoutError::Block { block: 4, num_blocks: 4 })));
        assert!(matches!(runs(&good, &beyond, 0, 8), Err(LayoutError::Block { .. })));
        assert!(matches!(runs(&good, &good, 3, 8), Err(LayoutError::FirstToken { .. })));
        assert_eq!(runs(&good, &[], 8, 8).unwrap(), RunList::default_for(&plan), "nothing to move");
    }

    impl RunList {
        fn default_for(plan: &PairPlan) -> Self {
            plan.runs(Extent { src_blocks: &[&[]], dst_blocks: &[&[]], first_token: 0, tokens: 0 }).unwrap()
        }
    }

    fn arrangements() -> impl Strategy<Value = Arrangement> {
        prop::sample::select(Arrangement::ALL.to_vec())
    }

    prop_compose! {
        fn pairs()(
            layers in 1..4u32, head_log in 0..4u32, head_size in 1..5u32, element_bytes in 1..3u32,
            small in 1..5u32, factor in 1..4u32, flip in any::<bool>(), equal in any::<bool>(),
            src_tp_log in 0..4u32, dst_tp_log in 0..4u32, mla in prop::bool::weighted(0.2),
            src in arrangements(), dst in arrangements(),
            tokens in 1..40u32, first in 0..3u32, seed in any::<u64>(),
        ) -> (Shape, Arrangement, Shape, Arrangement, u32, u32, u64) {
            let factor = if equal { 1 } else { factor };
            let (src_block, dst_block) = if flip { (small * factor, small) } else { (small, small * factor) };
            let shape = |block_size, tp_log: u32| Shape {
                layers, kv_heads: if mla { 1 } else { 1 << head_log }, head_size, element_bytes, mla,
                block_size, tp_size: 1 << tp_log, num_blocks: 48, opaque: false,
            };
            let first_token = (first * small * factor).min(tokens / (small * factor) * (small * factor));
            (shape(src_block, src_tp_log), src, shape(dst_block, dst_tp_log), dst, tokens, first_token, seed)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

        #[test]
        fn runs_move_every_element_to_its_place_and_nothing_else(
            (src_shape, src_arr, dst_shape, dst_arr, tokens, first_token, seed) in pairs()
        ) {
            let src = Cache::patterned(&src_shape, src_arr, seed);
            let dst = Cache::patterned(&dst_shape, dst_arr, !seed);
            let src_blocks = src_shape.scattered_blocks(tokens, seed);
            let dst_blocks = dst_shape.scattered_blocks(tokens - first_token, seed ^ 1);
            let extent = Extent { src_blocks: &[&src_blocks], dst_blocks: &[&dst_blocks], first_token, tokens };
            let want = oracle_copy(&src, &dst, extent);
            let runs = PairPlan::new(&src.layout, &dst.layout).unwrap().runs(extent).unwrap();
            for segment in &runs.segments {
                for run in &segment.runs {
                    let (from, to) = (&src.regions[usize::from(segment.src_region)],
                        &dst.regions[usize::from(segment.dst_region)]);
                    from.copy_to(run.src, to, run.dst, run.len).unwrap();
                }
            }
            prop_assert_eq!(dst.bytes(), want);
        }
    }

    #[test]
    fn opaque_planes_move_whole() {
        let shape = Shape { opaque: true, layers: 2, kv_heads: 4, num_blocks: 6, ..Shape::default() };
        let src = Cache::patterned(&Shape { tp_size: 1, ..shape.clone() }, Arrangement::HeadMajor, 1);
        let dst = Cache::patterned(&Shape { tp_size: 2, ..shape.clone() }, Arrangement::HeadMajor, 2);
        let (src_blocks, dst_blocks) = (blocks(&[4, 1]), blocks(&[0, 3]));
        let tokens = shape.block_size + 1;
        let extent = Extent { src_blocks: &[&src_blocks], dst_blocks: &[&dst_blocks], first_token: 0, tokens };
        let want = oracle_copy(&src, &dst, extent);
        for segment in &PairPlan::new(&src.layout, &dst.layout).unwrap().runs(extent).unwrap().segments {
            for run in &segment.runs {
                let to = &dst.regions[usize::from(segment.dst_region)];
                src.regions[usize::from(segment.src_region)].copy_to(run.src, to, run.dst, run.len).unwrap();
            }
        }
        assert_eq!(dst.bytes(), want);
    }
}
