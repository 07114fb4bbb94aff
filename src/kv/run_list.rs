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
use std::ops::Range;
use std::sync::Arc;

use super::layout::{check_blocks, covered_from};
use super::shares::{Scope, Share, shared};
use super::{BlockId, GroupGeometry, GroupKind, LayerPlacement, Layout, LayoutError};
use crate::transport::{Run, RunList, Runs, Segment};

/// Lists of runs that are looked through for one that another layer can use too.
const LISTS_KEPT: usize = 16;

/// How KV goes from one runtime's memory to another's.
#[derive(Debug, Clone)]
pub struct PairPlan {
    groups: Vec<GroupPlan>,
    /// For each layer what [`GroupPlan::strided`] has for all: what parts of a transfer are made of.
    layers: Vec<Vec<Strided>>,
    /// What is moved, as decode holds it.
    pub(super) taken: Arc<Scope>,
}

/// One KV group of a pair.
#[derive(Debug, Clone)]
struct GroupPlan {
    src: Side,
    dst: Side,
    /// Tokens per granule.
    granule: u32,
    strided: Vec<Strided>,
}

#[derive(Debug, Clone)]
struct Side {
    group: GroupGeometry,
    num_blocks: u32,
}

/// All that shares regions and strides: the same block offsets apply to every run of the pattern.
#[derive(Debug, Clone)]
struct Strided {
    key: StrideKey,
    /// One granule at token 0 of block 0.
    pattern: Vec<Run>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct StrideKey {
    src_region: u16,
    dst_region: u16,
    src_block_stride: u64,
    dst_block_stride: u64,
    src_token_stride: u64,
    dst_token_stride: u64,
}

/// Which tokens a transfer moves, and the blocks that hold them: for each KV group a list that reaches to the last token.
#[derive(Debug, Clone, Copy)]
pub struct Extent<'a> {
    /// Prefill's blocks, from token 0 on, or from where its window begins.
    pub src_blocks: &'a [&'a [BlockId]],
    /// Decode's blocks, from `first_token` on or before it, or from where its window begins.
    pub dst_blocks: &'a [&'a [BlockId]],
    /// A multiple of decode's block size.
    pub first_token: u32,
    pub tokens: u32,
}

/// Some layers of some tokens: what a prefill in progress has ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    pub layers: Range<u32>,
    /// Multiples of [`PairPlan::granule`], but for the end of the last part.
    pub tokens: Range<u32>,
}

impl PairPlan {
    /// Plans copies from `src` to `dst`, which must fit ([`Layout::check_feeds`]).
    pub fn new(src: &Layout, dst: &Layout) -> Result<Self, LayoutError> {
        src.check_feeds(dst)?;
        let mut by_layer = Vec::new();
        let groups = src.groups().zip(dst.groups()).map(|((group, layers), (dst_group, _))| {
            let side = |layout: &Layout, group: &GroupGeometry| Side {
                group: group.clone(),
                num_blocks: layout.map().num_blocks,
            };
            let granule = group.block_size.min(dst_group.block_size);
            let mut of_layers = vec![Patterns::new(); layers.len()];
            for share in shared(group, src, dst) {
                let heads = Heads::of(&share, group, src, dst);
                let src_layers = &src.placements(share.src_rank)[layers.clone()];
                let dst_layers = &dst.placements(share.dst_rank)[layers.clone()];
                for ((src, dst), patterns) in src_layers.iter().zip(dst_layers).zip(&mut of_layers) {
                    let pattern = patterns.entry(StrideKey::of(src, dst)).or_default();
                    add_granule(pattern, group, granule, &heads, src, dst);
                }
            }
            by_layer.extend(of_layers.iter().map(|patterns| strided(patterns.clone())));
            let mut patterns = Patterns::new();
            for (key, pattern) in of_layers.into_iter().flatten() {
                patterns.entry(key).or_default().extend(pattern);
            }
            let strided = strided(patterns);
            GroupPlan { src: side(src, group), dst: side(dst, dst_group), granule, strided }
        });
        Ok(Self { groups: groups.collect(), layers: by_layer, taken: Arc::new(Scope::taken(src, dst)) })
    }

