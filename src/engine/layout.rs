//! Where the reference engine keeps its KV: vLLM's layouts, as strides.

use std::sync::Arc;

use crate::config::{ReferenceConfig, ReferenceLayout};
use crate::kv::{self, Geometry, GroupGeometry, GroupKind, LayerPlacement, RankMemory};
use crate::memory::Region;

/// Why a KV cache cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    #[error("`{name}` is {is}, must be {must}")]
    Setting { name: &'static str, is: usize, must: String },
    #[error("{kv_heads} KV heads cannot be spread over {tp} ranks: one must be a multiple of the other")]
    Heads { kv_heads: u32, tp: u32 },
    #[error(transparent)]
    Layout(#[from] kv::LayoutError),
    #[error(
        "cannot get {bytes} bytes of memory for the KV of rank {rank}: {source}; lower `inference.reference.num_blocks`"
    )]
    Memory { rank: u32, bytes: u64, source: std::io::Error },
}

/// The geometry that a worker shows to its peers.
pub(super) fn geometry(model: &str, config: &ReferenceConfig, tp: u32) -> Result<Geometry, CacheError> {
    let size = |name, is: usize, max: u32| match u32::try_from(is) {
        Ok(value) if (1..=max).contains(&value) => Ok(value),
        _ => Err(CacheError::Setting { name, is, must: format!("1 to {max}") }),
    };
    let kv_heads = size("kv_heads", config.kv_heads, 4096)?;
    size("num_blocks", config.num_blocks, 1 << 24)?;
    size("tp", tp as usize, 1024)?;
    if !kv_heads.is_multiple_of(tp) && !tp.is_multiple_of(kv_heads) {
        return Err(CacheError::Heads { kv_heads, tp });
    }
    let dtype = match config.dtype_bytes {
        1 => "float8",
        2 => "bfloat16",
        4 => "float32",
        is => return Err(CacheError::Setting { name: "dtype_bytes", is, must: "1, 2 or 4".to_owned() }),
    };
    let group = GroupGeometry {
        kind: GroupKind::Heads,
        layers: size("layers", config.layers, 4096)?,
        kv_heads,
        head_size: size("head_size", config.head_size, 65_536)?,
        element_bytes: size("dtype_bytes", config.dtype_bytes, 4)?,
        dtype: dtype.to_owned(),
        block_size: size("block_size", config.block_size, 4096)?,
        window: None,
        opaque_planes: None,
    };
    Ok(Geometry { model: model.to_owned(), tp_size: tp, groups: vec![group] })
}

/// The one KV group of a reference engine.
pub(super) fn group(geometry: &Geometry) -> &GroupGeometry {
    &geometry.groups[0]
}

/// Bytes of one block in one layer on one rank.
pub(super) fn layer_block_bytes(geometry: &Geometry, rank: u32) -> u64 {
    let group = group(geometry);
    let heads = u64::from(group.heads_of(rank, geometry.tp_size).count);
    u64::from(group.halves()) * u64::from(group.block_size) * heads * group.content_bytes()
}

/// Allocates one rank's KV and says where each layer lies in it.
pub(super) fn allocate(
    geometry: &Geometry,
    layout: ReferenceLayout,
    num_blocks: u32,
    rank: u32,
) -> Result<RankMemory, CacheError> {
    let block = layer_block_bytes(geometry, rank);
    let layer = block * u64::from(num_blocks);
    let layers = u64::from(geometry.layers());
    let own_regions = layout == ReferenceLayout::SplitKv;
    let region_bytes = if own_regions { layer } else { layer * layers };
    let region = || {
        let len = usize::try_from(region_bytes).unwrap_or(usize::MAX);
        Region::shared(len).map_err(|source| CacheError::Memory { rank, bytes: region_bytes, source })
    };
    let regions: Vec<Arc<Region>> =
        (0..if own_regions { layers } else { 1 }).map(|_| region()).collect::<Result<_, _>>()?;
    let strides = strides(geometry, layout, rank, block);
    let place = |index: u64| LayerPlacement {
        region: if own_regions { u16::try_from(index).expect("at most 4096 layers") } else { 0 },
        base: if own_regions { 0 } else { index * layer },
        ..strides
    };
    Ok(RankMemory { rank, regions, layers: (0..layers).map(place).collect(), num_blocks })
}

