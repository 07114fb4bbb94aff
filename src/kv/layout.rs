//! What one worker holds and where, checked: geometry, ranks, regions, strides.
//!
//! A [`Layout`] is made from our own memory or from what a peer said of its memory in its hello. Either way every byte
//! that any block of it can name lies inside a region, or there is no layout. Whoever holds one may add and multiply its
//! numbers without a second look.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{BlockId, Geometry, LayerPlacement};
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
    /// One for each layer; `region` counts within this rank's `regions`.
    pub layers: Vec<LayerPlacement>,
    /// Blocks in each layer.
    pub num_blocks: u32,
}

/// Where all ranks of a worker keep their KV, as it is told to a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryMap {
    pub num_blocks: u32,
    pub region_lens: Vec<u64>,
    /// Rank by rank, layer by layer; `region` counts over all ranks.
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
    #[error("{name} differs: {ours} here, {theirs} there")]
    Differs { name: &'static str, ours: String, theirs: String },
    #[error("block sizes {ours} here and {theirs} there: one must divide the other")]
    BlockSizes { ours: u32, theirs: u32 },
    #[error("rank {rank}: {given} layers are placed, the model has {layers}")]
    LayerCount { rank: usize, given: usize, layers: u32 },
    #[error("the ranks given are {given:?}, they must be 0 to {tp_size} in order, with equal numbers of blocks")]
    Ranks { given: Vec<u32>, tp_size: u32 },
    #[error("rank {rank}, layer {layer}: blocks reach beyond the {len} bytes of region {region}")]
    BeyondRegion { rank: usize, layer: usize, region: u16, len: u64 },
    #[error("rank {rank}, layer {layer}: region {region} is named, there are {regions}")]
    NoRegion { rank: usize, layer: usize, region: u16, regions: usize },
    #[error("blocks are given for {given} KV groups, the cache has {groups}")]
    Groups { given: usize, groups: usize },
    #[error("first token {first_token} is no multiple of block size {block_size}")]
    FirstToken { first_token: u32, block_size: u32 },
    #[error("{blocks} blocks of {block_size} tokens do not cover tokens {first_token} to {tokens}")]
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
        Ok((Self { num_blocks, region_lens, ranks: placements }, regions))
    }
}

impl Layout {
    /// Checks every number against every other.
    pub fn new(geometry: Geometry, map: MemoryMap) -> Result<Self, LayoutError> {
        check_geometry(&geometry)?;
        within("num_blocks", map.num_blocks.into(), u32::MAX.into())?;
        within("the number of regions", map.region_lens.len() as u64, REGIONS_MAX as u64)?;
        let given = (0..u32::try_from(map.ranks.len()).unwrap_or(u32::MAX).min(RANKS_MAX + 1)).collect::<Vec<_>>();
        if map.ranks.len() as u64 != u64::from(geometry.tp_size) {
            return Err(LayoutError::Ranks { given, tp_size: geometry.tp_size });
        }
        for (rank, layers) in map.ranks.iter().enumerate() {
            if layers.len() as u64 != u64::from(geometry.layers) {
                return Err(LayoutError::LayerCount { rank, given: layers.len(), layers: geometry.layers });
            }
            for (layer, placement) in layers.iter().enumerate() {
                check_placement(&geometry, &map, rank, layer, placement)?;
            }
        }
        Ok(Self { geometry, map })
    }

