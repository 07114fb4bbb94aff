//! KV caches for tests: every arrangement of strides, filled so that each byte depends on its place, and a naive oracle.
//! Shared by unit tests of `kv` and by `tests/kv_*.rs`.
#![allow(dead_code, unreachable_pub, reason = "shared by crates of which each uses its part")]

use std::sync::Arc;

use pdlink::kv::{BlockId, Extent, Geometry, GroupGeometry, GroupKind, LayerPlacement, Layout, MemoryMap, RankMemory};
use pdlink::memory::{Device, Region};

/// Orders of the dimensions in memory, widest stride first; content innermost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrangement {
    /// `[B, 2, N, H, D]`, one allocation for each layer.
    SplitKv,
    /// `[B, 2, H, N, D]`, one allocation for each layer.
    SplitKvHeadMajor,
    /// `[2, B, N, H, D]`, one allocation for each layer.
    HalvesFirst,
    /// `LBHNC`
    HeadMajor,
    /// `LBNHC`
    TokenMajor,
    /// `BLNHC`
    LayersInBlock,
    /// `BHLNC`
    LayersInHead,
    /// `LHBNC`
    BlocksInHead,
}

impl Arrangement {
    pub const ALL: [Self; 8] = [
        Self::SplitKv,
        Self::SplitKvHeadMajor,
        Self::HalvesFirst,
        Self::HeadMajor,
        Self::TokenMajor,
        Self::LayersInBlock,
        Self::LayersInHead,
        Self::BlocksInHead,
    ];

    fn dims(self) -> (&'static str, bool) {
        match self {
            Self::SplitKv => ("BKNH", true),
            Self::SplitKvHeadMajor => ("BKHN", true),
            Self::HalvesFirst => ("KBNH", true),
            Self::HeadMajor => ("LBHNK", false),
            Self::TokenMajor => ("LBNHK", false),
            Self::LayersInBlock => ("BLNHK", false),
            Self::LayersInHead => ("BHLNK", false),
            Self::BlocksInHead => ("LHBNK", false),
        }
    }
}

/// The numbers of a cache.
#[derive(Debug, Clone)]
pub struct Shape {
    pub layers: u32,
    pub kv_heads: u32,
    pub head_size: u32,
    pub element_bytes: u32,
    pub block_size: u32,
    pub tp_size: u32,
    pub num_blocks: u32,
    pub mla: bool,
    pub opaque: bool,
    /// A state for each block instead of KV for each token. Its heads are the ranks.
    pub state: bool,
    pub window: Option<u32>,
    /// The one rank whose memory it is; all, if none.
    pub held: Option<u32>,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            layers: 2,
            kv_heads: 2,
            head_size: 4,
            element_bytes: 2,
            block_size: 4,
            tp_size: 1,
            num_blocks: 8,
            mla: false,
            opaque: false,
            state: false,
            window: None,
            held: None,
        }
    }
}

/// Bytes before and after everything, to see writes that go astray.
pub const GUARD: u64 = 24;

impl Shape {
    pub fn geometry(&self) -> Geometry {
        Geometry { model: "test".to_owned(), tp_size: self.tp_size, groups: vec![self.group()] }
    }

    pub fn group(&self) -> GroupGeometry {
        let kind = if self.state {
            GroupKind::State
        } else if self.mla {
            GroupKind::Latent
        } else {
            GroupKind::Heads
        };
        GroupGeometry {
            kind,
            layers: self.layers,
            kv_heads: if kind == GroupKind::Heads { self.kv_heads } else { 1 },
            head_size: self.head_size,
            element_bytes: self.element_bytes,
            dtype: format!("u{}", self.element_bytes * 8),
            block_size: self.block_size,
            window: self.window,
            opaque_planes: self.opaque.then(|| "test".to_owned()),
        }
    }

    pub fn ranks(&self) -> std::ops::Range<u32> {
        self.held.map_or(0..self.tp_size, |rank| rank..rank + 1)
    }

