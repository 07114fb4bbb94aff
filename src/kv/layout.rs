//! What one worker holds and where, checked: geometry, ranks, regions, strides.
//!
//! A [`Layout`] is made from our own memory or from what a peer said of its memory in its hello. Either way every byte
//! that any block of it can name lies inside a region, or there is no layout. Whoever holds one may add and multiply its
//! numbers without a second look.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{BlockId, GROUPS_MAX, Geometry, GroupGeometry, GroupKind, LayerPlacement};
use crate::memory::Region;

/// Most tensor-parallel ranks, layers and regions of one worker. A peer's numbers are held to these before any use.
const RANKS_MAX: u32 = 1024;
const LAYERS_MAX: u32 = 4096;
const REGIONS_MAX: usize = 1 << 16;

/// One rank's KV memory, as the engine gives it.
#[derive(Debug, Clone)]
pub struct RankMemory {
    pub rank: u32,
    pub regions: Vec<Arc<Region>>,
    /// One for each layer, group by group; `region` counts within this rank's `regions`.
    pub layers: Vec<LayerPlacement>,
    /// Blocks in each layer.
    pub num_blocks: u32,
}

/// Where the ranks that one runtime holds keep their KV, as it is told to a peer: all ranks of a worker, or one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    pub num_blocks: u32,
    pub region_lens: Vec<u64>,
    pub first_rank: u32,
    /// Rank by rank, layer by layer; `region` counts over these ranks.
    pub ranks: Vec<Vec<LayerPlacement>>,
}

/// A geometry and a memory map that agree, and stay within their regions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    geometry: Geometry,
    map: MemoryMap,
}

/// A KV cache that is described wrongly, or two that do not fit (KV-6).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("{name} is {value}, it must be 1 to {max}")]
    OutOfBounds { name: &'static str, value: u64, max: u64 },
    #[error("{kv_heads} KV heads cannot be spread over {tp_size} ranks: one must divide the other")]
    Heads { kv_heads: u32, tp_size: u32 },
    // Read on either side, and on others' terminals: so no word of here and there.
    #[error("{name} differs: {prefill} at prefill, {decode} at decode")]
    Differs { name: &'static str, prefill: String, decode: String },
    #[error("KV group {group}: {source}")]
    Group { group: usize, source: Box<Self> },
    #[error("the block size is {prefill} at prefill and {decode} at decode: one must divide the other")]
    BlockSizes { prefill: u32, decode: u32 },
    #[error("rank {rank}: {given} layers are placed, the model has {layers}")]
    LayerCount { rank: usize, given: usize, layers: u32 },
    #[error(
        "the ranks given are {given:?}, they must be one of {tp_size} or all in order, with equal numbers of blocks"
    )]
    Ranks { given: Vec<u32>, tp_size: u32 },
    #[error("rank {rank}, layer {layer}: blocks reach beyond the {len} bytes of region {region}")]
    BeyondRegion { rank: usize, layer: usize, region: u16, len: u64 },
    #[error("rank {rank}, layer {layer}: region {region} is named, there are {regions}")]
    NoRegion { rank: usize, layer: usize, region: u16, regions: usize },
    #[error("blocks are given for {given} KV groups, the cache has {groups}")]
    Groups { given: usize, groups: usize },
    #[error("first token {first_token} is no multiple of block size {block_size}")]
    FirstToken { first_token: u32, block_size: u32 },
    #[error(
        "{blocks} blocks of {block_size} tokens, up to the last of {tokens} tokens, do not begin at token {first_token}"
    )]
    Uncovered { blocks: usize, block_size: u32, first_token: u32, tokens: u32 },
    #[error("block {block} is beyond the cache's {num_blocks} blocks")]
    Block { block: u32, num_blocks: u32 },
}

impl MemoryMap {
    /// The map of our own ranks, and their regions in the order in which the map counts them.
    pub fn of_ranks(ranks: &[RankMemory]) -> Result<(Self, Vec<Arc<Region>>), LayoutError> {
        let regions: Vec<_> = ranks.iter().flat_map(|rank| rank.regions.iter().cloned()).collect();
        within("the number of regions", regions.len() as u64, REGIONS_MAX as u64)?;
        let mut first = 0;
        let mut placements = Vec::new();
        for (number, rank) in ranks.iter().enumerate() {
            let mut layers = rank.layers.clone();
            for (layer, placement) in layers.iter_mut().enumerate() {
                let given = usize::from(placement.region);
                let missing = LayoutError::NoRegion {
                    rank: number,
                    layer,
                    region: placement.region,
                    regions: rank.regions.len(),
                };
                if given >= rank.regions.len() {
                    return Err(missing);
                }
                placement.region = u16::try_from(first + given).map_err(|_| missing)?;
            }
            first += rank.regions.len();
            placements.push(layers);
        }
        let num_blocks = ranks.first().map_or(0, |rank| rank.num_blocks);
        let region_lens = regions.iter().map(|region| region.len()).collect();
        let first_rank = ranks.first().map_or(0, |rank| rank.rank);
        Ok((Self { num_blocks, region_lens, first_rank, ranks: placements }, regions))
    }
}