    /// The layout of our own ranks, which must be all ranks of the worker, and their regions.
    pub fn of_ranks(geometry: Geometry, ranks: &[RankMemory]) -> Result<(Self, Vec<Arc<Region>>), LayoutError> {
        let given: Vec<u32> = ranks.iter().map(|rank| rank.rank).collect();
        let in_order = given.iter().copied().eq(0..geometry.tp_size);
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

    /// Refuses block ids that the cache does not have.
    pub fn check_blocks(&self, blocks: &[BlockId]) -> Result<(), LayoutError> {
        let num_blocks = self.map.num_blocks;
        match blocks.iter().find(|block| block.0 >= num_blocks) {
            Some(block) => Err(LayoutError::Block { block: block.0, num_blocks }),
            None => Ok(()),
        }
    }

    /// Whether KV made here (or there) can be used there (or here): KV-6.
    pub fn check_fits(&self, theirs: &Self) -> Result<(), LayoutError> {
        let (a, b) = (&self.geometry, &theirs.geometry);
        let differs = |name, ours: &dyn ToString, theirs: &dyn ToString| {
            let (ours, theirs) = (ours.to_string(), theirs.to_string());
            if ours == theirs { Ok(()) } else { Err(LayoutError::Differs { name, ours, theirs }) }
        };
        differs("the model", &a.model, &b.model)?;
        differs("the number of layers", &a.layers, &b.layers)?;
        differs("the number of KV heads", &a.kv_heads, &b.kv_heads)?;
        differs("the head size", &a.head_size, &b.head_size)?;
        differs("the element type", &a.dtype, &b.dtype)?;
        differs("the element size in bytes", &a.element_bytes, &b.element_bytes)?;
        differs("MLA", &a.mla, &b.mla)?;
        let planes = |geometry: &Geometry| geometry.opaque_planes.clone().unwrap_or_else(|| "none".to_owned());
        differs("the instruction set that KV planes are packed for", &planes(a), &planes(b))?;
        if a.opaque_planes.is_some() {
            differs("the block size (packed planes cannot be split)", &a.block_size, &b.block_size)?;
        }
        let (smaller, larger) = (a.block_size.min(b.block_size), a.block_size.max(b.block_size));
        if larger % smaller != 0 {
            return Err(LayoutError::BlockSizes { ours: a.block_size, theirs: b.block_size });
        }
        Ok(())
    }
}

fn within(name: &'static str, value: u64, max: u64) -> Result<(), LayoutError> {
    if value == 0 || value > max { Err(LayoutError::OutOfBounds { name, value, max }) } else { Ok(()) }
}

fn check_geometry(geometry: &Geometry) -> Result<(), LayoutError> {
    within("layers", geometry.layers.into(), LAYERS_MAX.into())?;
    within("kv_heads", geometry.kv_heads.into(), 1 << 16)?;
    within("head_size", geometry.head_size.into(), 1 << 20)?;
    within("element_bytes", geometry.element_bytes.into(), 16)?;
    within("block_size", geometry.block_size.into(), 1 << 20)?;
    within("tp_size", geometry.tp_size.into(), RANKS_MAX.into())?;
    let (heads, ranks) = (geometry.kv_heads, geometry.tp_size);
    if !geometry.mla && heads % ranks != 0 && ranks % heads != 0 {
        return Err(LayoutError::Heads { kv_heads: heads, tp_size: ranks });
    }
    if geometry.mla { within("kv_heads with MLA", heads.into(), 1) } else { Ok(()) }
}

fn check_placement(
    geometry: &Geometry,
    map: &MemoryMap,
    rank: usize,
    layer: usize,
    placement: &LayerPlacement,
) -> Result<(), LayoutError> {
    let region = placement.region;
    let Some(&len) = map.region_lens.get(usize::from(region)) else {
        return Err(LayoutError::NoRegion { rank, layer, region, regions: map.region_lens.len() });
    };
    let heads = geometry.heads_of(u32::try_from(rank).unwrap_or(u32::MAX)).count;
    let last = |count: u32, stride: u64| u64::from(count - 1).checked_mul(stride);
    let end = || {
        let mut end = placement.base.checked_add(last(map.num_blocks, placement.block_stride)?)?;
        end = end.checked_add(last(heads, placement.head_stride)?)?;
        if geometry.opaque_planes.is_some() {
            return end.checked_add(geometry.plane_bytes());
        }
        end = end.checked_add(last(geometry.halves(), placement.half_stride)?)?;
        end = end.checked_add(last(geometry.block_size, placement.token_stride)?)?;
        end.checked_add(geometry.content_bytes())
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
        assert!(matches!(layout(|g, _| g.layers = 0), Err(LayoutError::OutOfBounds { name: "layers", .. })));
        assert!(matches!(layout(|g, _| g.block_size = 0), Err(LayoutError::OutOfBounds { .. })));
        assert!(matches!(layout(|g, _| g.kv_heads = 3), Err(LayoutError::Heads { kv_heads: 3, tp_size: 2 })));
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
        let refused = |edit: fn(&mut Geometry)| {
            let theirs = layout(|_, _| {}).unwrap();
            let mut theirs = Layout { geometry: theirs.geometry.clone(), map: theirs.map };
            edit(&mut theirs.geometry);
            ours.check_fits(&theirs).map_err(|error| error.to_string()).err().unwrap_or_default()
        };
        assert_eq!(refused(|_| {}), "");
        assert!(refused(|g| g.model = "other".to_owned()).contains("model differs"));
        assert!(refused(|g| g.layers = 3).contains("layers differs: 2 here, 3 there"));
        assert!(refused(|g| g.kv_heads = 2).contains("KV heads"));
        assert!(refused(|g| g.head_size = 2).contains("head size"));
        assert!(refused(|g| g.dtype = "float8".to_owned()).contains("element type"));
        assert!(refused(|g| g.mla = true).contains("MLA"));
        assert!(refused(|g| g.opaque_planes = Some("amx".to_owned())).contains("instruction set"));
        assert!(refused(|g| g.block_size = 6).contains("one must divide the other"));
        assert_eq!(refused(|g| g.block_size *= 4), "");
        assert_eq!(refused(|g| g.tp_size = 4), "");
    }
}