fn strides(geometry: &Geometry, layout: ReferenceLayout, rank: u32, block_stride: u64) -> LayerPlacement {
    let group = group(geometry);
    let row = group.content_bytes();
    let heads = u64::from(group.heads_of(rank, geometry.tp_size).count);
    let tokens = u64::from(group.block_size);
    let (half_stride, token_stride, head_stride) = match layout {
        ReferenceLayout::SplitKv => (tokens * heads * row, heads * row, row),
        ReferenceLayout::HeadMajor => (row, 2 * row, tokens * 2 * row),
        ReferenceLayout::TokenMajor => (row, heads * 2 * row, 2 * row),
    };
    LayerPlacement { region: 0, base: 0, block_stride, half_stride, token_stride, head_stride }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUTS: [ReferenceLayout; 3] =
        [ReferenceLayout::SplitKv, ReferenceLayout::HeadMajor, ReferenceLayout::TokenMajor];

    /// Every (layer, block, half, token, head) has bytes of its own, and together they are all the memory there is.
    #[test]
    fn a_layout_uses_each_byte_once() {
        let config =
            ReferenceConfig { layers: 3, kv_heads: 4, head_size: 8, block_size: 4, ..ReferenceConfig::default() };
        for layout in LAYOUTS {
            for tp in [1, 2, 4, 8] {
                let geometry = geometry("m", &config, tp).expect("valid");
                let memory = allocate(&geometry, layout, 5, tp - 1).expect("memory");
                let mut seen: Vec<Vec<bool>> =
                    memory.regions.iter().map(|r| vec![false; usize::try_from(r.len()).unwrap() / 16]).collect();
                for place in &memory.layers {
                    for (block, half, token, head) in rows(&geometry, tp - 1) {
                        let at = place.base
                            + block * place.block_stride
                            + half * place.half_stride
                            + token * place.token_stride
                            + head * place.head_stride;
                        let slot = &mut seen[usize::from(place.region)][usize::try_from(at / 16).unwrap()];
                        assert!(!*slot, "{layout:?} tp {tp}: bytes at {at} are used twice");
                        *slot = true;
                    }
                }
                assert!(seen.iter().flatten().all(|&used| used), "{layout:?} tp {tp}: bytes are never used");
            }
        }
    }

    fn rows(geometry: &Geometry, rank: u32) -> Vec<(u64, u64, u64, u64)> {
        let heads = u64::from(group(geometry).heads_of(rank, geometry.tp_size).count);
        let mut rows = Vec::new();
        for block in 0..5 {
            for half in 0..2 {
                for token in 0..u64::from(group(geometry).block_size) {
                    rows.extend((0..heads).map(|head| (block, half, token, head)));
                }
            }
        }
        rows
    }

    #[test]
    fn shapes_that_cannot_be_are_refused_by_name() {
        let with = |change: fn(&mut ReferenceConfig), tp| {
            let mut config = ReferenceConfig::default();
            change(&mut config);
            geometry("m", &config, tp).map(|_| ()).map_err(|error| error.to_string())
        };
        assert_eq!(with(|_| {}, 1), Ok(()));
        assert_eq!(with(|c| c.layers = 0, 1), Err("`layers` is 0, must be 1 to 4096".to_owned()));
        assert_eq!(with(|c| c.dtype_bytes = 3, 1), Err("`dtype_bytes` is 3, must be 1, 2 or 4".to_owned()));
        assert!(with(|c| c.kv_heads = 6, 4).unwrap_err().contains("6 KV heads"));
    }
}