impl Layout {
    /// Checks every number against every other.
    pub fn new(geometry: Geometry, map: MemoryMap) -> Result<Self, LayoutError> {
        check_geometry(&geometry)?;
        within("num_blocks", map.num_blocks.into(), u32::MAX.into())?;
        within("the number of regions", map.region_lens.len() as u64, REGIONS_MAX as u64)?;
        check_ranks(&geometry, map.first_rank, map.ranks.len())?;
        let of_layer: Vec<_> = geometry.groups.iter().flat_map(|group| (0..group.layers).map(move |_| group)).collect();
        for (rank, layers) in (map.first_rank as usize..).zip(&map.ranks) {
            if layers.len() != of_layer.len() {
                return Err(LayoutError::LayerCount { rank, given: layers.len(), layers: geometry.layers() });
            }
            for (layer, (placement, group)) in layers.iter().zip(&of_layer).enumerate() {
                check_placement(geometry.tp_size, group, &map, (rank, layer), placement)?;
            }
        }
        Ok(Self { geometry, map })
    }

    /// The layout of our own ranks, which must be all ranks of the worker or one, and their regions.
    pub fn of_ranks(geometry: Geometry, ranks: &[RankMemory]) -> Result<(Self, Vec<Arc<Region>>), LayoutError> {
        let given: Vec<u32> = ranks.iter().map(|rank| rank.rank).collect();
        let in_order = given.len() == 1 || given.iter().copied().eq(0..geometry.tp_size);
        let equal = ranks.windows(2).all(|pair| pair[0].num_blocks == pair[1].num_blocks);
        if !in_order || !equal {
            return Err(LayoutError::Ranks { given, tp_size: geometry.tp_size });
        }
        let (map, regions) = MemoryMap::of_ranks(ranks)?;
        Ok((Self::new(geometry, map)?, regions))
    }

    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The ranks whose memory this is.
    pub fn held(&self) -> Range<u32> {
        let first = self.map.first_rank;
        first..first + u32::try_from(self.map.ranks.len()).unwrap_or(RANKS_MAX)
    }

    /// Each group, and which of a rank's layers are its own.
    pub fn groups(&self) -> impl Iterator<Item = (&GroupGeometry, Range<usize>)> {
        self.geometry.groups.iter().scan(0, |first, group| {
            let layers = *first..*first + group.layers as usize;
            *first = layers.end;
            Some((group, layers))
        })
    }

    /// Where a held rank keeps each of its layers.
    pub(super) fn placements(&self, rank: u32) -> &[LayerPlacement] {
        &self.map.ranks[(rank - self.map.first_rank) as usize]
    }

    /// Refuses block ids that the cache does not have.
    pub fn check_blocks(&self, blocks: &[BlockId]) -> Result<(), LayoutError> {
        check_blocks(blocks, self.map.num_blocks)
    }

    /// Whether `blocks`, one list for each group, cover what a request of `tokens` tokens needs to go on. Gives the first
    /// token of each list.
    pub fn check_cover(&self, blocks: &[&[BlockId]], tokens: u32) -> Result<Vec<u32>, LayoutError> {
        let groups = self.geometry.groups.len();
        if blocks.len() != groups {
            return Err(LayoutError::Groups { given: blocks.len(), groups });
        }
        let cover = |(group, blocks): (&GroupGeometry, &&[BlockId])| {
            self.check_blocks(blocks)?;
            covered_from(group, blocks.len(), tokens, group.needed_from(tokens))
        };
        self.geometry.groups.iter().zip(blocks).map(cover).collect()
    }

    /// Whether KV that is laid out like this can be used in `decode`'s: KV-6.
    pub fn check_feeds(&self, decode: &Self) -> Result<(), LayoutError> {
        check_fit(&self.geometry, &decode.geometry)
    }

    /// Whether KV of a worker of `tp_size` ranks can be spread over the ranks of ours.
    pub(super) fn check_ranks_of(&self, tp_size: u32) -> Result<(), LayoutError> {
        within("the number of ranks", tp_size.into(), RANKS_MAX.into())?;
        for group in &self.geometry.groups {
            check_heads(group, tp_size)?;
            if group.kind == GroupKind::State {
                differs("the number of ranks (a state cannot be split)", &tp_size, &self.geometry.tp_size)?;
            }
        }
        Ok(())
    }
}

