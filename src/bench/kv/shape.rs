//! KV caches of known models, laid out as an engine would.

use std::sync::Arc;

use anyhow::ensure;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::bench::link::{self, FILL_BYTES, noise};
use crate::kv::{BlockId, Geometry, GroupGeometry, GroupKind, LayerPlacement, RankMemory};
use crate::memory::{Region, to_u64, to_usize};

/// Whose KV is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Shape {
    /// One layer, one head: a block of 16 tokens is one run of 4 KiB.
    #[value(name = "one-run")]
    OneRun,
    /// 4 layers, 4 KV heads of 32 elements: the reference engine's own.
    Small,
    #[value(name = "qwen3-8b")]
    #[serde(rename = "qwen3-8b")]
    Qwen3_8b,
    #[value(name = "llama-3.1-8b")]
    #[serde(rename = "llama-3.1-8b")]
    Llama31_8b,
    #[value(name = "llama-3.1-70b")]
    #[serde(rename = "llama-3.1-70b")]
    Llama31_70b,
    /// One latent per token and layer instead of heads.
    #[value(name = "deepseek-v3", alias = "deepseek-v3-mla")]
    #[serde(rename = "deepseek-v3")]
    DeepseekV3,
}

/// How blocks lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// `[block, 2, token, head, dim]`, one allocation for each layer.
    SplitKv,
    /// `[block, token, head, K then V]`, all layers in one allocation.
    TokenMajor,
}

impl Shape {
    pub fn name(self) -> &'static str {
        match self {
            Self::OneRun => "one-run",
            Self::Small => "small",
            Self::Qwen3_8b => "qwen3-8b",
            Self::Llama31_8b => "llama-3.1-8b",
            Self::Llama31_70b => "llama-3.1-70b",
            Self::DeepseekV3 => "deepseek-v3",
        }
    }

    /// KV of one token.
    pub fn token_bytes(self) -> u64 {
        self.geometry(1, 1).token_bytes()
    }

    /// Whether its KV heads can be spread over so many ranks.
    pub(super) fn check_tp(self, tp: u32) -> anyhow::Result<()> {
        let group = &self.geometry(16, 1).groups[0];
        let fits =
            group.kind == GroupKind::Latent || group.kv_heads.max(tp).is_multiple_of(group.kv_heads.min(tp).max(1));
        ensure!(tp > 0 && fits, "{} KV heads of {} cannot be spread over {tp} ranks", group.kv_heads, self.name());
        Ok(())
    }

    pub(super) fn geometry(self, block_size: u32, tp_size: u32) -> Geometry {
        let (layers, kv_heads, head_size, mla) = match self {
            Self::OneRun => (1, 1, 64, false),
            Self::Small => (4, 4, 32, false),
            Self::Qwen3_8b => (36, 8, 128, false),
            Self::Llama31_8b => (32, 8, 128, false),
            Self::Llama31_70b => (80, 8, 128, false),
            Self::DeepseekV3 => (61, 1, 576, true),
        };
        let group = GroupGeometry {
            kind: if mla { GroupKind::Latent } else { GroupKind::Heads },
            layers,
            kv_heads,
            head_size,
            element_bytes: 2,
            dtype: "bfloat16".to_owned(),
            block_size,
            window: None,
            opaque_planes: None,
        };
        Geometry { model: self.name().to_owned(), tp_size, groups: vec![group] }
    }
}

impl Layout {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::SplitKv => "split-kv",
            Self::TokenMajor => "token-major",
        }
    }
}

/// Memory of every rank of a worker; of this host, as much as may be given to a measurement.
pub(super) fn ranks(
    geometry: &Geometry,
    layout: Layout,
    num_blocks: u32,
    gpu: Option<i32>,
) -> anyhow::Result<Vec<RankMemory>> {
    if gpu.is_none() {
        link::fits(geometry.token_bytes() * u64::from(geometry.groups[0].block_size) * u64::from(num_blocks))?;
    }
    (0..geometry.tp_size).map(|rank| memory(geometry, rank, layout, num_blocks, gpu)).collect()
}

/// Memory of one rank for `num_blocks` blocks, on a GPU or of this host, backed at once so that no transfer meets a page fault.
fn memory(
    geometry: &Geometry,
    rank: u32,
    layout: Layout,
    num_blocks: u32,
    gpu: Option<i32>,
) -> anyhow::Result<RankMemory> {
    let [group] = &geometry.groups[..] else {
        anyhow::bail!("{} KV groups, one is laid out here", geometry.groups.len())
    };
    let (tokens, halves) = (u64::from(group.block_size), u64::from(group.halves()));
    let (heads, content) = (u64::from(group.heads_of(rank, geometry.tp_size).count), group.content_bytes());
    let block_stride = halves * tokens * heads * content;
    let layer_bytes = block_stride * u64::from(num_blocks);
    let split = layout == Layout::SplitKv;
    let (regions, bytes) = if split { (group.layers, layer_bytes) } else { (1, layer_bytes * u64::from(group.layers)) };
    let regions: Vec<Arc<Region>> = (0..regions).map(|_| link::memory(bytes, gpu)).collect::<Result<_, _>>()?;
    let layers = (0..group.layers).map(|layer| {
        let head_stride = if split { content } else { halves * content };
        Ok(LayerPlacement {
            region: if split { u16::try_from(layer)? } else { 0 },
            base: if split { 0 } else { layer_bytes * u64::from(layer) },
            block_stride,
            half_stride: if split { tokens * heads * content } else { content },
            token_stride: heads * head_stride,
            head_stride,
        })
    });
    Ok(RankMemory { rank, regions, layers: layers.collect::<anyhow::Result<_>>()?, num_blocks })
}