    pub fn describe(&self, arrangement: Arrangement) -> (Geometry, MemoryMap) {
        let geometry = self.geometry();
        let (dims, per_layer) = arrangement.dims();
        let mut region_lens = Vec::new();
        let mut ranks = Vec::new();
        let group = self.group();
        for rank in self.ranks() {
            let count = |dim: char| match dim {
                'L' => u64::from(self.layers),
                'B' => u64::from(self.num_blocks),
                'K' => u64::from(group.halves()),
                'N' => u64::from(if self.state { 1 } else { self.block_size }),
                _ => u64::from(group.heads_of(rank, self.tp_size).count),
            };
            let (mut size, mut strides) = (group.content_bytes(), std::collections::HashMap::new());
            for dim in dims.chars().rev() {
                strides.insert(dim, size);
                size *= count(dim);
            }
            let stride = |dim| strides.get(&dim).copied().unwrap_or(0);
            let first = region_lens.len();
            region_lens.extend(vec![size + 2 * GUARD; if per_layer { self.layers as usize } else { 1 }]);
            let layers = (0..self.layers).map(|layer| LayerPlacement {
                region: u16::try_from(first + if per_layer { layer as usize } else { 0 }).unwrap(),
                base: GUARD + u64::from(layer) * stride('L'),
                block_stride: stride('B'),
                half_stride: stride('K'),
                token_stride: stride('N'),
                head_stride: stride('H'),
            });
            ranks.push(layers.collect());
        }
        let first_rank = self.ranks().start;
        (geometry, MemoryMap { num_blocks: self.num_blocks, region_lens, first_rank, ranks })
    }

    pub fn layout(&self, arrangement: Arrangement) -> Layout {
        let (geometry, map) = self.describe(arrangement);
        Layout::new(geometry, map).unwrap()
    }

    /// Distinct blocks that cover `tokens` tokens, adjacent or scattered as `seed` has it.
    pub fn scattered_blocks(&self, tokens: u32, seed: u64) -> Vec<BlockId> {
        let step = [1, 5, 7][usize::try_from(seed % 3).unwrap()];
        let start = u32::try_from(seed / 3 % u64::from(self.num_blocks)).unwrap();
        (0..tokens.div_ceil(self.block_size)).map(|i| BlockId((start + i * step) % self.num_blocks)).collect()
    }
}

/// A cache with memory.
pub struct Cache {
    pub shape: Shape,
    pub layout: Layout,
    pub regions: Vec<Arc<Region>>,
}

impl Cache {
    pub fn new(shape: &Shape, arrangement: Arrangement) -> Self {
        Self::of(shape, arrangement, |len| Region::shared(len).unwrap())
    }

    /// In memory of a GPU.
    pub fn on(device: &Arc<Device>, shape: &Shape, arrangement: Arrangement) -> Self {
        Self::of(shape, arrangement, |len| Region::allocated_on(device, len).unwrap())
    }

    fn of(shape: &Shape, arrangement: Arrangement, memory: impl Fn(usize) -> Arc<Region>) -> Self {
        let layout = shape.layout(arrangement);
        let regions = layout.map().region_lens.iter().map(|len| memory(usize::try_from(*len).unwrap()));
        Self { shape: shape.clone(), regions: regions.collect(), layout }
    }

    /// Every byte set by its place: elements by their logical place (replicas agree), all else by its offset.
    pub fn patterned(shape: &Shape, arrangement: Arrangement, seed: u64) -> Self {
        let cache = Self::new(shape, arrangement);
        cache.pattern(seed);
        cache
    }

    pub fn pattern(&self, seed: u64) {
        self.scribble(seed);
        for block in 0..self.shape.num_blocks {
            for token in 0..if self.shape.state { 1 } else { self.shape.block_size } {
                self.write(BlockId(block), token, u64::from(block) << 32 | u64::from(token), seed);
            }
        }
    }

    /// The KV of tokens `0..tokens` of one request in `blocks`, the same for every arrangement; all else scribbled.
    pub fn of_tokens(shape: &Shape, arrangement: Arrangement, blocks: &[BlockId], tokens: u32, seed: u64) -> Self {
        let cache = Self::new(shape, arrangement);
        cache.scribble(seed ^ u64::from(shape.block_size));
        cache.put_tokens(blocks, 0, tokens, seed);
        cache
    }