impl Geometry {
    /// What two workers would find when they meet, told before either is there: whether each geometry holds together, and whether
    /// KV of this one can be used in `decode`'s (KV-6).
    pub fn check_feeds(&self, decode: &Self) -> Result<(), LayoutError> {
        check_geometry(self)?;
        check_geometry(decode)?;
        check_fit(self, decode)
    }
}

fn check_fit(a: &Geometry, b: &Geometry) -> Result<(), LayoutError> {
    differs("the model", &a.model, &b.model)?;
    differs("the number of KV groups", &a.groups.len(), &b.groups.len())?;
    for (number, (prefill, decode)) in a.groups.iter().zip(&b.groups).enumerate() {
        check_groups_fit(prefill, decode, (a.tp_size, b.tp_size)).map_err(|error| match a.groups.len() {
            1 => error,
            _ => LayoutError::Group { group: number, source: Box::new(error) },
        })?;
    }
    Ok(())
}

/// The first token of `blocks` blocks that reach to the end of `tokens` tokens, which must not lie behind `needed`.
pub(super) fn covered_from(group: &GroupGeometry, blocks: usize, tokens: u32, needed: u32) -> Result<u32, LayoutError> {
    let first = group.covered_from(blocks, tokens).filter(|first| *first <= needed);
    let block_size = group.block_size;
    first.ok_or(LayoutError::Uncovered { blocks, block_size, first_token: needed, tokens })
}

pub(super) fn check_blocks(blocks: &[BlockId], num_blocks: u32) -> Result<(), LayoutError> {
    match blocks.iter().find(|block| block.0 >= num_blocks) {
        Some(block) => Err(LayoutError::Block { block: block.0, num_blocks }),
        None => Ok(()),
    }
}

fn differs(name: &'static str, prefill: &dyn ToString, decode: &dyn ToString) -> Result<(), LayoutError> {
    let (prefill, decode) = (prefill.to_string(), decode.to_string());
    if prefill == decode { Ok(()) } else { Err(LayoutError::Differs { name, prefill, decode }) }
}

fn check_groups_fit(a: &GroupGeometry, b: &GroupGeometry, tp_sizes: (u32, u32)) -> Result<(), LayoutError> {
    differs("the kind of KV", &format!("{:?}", a.kind), &format!("{:?}", b.kind))?;
    differs("the number of layers", &a.layers, &b.layers)?;
    differs("the number of KV heads", &a.kv_heads, &b.kv_heads)?;
    differs("the head size", &a.head_size, &b.head_size)?;
    differs("the element type", &a.dtype, &b.dtype)?;
    differs("the element size in bytes", &a.element_bytes, &b.element_bytes)?;
    let window = |group: &GroupGeometry| group.window.map_or_else(|| "none".to_owned(), |tokens| tokens.to_string());
    differs("the attention window", &window(a), &window(b))?;
    let planes = |group: &GroupGeometry| group.opaque_planes.clone().unwrap_or_else(|| "none".to_owned());
    differs("the instruction set that KV planes are packed for", &planes(a), &planes(b))?;
    if a.kind == GroupKind::State {
        return differs("the number of ranks (a state cannot be split)", &tp_sizes.0, &tp_sizes.1);
    }
    if a.is_opaque() {
        differs("the block size (packed planes cannot be split)", &a.block_size, &b.block_size)?;
    }
    let (smaller, larger) = (a.block_size.min(b.block_size), a.block_size.max(b.block_size));
    if larger % smaller != 0 {
        return Err(LayoutError::BlockSizes { prefill: a.block_size, decode: b.block_size });
    }
    Ok(())
}

fn within(name: &'static str, value: u64, max: u64) -> Result<(), LayoutError> {
    if value == 0 || value > max { Err(LayoutError::OutOfBounds { name, value, max }) } else { Ok(()) }
}

fn check_ranks(geometry: &Geometry, first: u32, count: usize) -> Result<(), LayoutError> {
    let tp_size = geometry.tp_size;
    if (first, count) == (0, tp_size as usize) || (first < tp_size && count == 1) {
        return Ok(());
    }
    let count = u32::try_from(count).unwrap_or(u32::MAX).min(RANKS_MAX + 1);
    Err(LayoutError::Ranks { given: (first..first.saturating_add(count)).collect(), tp_size })
}