/// `count` blocks, from the `first` one on: in order, or as a pool gives them out that has been in use for a while. What begins
/// `count` later has none of them, once around.
pub(super) fn blocks(first: u32, count: u32, num_blocks: u32, scattered: bool) -> Vec<BlockId> {
    // A step without a divisor in common with the number of blocks meets every block once.
    let coprime = |step: &u32| (2..=*step).all(|d| !(step.is_multiple_of(d) && num_blocks.is_multiple_of(d)));
    let step = if scattered { (num_blocks / 3 + 1..num_blocks.max(2)).find(coprime).unwrap_or(1) } else { 1 };
    let at = |index: u32| (u64::from(first) + u64::from(index)) * u64::from(step) % u64::from(num_blocks);
    (0..count).map(|index| BlockId(u32::try_from(at(index)).unwrap_or(0))).collect()
}

/// Bytes that contents are cut from.
const NOISE_SEED: u64 = 17;

/// What one block of one layer holds on one rank: every token of every head something of its own, wherever the rank keeps it.
fn expected(geometry: &Geometry, noise: &[u8], rank: &RankMemory, layer: usize, block: BlockId) -> Vec<u8> {
    let group = &geometry.groups[0];
    let (heads, content) = (group.heads_of(rank.rank, geometry.tp_size), to_usize(group.content_bytes()));
    let place = &rank.layers[layer];
    let mut bytes = vec![0; to_usize(place.block_stride)];
    for half in 0..group.halves() {
        for token in 0..group.block_size {
            for head in 0..heads.count {
                let at = place.half_stride * u64::from(half)
                    + place.token_stride * u64::from(token)
                    + place.head_stride * u64::from(head);
                let what = [to_u64(layer), block.0.into(), half.into(), token.into(), (heads.first + head).into()];
                // A sum with odd factors: neighbours in any direction begin elsewhere in the noise.
                let from = what.iter().fold(0_u64, |sum, part| sum.wrapping_mul(0x9e37_79b9).wrapping_add(part + 1));
                let from = to_usize(from % to_u64(noise.len() - content));
                bytes[to_usize(at)..][..content].copy_from_slice(&noise[from..from + content]);
            }
        }
    }
    bytes
}

/// Fills a worker's memory so that every token of every head in every layer differs.
pub(super) fn fill(geometry: &Geometry, ranks: &[RankMemory]) -> anyhow::Result<()> {
    let noise = noise(to_usize(FILL_BYTES), NOISE_SEED);
    for rank in ranks {
        for (layer, place) in rank.layers.iter().enumerate() {
            for block in 0..rank.num_blocks {
                let bytes = expected(geometry, &noise, rank, layer, BlockId(block));
                let at = place.base + u64::from(block) * place.block_stride;
                rank.regions[usize::from(place.region)].copy_in(at, &bytes)?;
            }
        }
    }
    Ok(())
}

/// Makes these blocks unlike what [`fill`] makes of them.
pub(super) fn clear(ranks: &[RankMemory], blocks: &[BlockId]) -> anyhow::Result<()> {
    for rank in ranks {
        for place in &rank.layers {
            for block in blocks {
                let at = place.base + u64::from(block.0) * place.block_stride;
                rank.regions[usize::from(place.region)].fill(at, place.block_stride, 0)?;
            }
        }
    }
    Ok(())
}

/// Whether each of these blocks holds, in every layer on every rank, what [`fill`] put there on whatever ranks had it.
pub(super) fn check(geometry: &Geometry, ranks: &[RankMemory], blocks: &[BlockId]) -> anyhow::Result<()> {
    let noise = noise(to_usize(FILL_BYTES), NOISE_SEED);
    for rank in ranks {
        for (layer, place) in rank.layers.iter().enumerate() {
            for &block in blocks {
                let at = place.base + u64::from(block.0) * place.block_stride;
                let got = rank.regions[usize::from(place.region)].to_vec(at, place.block_stride)?;
                ensure!(
                    got == expected(geometry, &noise, rank, layer, block),
                    "wrong bytes in block {} of layer {layer} on rank {}",
                    block.0,
                    rank.rank
                );
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scattered_blocks_are_distinct_and_not_neighbours() {
        for num_blocks in [1, 2, 7, 128, 1000] {
            let mut taken = blocks(3 % num_blocks, num_blocks, num_blocks, true);
            let adjacent = taken.windows(2).filter(|pair| pair[0].0 + 1 == pair[1].0).count();
            assert!(num_blocks < 7 || adjacent == 0);
            taken.sort();
            taken.dedup();
            assert_eq!(taken.len(), num_blocks as usize);
        }
        assert_eq!(blocks(2, 3, 9, false), [BlockId(2), BlockId(3), BlockId(4)]);
    }

    #[test]
    fn requests_at_once_have_blocks_of_their_own() {
        for scattered in [false, true] {
            let mut taken: Vec<BlockId> =
                (0..4).flat_map(|request| blocks(request * 6 + 7, 5, 24, scattered)).collect();
            taken.sort();
            taken.dedup();
            assert_eq!(taken.len(), 20);
        }
    }
}