    /// For each KV group the first token that moves; the number of tokens, if none does. Checks every block id.
    pub fn first_tokens(&self, extent: Extent<'_>) -> Result<Vec<u32>, LayoutError> {
        let lists = self.groups.iter().zip(self.lists(&extent)?);
        lists.map(|(group, (src, dst))| group.first_token(src, dst, extent.first_token, extent.tokens)).collect()
    }

    /// The runs of one transfer. Checks every block id.
    pub fn runs(&self, extent: Extent<'_>) -> Result<RunList, LayoutError> {
        let mut segments: Vec<Segment> = Vec::new();
        for (number, (group, (src, dst))) in self.groups.iter().zip(self.lists(&extent)?).enumerate() {
            let from = group.first_token(src, dst, extent.first_token, extent.tokens)?;
            let first =
                |side: &Side, blocks: &[BlockId]| side.group.covered_from(blocks.len(), extent.tokens).unwrap_or(0);
            let (src, dst) = ((src, first(&group.src, src)), (dst, first(&group.dst, dst)));
            let granules = group.granules(src, dst, from, extent.tokens);
            add_segments(&mut segments, number > 0, &group.strided, &granules, group.granule);
        }
        Ok(RunList { segments })
    }

    /// Whether parts of a transfer can be told by layers and tokens: one block table, and every token's KV in a place of its
    /// own until the end.
    pub fn has_parts(&self) -> bool {
        let plain = |group: &GroupPlan| {
            let [src, dst] = [&group.src.group, &group.dst.group];
            src.kind != GroupKind::State && src.window.is_none() && dst.window.is_none()
        };
        matches!(&self.groups[..], [group] if plain(group))
    }

    /// Tokens that move together.
    pub fn granule(&self) -> u32 {
        self.groups.iter().map(|group| group.granule).max().unwrap_or(1)
    }

    /// Bytes of one token in one layer, of what this pair moves.
    pub fn row_bytes(&self) -> u64 {
        let of_pattern = |strided: &Strided| strided.pattern.iter().map(|run| run.len).sum::<u64>();
        let granules: u64 = self.groups.iter().flat_map(|group| &group.strided).map(of_pattern).sum();
        granules / u64::from(self.granule() * self.layers().max(1))
    }

    pub fn layers(&self) -> u32 {
        u32::try_from(self.layers.len()).unwrap_or(u32::MAX)
    }

    /// Blocks that stand for prefill's as long as nobody knows those: what is pushed lands in the same places.
    pub fn stand_in(&self, tokens: u32) -> Vec<Vec<BlockId>> {
        let blocks = |group: &GroupPlan| {
            let count = group.src.group.blocks_for(tokens);
            (0..count).map(|block| BlockId(block % group.src.num_blocks)).collect()
        };
        self.groups.iter().map(blocks).collect()
    }

    /// The runs of one part, where there are parts. `extent` is that of the whole, but that prefill's list may end with the
    /// part, or later.
    pub fn part(&self, extent: Extent<'_>, part: &Part) -> Result<RunList, LayoutError> {
        let (src, dst) = self.lists(&extent)?.next().ok_or(LayoutError::Groups { given: 0, groups: 1 })?;
        let group = &self.groups[0];
        check_blocks(src, group.src.num_blocks)?;
        check_blocks(dst, group.dst.num_blocks)?;
        let Range { start: from, end: to } = part.tokens;
        covered_from(&group.src.group, src.len().min(group.src.group.blocks_for(to) as usize), to, 0)?;
        let dst_first = covered_from(&group.dst.group, dst.len(), extent.tokens, from)?;
        let granules = group.granules((src, 0), (dst, dst_first), from, to);
        let mut patterns = Patterns::new();
        for strided in self.layers.iter().take(part.layers.end as usize).skip(part.layers.start as usize).flatten() {
            patterns.entry(strided.key).or_default().extend(&strided.pattern);
        }
        let mut segments = Vec::new();
        add_segments(&mut segments, false, &strided(patterns), &granules, group.granule);
        Ok(RunList { segments })
    }