fn check_geometry(geometry: &Geometry) -> Result<(), LayoutError> {
    within("tp_size", geometry.tp_size.into(), RANKS_MAX.into())?;
    within("the number of KV groups", geometry.groups.len() as u64, GROUPS_MAX as u64)?;
    for group in &geometry.groups {
        check_group(group)?;
        check_heads(group, geometry.tp_size)?;
    }
    within("the number of layers", geometry.groups.iter().map(|group| u64::from(group.layers)).sum(), LAYERS_MAX.into())
}

/// Whether the group's heads can be spread over so many ranks.
fn check_heads(group: &GroupGeometry, tp_size: u32) -> Result<(), LayoutError> {
    let heads = group.kv_heads;
    if group.kind == GroupKind::Heads && !heads.is_multiple_of(tp_size) && !tp_size.is_multiple_of(heads) {
        return Err(LayoutError::Heads { kv_heads: heads, tp_size });
    }
    Ok(())
}

fn check_group(group: &GroupGeometry) -> Result<(), LayoutError> {
    within("layers", group.layers.into(), LAYERS_MAX.into())?;
    within("head_size", group.head_size.into(), if group.kind == GroupKind::State { 1 << 30 } else { 1 << 20 })?;
    within("element_bytes", group.element_bytes.into(), 16)?;
    within("block_size", group.block_size.into(), 1 << 24)?;
    within("window", group.window.unwrap_or(1).into(), u32::MAX.into())?;
    let heads_max = if group.kind == GroupKind::Heads { 1 << 16 } else { 1 };
    within("kv_heads", group.kv_heads.into(), heads_max)
}

