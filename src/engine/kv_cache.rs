//! The KV itself: written row by row into paged blocks of real memory, and read back from there.
//!
//! The digest over a context's KV is the link's own (KV-4): it does not depend on layout, block size or tensor
//! parallelism, and every byte of every replica counts.

use super::layout::{self, CacheError};
use super::model::{Context, Row, fill_row};
use crate::config::ReferenceConfig;
use crate::kv::{self, BlockId, Geometry, LayerPlacement, Layout, RankMemory, Span};
use crate::memory::Region;
use std::sync::Arc;

/// What freed blocks are overwritten with, so that a stale read is seen.
const POISON: u8 = 0xa5;

/// The paged KV of all ranks of one worker.
#[derive(Debug)]
pub(super) struct KvCache {
    ranks: Vec<RankMemory>,
    num_blocks: u32,
    layout: Layout,
    /// Of all ranks, as `layout` counts them.
    regions: Vec<Arc<Region>>,
}

impl KvCache {
    /// Allocates every rank's memory and poisons it.
    pub(super) fn new(model: &str, config: &ReferenceConfig, tp: u32) -> Result<Self, CacheError> {
        let geometry = layout::geometry(model, config, tp)?;
        let num_blocks = u32::try_from(config.num_blocks).expect("checked with the geometry");
        let ranks: Vec<_> = (0..tp)
            .map(|rank| layout::allocate(&geometry, config.layout, num_blocks, rank))
            .collect::<Result<_, _>>()?;
        let (layout, regions) = Layout::of_ranks(geometry, &ranks)?;
        Ok(Self { ranks, num_blocks, layout, regions })
    }

    pub(super) fn geometry(&self) -> &Geometry {
        self.layout.geometry()
    }

    pub(super) fn num_blocks(&self) -> u32 {
        self.num_blocks
    }

    /// Tokens per block.
    pub(super) fn block_size(&self) -> usize {
        layout::group(self.geometry()).block_size as usize
    }

    /// Where each rank's memory is, for the KV runtime.
    pub(super) fn ranks(&self) -> &[RankMemory] {
        &self.ranks
    }

    /// Their memory, in the order in which the link counts it.
    pub(super) fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Bytes of one block over all layers and ranks.
    pub(super) fn block_bytes(&self) -> u64 {
        let per_layer: u64 =
            (0..self.geometry().tp_size).map(|rank| layout::layer_block_bytes(self.geometry(), rank)).sum();
        per_layer * u64::from(self.geometry().layers())
    }

    /// Writes one layer's KV of one position into the block that covers it.
    pub(super) fn write(&self, blocks: &[BlockId], position: usize, layer: usize, context: Context) {
        let block = u64::from(blocks[position / self.block_size()].0);
        let token = (position % self.block_size()) as u64;
        let mut row = vec![0; self.row_bytes()];
        for (memory, place) in self.ranks.iter().map(|memory| (memory, &memory.layers[layer])) {
            for (half, head, row_at) in self.rows(memory.rank, place) {
                let name = Row { layer, half, head };
                fill_row(&mut row, context, name);
                let at = place.base + block * place.block_stride + token * place.token_stride + row_at;
                memory.regions[usize::from(place.region)].copy_in(at, &row).expect("a block of this cache");
            }
        }
    }

    /// Reads the KV of the first `tokens` positions back from memory and folds it into one word.
    pub(super) fn digest(&self, blocks: &[BlockId], tokens: usize) -> u64 {
        let tokens = u32::try_from(tokens).expect("contexts are shorter than 2^32 tokens");
        let blocks = &blocks[..layout::group(self.geometry()).blocks_for(tokens) as usize];
        kv::digest(&self.layout, &self.regions, Span { blocks: &[blocks], from: &[0], tokens })
            .expect("blocks of this cache")
    }

    /// Overwrites blocks that nobody may read any more.
    pub(super) fn poison(&self, block: BlockId) {
        for (memory, place) in self.layers() {
            let at = place.base + u64::from(block.0) * place.block_stride;
            let region = &memory.regions[usize::from(place.region)];
            region.fill(at, place.block_stride, POISON).expect("a block of this cache");
        }
    }

    fn row_bytes(&self) -> usize {
        usize::try_from(layout::group(self.geometry()).content_bytes()).expect("checked with the geometry")
    }