    /// The two lists of each group.
    fn lists<'a>(
        &self,
        extent: &Extent<'a>,
    ) -> Result<impl Iterator<Item = (&'a [BlockId], &'a [BlockId])> + use<'a>, LayoutError> {
        let groups = self.groups.len();
        match [extent.src_blocks, extent.dst_blocks].into_iter().find(|lists| lists.len() != groups) {
            Some(lists) => Err(LayoutError::Groups { given: lists.len(), groups }),
            None => Ok(extent.src_blocks.iter().copied().zip(extent.dst_blocks.iter().copied())),
        }
    }
}

/// Adds the runs of these granules. Layers in regions of their own are mostly alike: one list of runs serves all of them.
fn add_segments(
    segments: &mut Vec<Segment>,
    is_later_group: bool,
    strided: &[Strided],
    granules: &[Granule],
    granule: u32,
) {
    // As many as there are ranks and kinds of layers: few.
    let mut made: Vec<(&Strided, Arc<Runs>)> = Vec::new();
    for strided in strided {
        let known = made.iter().rev().take(LISTS_KEPT).find(|(other, _)| other.is_like(strided));
        let runs = known.map(|(_, runs)| Arc::clone(runs)).unwrap_or_else(|| {
            made.push((strided, Arc::new(Runs::new(strided.runs(granules, granule)))));
            Arc::clone(&made[made.len() - 1].1)
        });
        put_segment(segments, is_later_group, &strided.key, &runs);
    }
}

/// Equal regions are neighbours within one KV group; only groups may share them apart.
fn put_segment(segments: &mut Vec<Segment>, is_later_group: bool, key: &StrideKey, runs: &Arc<Runs>) {
    let StrideKey { src_region, dst_region, .. } = *key;
    let is_same = |segment: &&mut Segment| (segment.src_region, segment.dst_region) == (src_region, dst_region);
    let found = if is_later_group { segments.iter_mut().find(is_same) } else { segments.last_mut().filter(is_same) };
    match found {
        Some(segment) => *segment = Segment::new(src_region, dst_region, [&segment.runs[..], &runs[..]].concat()),
        None => segments.push(Segment { src_region, dst_region, runs: Arc::clone(runs) }),
    }
}

impl Strided {
    /// Whether granules give both the same runs, but for the regions that these count from.
    fn is_like(&self, other: &Self) -> bool {
        let regions = (other.key.src_region, other.key.dst_region);
        let key = StrideKey { src_region: regions.0, dst_region: regions.1, ..self.key };
        key == other.key && self.pattern == other.pattern
    }

    /// `granule`: the tokens of one.
    fn runs(&self, granules: &[Granule], granule: u32) -> Vec<Run> {
        let mut runs = Vec::with_capacity(self.pattern.len() * granules.len());
        if self.pattern.iter().any(|run| self.may_go_on(run, granule)) {
            self.pattern.iter().for_each(|pattern| add_runs(&mut runs, *pattern, granules, &self.key));
        } else {
            // Runs of one granule lie together, and often at equal distances.
            let of_granule = |granule| self.pattern.iter().map(move |pattern| run_of(pattern, granule, &self.key));
            runs.extend(granules.iter().flat_map(of_granule));
        }
        runs
    }

    /// Whether a run of one granule may end where the next granule's begins, at both ends.
    fn may_go_on(&self, run: &Run, granule: u32) -> bool {
        let reaches = |token_stride, block_stride| [u64::from(granule) * token_stride, block_stride].contains(&run.len);
        let StrideKey { src_block_stride, dst_block_stride, src_token_stride, dst_token_stride, .. } = self.key;
        reaches(src_token_stride, src_block_stride) && reaches(dst_token_stride, dst_block_stride)
    }
}

