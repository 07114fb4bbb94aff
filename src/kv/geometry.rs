//! Where the bytes of a KV cache lie.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A block of a paged KV cache, by its number in the engine's own table. The same number names the block in every layer
/// and on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockId(pub u32);

/// What a KV cache holds, apart from where: the part that two workers compare before they move a byte (KV-6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Name of the model whose KV this is.
    pub model: String,
    pub layers: u32,
    /// KV heads over all tensor-parallel ranks. Fewer heads than ranks are replicated. 1 with `mla`.
    pub kv_heads: u32,
    /// Elements of K per head and token, and as many of V. With `mla`: of the whole latent.
    pub head_size: u32,
    /// Bytes per element.
    pub element_bytes: u32,
    /// Name of the element type, such as `bfloat16`: equal sizes of unequal types are unequal KV.
    pub dtype: String,
    /// Tokens per block.
    pub block_size: u32,
    pub tp_size: u32,
    /// One latent per token instead of K and V per head; every rank holds all of it.
    pub mla: bool,
    /// Instruction set whose packing the planes have (vLLM's CPU backend). One plane is then one (block, head), and is
    /// copied whole, between equal block sizes and equal instruction sets only.
    pub opaque_planes: Option<String>,
}

/// Where one rank keeps one layer. Every layout of vLLM is some choice of these strides, all in bytes: the content of
/// (block, half, token, head) starts at
/// `base + block·block_stride + half·half_stride + token·token_stride + head·head_stride`, where `half` is 0 for K and 1
/// for V (`mla`: always 0), and `head` counts from the rank's first head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlacement {
    /// Which of the rank's regions.
    pub region: u16,
    pub base: u64,
    pub block_stride: u64,
    pub half_stride: u64,
    pub token_stride: u64,
    pub head_stride: u64,
}

/// KV heads of one rank: `first..first + count` of all heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRange {
    pub first: u32,
    pub count: u32,
}

impl Geometry {
    /// Bytes of one head of one token in one half.
    pub fn content_bytes(&self) -> u64 {
        u64::from(self.head_size) * u64::from(self.element_bytes)
    }

    /// 2 (K and V), or 1 with `mla`.
    pub fn halves(&self) -> u32 {
        if self.mla { 1 } else { 2 }
    }

    /// Blocks that cover `tokens` tokens.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_size)
    }

    /// Bytes of the KV of one token over all layers and heads, each head counted once.
    pub fn token_bytes(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.halves()) * u64::from(self.kv_heads) * self.content_bytes()
    }

    /// Bytes of one opaque plane: K and V of one head in one block.
    pub fn plane_bytes(&self) -> u64 {
        u64::from(self.halves()) * u64::from(self.block_size) * self.content_bytes()
    }

    /// A digest of every field: workers that agree on it agree on all of them.
    pub fn digest(&self) -> u64 {
        let bytes = postcard::to_stdvec(self).expect("plain data always encodes");
        let hash = Sha256::digest(&bytes);
        u64::from_le_bytes(*hash.first_chunk().expect("SHA-256 gives 32 bytes"))
    }

    /// The ranks that hold `head`.
    pub fn holders_of(&self, head: u32) -> Range<u32> {
        if self.mla {
            0..self.tp_size
        } else if self.kv_heads >= self.tp_size {
            let rank = head / (self.kv_heads / self.tp_size);
            rank..rank + 1
        } else {
            let copies = self.tp_size / self.kv_heads;
            head * copies..(head + 1) * copies
        }
    }

    /// The heads that `rank` holds.
    pub fn heads_of(&self, rank: u32) -> HeadRange {
        if self.mla {
            HeadRange { first: 0, count: 1 }
        } else if self.kv_heads >= self.tp_size {
            let count = self.kv_heads / self.tp_size;
            HeadRange { first: rank * count, count }
        } else {
            // Replicated: `tp_size / kv_heads` neighbouring ranks hold the same head.
            HeadRange { first: rank / (self.tp_size / self.kv_heads), count: 1 }
        }
    }
}