    /// Writes the KV of tokens `first..tokens` into `blocks`, which start at `first`.
    pub fn put_tokens(&self, blocks: &[BlockId], first: u32, tokens: u32, seed: u64) {
        if self.shape.state {
            return self.write(*blocks.last().unwrap(), 0, tokens.into(), seed);
        }
        for token in first..tokens {
            let block = blocks[((token - first) / self.shape.block_size) as usize];
            self.write(block, token % self.shape.block_size, token.into(), seed);
        }
    }

    /// Whether `blocks` hold the KV that [`Cache::put_tokens`] writes.
    pub fn holds_tokens(&self, blocks: &[BlockId], first: u32, tokens: u32, seed: u64) -> bool {
        if self.shape.state {
            return self.holds(*blocks.last().unwrap(), 0, tokens.into(), seed);
        }
        (first..tokens).all(|token| {
            let block = blocks[((token - first) / self.shape.block_size) as usize];
            self.holds(block, token % self.shape.block_size, token.into(), seed)
        })
    }

    pub fn rank_memory(&self) -> Vec<RankMemory> {
        let map = self.layout.map();
        let per_rank = self.regions.len() / map.ranks.len();
        let ranks = map.ranks.iter().zip(self.layout.held()).map(|(layers, rank)| {
            let first = (rank - map.first_rank) as usize * per_rank;
            let own = |placement: &LayerPlacement| LayerPlacement {
                region: placement.region - u16::try_from(first).unwrap(),
                ..*placement
            };
            RankMemory {
                rank,
                regions: self.regions[first..first + per_rank].to_vec(),
                layers: layers.iter().map(own).collect(),
                num_blocks: map.num_blocks,
            }
        });
        ranks.collect()
    }

    pub fn bytes(&self) -> Vec<Vec<u8>> {
        self.regions.iter().map(|region| region.to_vec(0, region.len()).unwrap()).collect()
    }

    pub fn scribble(&self, seed: u64) {
        for (number, region) in self.regions.iter().enumerate() {
            let bytes: Vec<u8> = (0..region.len()).map(|at| byte(seed ^ (number as u64) << 40, at)).collect();
            region.copy_in(0, &bytes).unwrap();
        }
    }

    /// Calls back with every byte of the KV of `blocks`.
    pub fn each_byte_of(&self, blocks: &[BlockId], tokens: u32, mut visit: impl FnMut(&Region, u64)) {
        for token in 0..tokens {
            let block = blocks[(token / self.shape.block_size) as usize];
            self.each_row(block, token % self.shape.block_size, |cache, region, offset, _| {
                let content = cache.shape.group().content_bytes();
                (offset..offset + content).for_each(|offset| visit(&cache.regions[region], offset));
            });
        }
    }

    fn holds(&self, block: BlockId, token: u32, name: u64, seed: u64) -> bool {
        let mut equal = true;
        self.each_row(block, token, |cache, region, offset, place| {
            let want = row_bytes(place, name, seed, cache.shape.group().content_bytes());
            equal &= cache.regions[region].to_vec(offset, want.len() as u64).unwrap() == want;
        });
        equal
    }

    fn write(&self, block: BlockId, token: u32, name: u64, seed: u64) {
        self.each_row(block, token, |cache, region, offset, place| {
            let bytes = row_bytes(place, name, seed, cache.shape.group().content_bytes());
            cache.regions[region].copy_in(offset, &bytes).unwrap();
        });
    }

    /// Every (rank, layer, half, head) of one token: its region, its offset, and a number for its logical place.
    fn each_row(&self, block: BlockId, token: u32, mut visit: impl FnMut(&Self, usize, u64, u64)) {
        let group = self.shape.group();
        for rank in self.layout.held() {
            let heads = group.heads_of(rank, self.shape.tp_size);
            for layer in 0..group.layers {
                for half in 0..group.halves() {
                    for head in 0..heads.count {
                        let (region, offset) = address(&self.layout, rank, layer, block, half, token, head);
                        let place = u64::from(layer) << 40 | u64::from(half) << 32 | u64::from(heads.first + head);
                        visit(self, region, offset, place);
                    }
                }
            }
        }
    }
}