impl GroupPlan {
    /// The first token that moves, given what of the request each side has blocks for.
    fn first_token(&self, src: &[BlockId], dst: &[BlockId], first: u32, tokens: u32) -> Result<u32, LayoutError> {
        check_blocks(src, self.src.num_blocks)?;
        check_blocks(dst, self.dst.num_blocks)?;
        if first >= tokens {
            return Ok(tokens);
        }
        let (group, block_size) = (&self.dst.group, self.dst.group.block_size);
        let needed = group.needed_from(tokens).max(first);
        let src_first = covered_from(&self.src.group, src.len(), tokens, needed)?;
        let dst_first = covered_from(group, dst.len(), tokens, needed)?;
        if group.kind == GroupKind::State {
            return Ok(needed);
        }
        if !first.is_multiple_of(block_size) {
            return Err(LayoutError::FirstToken { first_token: first, block_size });
        }
        Ok(first.max(src_first).max(dst_first))
    }

    /// The granules of tokens `from..to`, which both lists cover; each list with its first token.
    fn granules(&self, src: (&[BlockId], u32), dst: (&[BlockId], u32), from: u32, to: u32) -> Vec<Granule> {
        let (Some(src_last), Some(dst_last)) = (src.0.last(), dst.0.last()) else { return Vec::new() };
        if from >= to {
            return Vec::new();
        }
        if self.src.group.kind == GroupKind::State {
            let (src_block, dst_block) = (src_last.0.into(), dst_last.0.into());
            return vec![Granule { src_block, src_token: 0, dst_block, dst_token: 0 }];
        }
        let at = |(blocks, first): (&[BlockId], u32), block_size: u32, token: u32| {
            let block = blocks[((token - first) / block_size) as usize];
            (u64::from(block.0), u64::from(token % block_size))
        };
        let (src_size, dst_size) = (self.src.group.block_size, self.dst.group.block_size);
        (from..to)
            .step_by(self.granule as usize)
            .map(|token| {
                let (src_block, src_token) = at(src, src_size, token);
                let (dst_block, dst_token) = at(dst, dst_size, token);
                Granule { src_block, src_token, dst_block, dst_token }
            })
            .collect()
    }
}

/// Runs of one granule, by the strides that go with them.
type Patterns = BTreeMap<StrideKey, Vec<Run>>;

fn strided(patterns: Patterns) -> Vec<Strided> {
    patterns.into_iter().map(|(key, pattern)| Strided { key, pattern: merged(pattern) }).collect()
}

/// The lists of all groups, borrowed.
pub(super) fn by_group(blocks: &[Vec<BlockId>]) -> Vec<&[BlockId]> {
    blocks.iter().map(Vec::as_slice).collect()
}

struct Granule {
    src_block: u64,
    src_token: u64,
    dst_block: u64,
    dst_token: u64,
}