    fn layers(&self) -> impl Iterator<Item = (&RankMemory, &LayerPlacement)> {
        self.ranks.iter().flat_map(|memory| memory.layers.iter().map(move |place| (memory, place)))
    }

    /// (half, head over all ranks, offset inside a block) of each row that a rank keeps for one token of one layer.
    fn rows(&self, rank: u32, place: &LayerPlacement) -> impl Iterator<Item = (usize, usize, u64)> + use<> {
        let heads = layout::group(self.geometry()).heads_of(rank, self.geometry().tp_size);
        let (half_stride, head_stride) = (place.half_stride, place.head_stride);
        (0..layout::group(self.geometry()).halves()).flat_map(move |half| {
            (0..heads.count).map(move |head| {
                let at = u64::from(half) * half_stride + u64::from(head) * head_stride;
                (half as usize, (heads.first + head) as usize, at)
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::Weights;
    use super::*;
    use crate::config::ReferenceLayout;

    const TOKENS: usize = 11;

    fn config(layout: ReferenceLayout, block_size: usize) -> ReferenceConfig {
        ReferenceConfig {
            layers: 2,
            kv_heads: 4,
            head_size: 6,
            num_blocks: 16,
            block_size,
            layout,
            ..Default::default()
        }
    }

    /// A cache with `TOKENS` tokens in scattered blocks, and the blocks.
    fn filled(config: &ReferenceConfig, tp: u32) -> (KvCache, Vec<BlockId>) {
        let cache = KvCache::new("m", config, tp).expect("a cache");
        let blocks: Vec<_> =
            (0..TOKENS.div_ceil(cache.block_size())).map(|i| BlockId(u32::try_from(15 - i).unwrap())).collect();
        let mut context = Context::start(Weights::base(0));
        for position in 0..TOKENS {
            context = context.then(u32::try_from(position).unwrap());
            (0..2).for_each(|layer| cache.write(&blocks, position, layer, context));
        }
        (cache, blocks)
    }

    #[test]
    fn the_digest_does_not_depend_on_layout_block_size_or_tp() {
        let (plain, blocks) = filled(&config(ReferenceLayout::SplitKv, 16), 1);
        let want = plain.digest(&blocks, TOKENS);
        for layout in [ReferenceLayout::SplitKv, ReferenceLayout::HeadMajor, ReferenceLayout::TokenMajor] {
            for block_size in [1, 3, 4, 8] {
                for tp in [1, 2, 4, 8] {
                    let (cache, blocks) = filled(&config(layout, block_size), tp);
                    assert_eq!(cache.digest(&blocks, TOKENS), want, "{layout:?}, block size {block_size}, tp {tp}");
                    assert_ne!(cache.digest(&blocks, TOKENS - 1), want);
                }
            }
        }
    }

    #[test]
    fn every_byte_of_the_context_counts_and_no_other_does() {
        for (layout, tp) in
            [(ReferenceLayout::SplitKv, 1), (ReferenceLayout::HeadMajor, 2), (ReferenceLayout::TokenMajor, 8)]
        {
            let (cache, blocks) = filled(&config(layout, 4), tp);
            let want = cache.digest(&blocks, TOKENS);
            let (mut changed, mut bytes) = (0, 0);
            for memory in cache.ranks() {
                for region in &memory.regions {
                    for at in 0..region.len() {
                        let old = region.to_vec(at, 1).unwrap();
                        region.copy_in(at, &[old[0] ^ 1]).unwrap();
                        changed += usize::from(cache.digest(&blocks, TOKENS) != want);
                        region.copy_in(at, &old).unwrap();
                        bytes += 1;
                    }
                }
            }
            let context: usize = TOKENS * 2 * 2 * 12 * usize::try_from(tp.max(4)).unwrap();
            assert_eq!(changed, context, "of {bytes} bytes, {layout:?}, tp {tp}");
            assert_eq!(cache.digest(&blocks, TOKENS), want);
        }
    }

    #[test]
    fn blocks_in_another_order_or_poisoned_are_another_context() {
        let (cache, blocks) = filled(&config(ReferenceLayout::SplitKv, 4), 1);
        let want = cache.digest(&blocks, TOKENS);
        let shifted = [blocks[1], blocks[0], blocks[2]];
        assert_ne!(cache.digest(&shifted, TOKENS), want);
        cache.poison(blocks[1]);
        assert_ne!(cache.digest(&blocks, TOKENS), want);
    }
}