fn address(layout: &Layout, rank: u32, layer: u32, block: BlockId, half: u32, token: u32, head: u32) -> (usize, u64) {
    let placement = &layout.map().ranks[(rank - layout.map().first_rank) as usize][layer as usize];
    let offset = placement.base
        + u64::from(block.0) * placement.block_stride
        + u64::from(half) * placement.half_stride
        + u64::from(token) * placement.token_stride
        + u64::from(head) * placement.head_stride;
    (usize::from(placement.region), offset)
}

fn byte(seed: u64, at: u64) -> u8 {
    let mut x = seed ^ at.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x = (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    (x >> 56).to_le_bytes()[0]
}

fn row_bytes(place: u64, name: u64, seed: u64, content: u64) -> Vec<u8> {
    let row = seed ^ place.wrapping_mul(0xD6E8_FEB8_6659_FD93) ^ name.wrapping_mul(0xA076_1D64_78BD_642F);
    (0..content).map(|at| byte(row, at)).collect()
}

/// What `dst` must hold after the transfer from `src`, which holds all ranks: every element found and placed by itself.
/// Whole granules of the smaller block size are moved, so the last one may reach beyond the last token. Of states only the
/// last moves.
pub fn oracle_copy(src: &Cache, dst: &Cache, extent: Extent<'_>) -> Vec<Vec<u8>> {
    let (a, b) = (src.shape.group(), dst.shape.group());
    let (src_tp, dst_tp) = (src.shape.tp_size, dst.shape.tp_size);
    let (src_blocks, dst_blocks) = (extent.src_blocks[0], extent.dst_blocks[0]);
    let (from, mut to) = (src.bytes(), dst.bytes());
    let content = usize::try_from(a.content_bytes()).unwrap();
    // Lists reach to the last token: block numbers count from the end.
    let block = |blocks: &[BlockId], size: u32, token: u32| {
        let from_end = extent.tokens.div_ceil(size) - token / size;
        blocks.len().checked_sub(from_end as usize).map(|at| blocks[at])
    };
    let granule = a.block_size.min(b.block_size);
    let tokens = match src.shape.state {
        true if extent.first_token < extent.tokens => extent.tokens - 1..extent.tokens,
        true => 0..0,
        false => extent.first_token..extent.tokens.next_multiple_of(granule),
    };
    for token in tokens {
        let both = (block(src_blocks, a.block_size, token), block(dst_blocks, b.block_size, token));
        let (Some(src_block), Some(dst_block)) = both else { continue };
        let within = |size: u32| if src.shape.state { 0 } else { token % size };
        for rank in dst.layout.held() {
            let heads = b.heads_of(rank, dst_tp);
            for head in 0..heads.count {
                let wanted = heads.first + head;
                let holds = |rank: &u32| {
                    let held = a.heads_of(*rank, src_tp);
                    (held.first..held.first + held.count).contains(&wanted)
                };
                let src_rank = (0..src_tp).find(holds).unwrap();
                let src_head = wanted - a.heads_of(src_rank, src_tp).first;
                for layer in 0..a.layers {
                    for half in 0..a.halves() {
                        let (src_region, src_at) =
                            address(&src.layout, src_rank, layer, src_block, half, within(a.block_size), src_head);
                        let (dst_region, dst_at) =
                            address(&dst.layout, rank, layer, dst_block, half, within(b.block_size), head);
                        let (src_at, dst_at) = (usize::try_from(src_at).unwrap(), usize::try_from(dst_at).unwrap());
                        let bytes = &from[src_region][src_at..src_at + content];
                        to[dst_region][dst_at..dst_at + content].copy_from_slice(bytes);
                    }
                }
            }
        }
    }
    to
}