impl StrideKey {
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

/// Heads that one rank gives another: offsets from each rank's first head.
struct Heads {
    src: u32,
    dst: u32,
    count: u32,
}

impl Heads {
    fn of(share: &Share, group: &GroupGeometry, src: &Layout, dst: &Layout) -> Self {
        let first = |layout: &Layout, rank| group.heads_of(rank, layout.geometry().tp_size).first;
        let (src, dst) = (first(src, share.src_rank), first(dst, share.dst_rank));
        Self { src: share.heads.first - src, dst: share.heads.first - dst, count: share.heads.count }
    }
}

/// Adds one layer's part of one granule, dimension by dimension from the widest source stride to the narrowest, so that
/// what is contiguous comes in order.
fn add_granule(
    pattern: &mut Vec<Run>,
    group: &GroupGeometry,
    granule: u32,
    heads: &Heads,
    src: &LayerPlacement,
    dst: &LayerPlacement,
) {
    let src_base = src.base + u64::from(heads.src) * src.head_stride;
    let dst_base = dst.base + u64::from(heads.dst) * dst.head_stride;
    let heads = (heads.count, src.head_stride, dst.head_stride);
    let mut dims = [heads, (1, 0, 0), (1, 0, 0)];
    let mut len = group.plane_bytes();
    if !group.is_opaque() {
        dims[1] = (group.halves(), src.half_stride, dst.half_stride);
        dims[2] = (granule, src.token_stride, dst.token_stride);
        len = group.content_bytes();
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

fn run_of(pattern: &Run, granule: &Granule, key: &StrideKey) -> Run {
    Run {
        src: pattern.src + granule.src_block * key.src_block_stride + granule.src_token * key.src_token_stride,
        dst: pattern.dst + granule.dst_block * key.dst_block_stride + granule.dst_token * key.dst_token_stride,
        len: pattern.len,
    }
}

/// Adds one run of the pattern for every granule.
fn add_runs(runs: &mut Vec<Run>, pattern: Run, granules: &[Granule], key: &StrideKey) {
    let run_of = |granule: &Granule| run_of(&pattern, granule, key);
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

    fn copy(segment: &Segment, src: &Cache, dst: &Cache) {
        let (from, to) = (usize::from(segment.src_region), usize::from(segment.dst_region));
        let runs = segment.runs.iter();
        runs.for_each(|run| src.regions[from].copy_to(run.src, &dst.regions[to], run.dst, run.len).unwrap());
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
        let is_one_list = |pair: &[Segment]| Arc::ptr_eq(&pair[0].runs, &pair[1].runs);
        assert!(runs.segments.windows(2).all(is_one_list), "made once");
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
                block_size, tp_size: 1 << tp_log, num_blocks: 48, ..Shape::default()
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
            runs.segments.iter().for_each(|segment| copy(segment, &src, &dst));
            prop_assert_eq!(dst.bytes(), want);
        }

        /// However it is cut into parts, and whatever stands for prefill's blocks: the same bytes land, in places that were
        /// permitted.
        #[test]
        fn parts_add_up_to_the_whole(
            (src_shape, src_arr, dst_shape, dst_arr, tokens, first_token, seed) in pairs(), chunk in 1..17u32, few in 1..4u32,
        ) {
            let src = Cache::patterned(&src_shape, src_arr, seed);
            let dst = Cache::patterned(&dst_shape, dst_arr, !seed);
            let src_blocks = src_shape.scattered_blocks(tokens, seed);
            let dst_blocks = dst_shape.scattered_blocks(tokens - first_token, seed ^ 1);
            let extent = Extent { src_blocks: &[&src_blocks], dst_blocks: &[&dst_blocks], first_token, tokens };
            let want = oracle_copy(&src, &dst, extent);
            let plan = PairPlan::new(&src.layout, &dst.layout).unwrap();
            prop_assert!(plan.has_parts());
            let stand_in = plan.stand_in(tokens);
            let permitted = plan.runs(Extent { src_blocks: &by_group(&stand_in), ..extent }).unwrap();
            let mut allowed: Vec<(u16, u64, u64)> = Vec::new();
            for segment in &permitted.segments {
                allowed.extend(segment.runs.iter().map(|run| (segment.dst_region, run.dst, run.dst + run.len)));
            }
            let step = chunk * plan.granule();
            for from in (first_token..tokens).step_by(step as usize) {
                let to = (from + step).min(tokens);
                let known = &src_blocks[..to.div_ceil(src_shape.block_size) as usize];
                for layer in (0..plan.layers()).step_by(few as usize) {
                    let part = Part { layers: layer..(layer + few).min(plan.layers()), tokens: from..to };
                    for segment in plan.part(Extent { src_blocks: &[known], ..extent }, &part).unwrap().segments {
                        copy(&segment, &src, &dst);
                        for run in segment.runs.iter() {
                            let bytes = run.dst..run.dst + run.len;
                            let is_allowed = |at: u64| allowed.iter().any(|(region, first, end)| {
                                *region == segment.dst_region && (*first..*end).contains(&at)
                            });
                            prop_assert!(is_allowed(bytes.start) && is_allowed(bytes.end - 1));
                        }
                    }
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
        let runs = PairPlan::new(&src.layout, &dst.layout).unwrap().runs(extent).unwrap();
        runs.segments.iter().for_each(|segment| copy(segment, &src, &dst));
        assert_eq!(dst.bytes(), want);
    }
}