fn check_placement(
    tp_size: u32,
    group: &GroupGeometry,
    map: &MemoryMap,
    (rank, layer): (usize, usize),
    placement: &LayerPlacement,
) -> Result<(), LayoutError> {
    let region = placement.region;
    let Some(&len) = map.region_lens.get(usize::from(region)) else {
        return Err(LayoutError::NoRegion { rank, layer, region, regions: map.region_lens.len() });
    };
    let heads = group.heads_of(u32::try_from(rank).unwrap_or(u32::MAX), tp_size).count;
    let last = |count: u32, stride: u64| u64::from(count - 1).checked_mul(stride);
    let end = || {
        let mut end = placement.base.checked_add(last(map.num_blocks, placement.block_stride)?)?;
        end = end.checked_add(last(heads, placement.head_stride)?)?;
        if group.is_opaque() {
            return end.checked_add(group.plane_bytes());
        }
        end = end.checked_add(last(group.halves(), placement.half_stride)?)?;
        end = end.checked_add(last(group.block_size, placement.token_stride)?)?;
        end.checked_add(group.content_bytes())
    };
    match end() {
        Some(end) if end <= len => Ok(()),
        _ => Err(LayoutError::BeyondRegion { rank, layer, region, len }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Arrangement, GUARD, Shape};
    use super::*;

    fn layout(edit: impl FnOnce(&mut Geometry, &mut MemoryMap)) -> Result<Layout, LayoutError> {
        let shape = Shape { layers: 2, kv_heads: 4, tp_size: 2, ..Shape::default() };
        let (mut geometry, mut map) = shape.describe(Arrangement::SplitKv);
        edit(&mut geometry, &mut map);
        Layout::new(geometry, map)
    }

    #[test]
    fn kv_6_a_description_that_does_not_add_up_is_refused_by_name() {
        assert!(layout(|_, _| {}).is_ok());
        assert!(matches!(layout(|g, _| g.groups[0].layers = 0), Err(LayoutError::OutOfBounds { name: "layers", .. })));
        assert!(matches!(layout(|g, _| g.groups[0].block_size = 0), Err(LayoutError::OutOfBounds { .. })));
        assert!(matches!(layout(|g, _| g.groups.clear()), Err(LayoutError::OutOfBounds { .. })));
        assert!(matches!(layout(|_, m| m.first_rank = 1), Err(LayoutError::Ranks { .. })));
        assert!(matches!(layout(|g, _| g.groups[0].kv_heads = 3), Err(LayoutError::Heads { kv_heads: 3, tp_size: 2 })));
        assert!(matches!(layout(|g, _| g.tp_size = 1), Err(LayoutError::Ranks { .. })));
        assert!(matches!(layout(|_, m| m.ranks[1].truncate(1)), Err(LayoutError::LayerCount { rank: 1, .. })));
        assert!(matches!(layout(|_, m| m.ranks[1][0].region = 99), Err(LayoutError::NoRegion { region: 99, .. })));
        assert!(matches!(layout(|_, m| m.region_lens[0] -= GUARD + 1), Err(LayoutError::BeyondRegion { .. })));
        assert!(matches!(layout(|_, m| m.num_blocks += 1), Err(LayoutError::BeyondRegion { .. })));
        let wild: [fn(&mut LayerPlacement); 5] = [
            |p| p.base = u64::MAX,
            |p| p.block_stride = u64::MAX,
            |p| p.half_stride = u64::MAX / 2,
            |p| p.token_stride = u64::MAX / 3,
            |p| p.head_stride = u64::MAX / 2,
        ];
        for edit in wild {
            assert!(matches!(layout(|_, m| edit(&mut m.ranks[0][1])), Err(LayoutError::BeyondRegion { .. })));
        }
    }

    #[test]
    fn kv_6_pairs_that_cannot_work_are_refused_by_name() {
        let ours = layout(|_, _| {}).unwrap();
        let refused = |edit: fn(&mut GroupGeometry)| {
            let mut theirs = ours.clone();
            edit(&mut theirs.geometry.groups[0]);
            ours.check_feeds(&theirs).map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        assert_eq!(refused(|_| {}), "");
        assert!(refused(|g| g.layers = 3).contains("layers differs: 2 at prefill, 3 at decode"));
        assert!(refused(|g| g.kv_heads = 2).contains("KV heads"));
        assert!(refused(|g| g.head_size = 2).contains("head size"));
        assert!(refused(|g| g.dtype = "float8".to_owned()).contains("element type"));
        assert!(
            refused(|g| g.kind = GroupKind::Latent).contains("kind of KV differs: Heads at prefill, Latent at decode")
        );
        assert!(refused(|g| g.window = Some(9)).contains("window differs: none at prefill, 9 at decode"));
        assert!(refused(|g| g.opaque_planes = Some("amx".to_owned())).contains("instruction set"));
        assert!(refused(|g| g.block_size = 6).contains("one must divide the other"));
        assert_eq!(refused(|g| g.block_size *= 4), "");
        let mut theirs = ours.clone();
        theirs.geometry.tp_size = 4;
        assert!(ours.check_feeds(&theirs).is_ok());
        theirs.geometry.model = "other".to_owned();
        assert!(ours.check_feeds(&theirs).unwrap_err().to_string().contains("model differs"));
    }

    #[test]
    fn kv_6_groups_that_cannot_work_are_refused_by_number_and_name() {
        let state = |group: &mut GroupGeometry| (group.kind, group.kv_heads) = (GroupKind::State, 1);
        let mut ours = layout(|_, _| {}).unwrap();
        ours.geometry.groups.push(ours.geometry.groups[0].clone());
        state(&mut ours.geometry.groups[1]);
        let refused = |edit: fn(&mut Geometry)| {
            let mut theirs = ours.clone();
            edit(&mut theirs.geometry);
            ours.check_feeds(&theirs).map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        assert_eq!(refused(|_| {}), "");
        assert_eq!(refused(|g| g.groups[1].block_size = 5), "", "of states only the last is moved");
        assert_eq!(refused(|g| g.groups.truncate(1)), "the number of KV groups differs: 2 at prefill, 1 at decode");
        assert_eq!(
            refused(|g| g.groups[1].head_size = 9),
            "KV group 1: the head size differs: 4 at prefill, 9 at decode"
        );
        assert!(refused(|g| g.tp_size = 4).contains("KV group 1: the number of ranks"));
    }

    #[test]
    fn lists_of_blocks_may_begin_late_where_a_window_left_blocks_behind() {
        let cover = |edit: fn(&mut GroupGeometry), blocks: u32, tokens| {
            let layout = layout(|geometry, _| edit(&mut geometry.groups[0])).unwrap();
            let blocks: Vec<BlockId> = (0..blocks).map(BlockId).collect();
            layout.check_cover(&[&blocks], tokens).map(|first| first[0])
        };
        // Blocks of 4 tokens, 14 tokens: 4 blocks.
        assert_eq!(cover(|_| {}, 4, 14), Ok(0));
        assert!(matches!(cover(|_| {}, 3, 14), Err(LayoutError::Uncovered { first_token: 0, .. })));
        assert!(matches!(cover(|_| {}, 5, 14), Err(LayoutError::Uncovered { .. })), "one too many");
        assert_eq!(cover(|g| g.window = Some(7), 2, 14), Ok(8), "the next token sees 8 to 14");
        assert!(matches!(cover(|g| g.window = Some(8), 2, 14), Err(LayoutError::Uncovered { first_token: 7, .. })));
        assert_eq!(cover(|g| g.window = Some(8), 4, 14), Ok(0), "more than is needed");
        assert!(matches!(cover(|_| {}, 9, 36), Err(LayoutError::Block { block: 8, .. })));
    }
}
