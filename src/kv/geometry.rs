//! Where the bytes of a KV cache lie.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A block of a paged KV cache, by its number in the engine's own table. The same number names the block in every layer
/// of its group and on every rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockId(pub u32);

/// What a KV cache holds, apart from where: the part that two workers compare before they move a byte (KV-6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Name of the model whose KV this is.
    pub model: String,
    pub tp_size: u32,
    /// Layers that share a block table, group by group. One for a model with one kind of attention. Where layers of one
    /// table differ in shape, they are several groups here, with equal lists of blocks.
    pub groups: Vec<GroupGeometry>,
}

/// One KV group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupGeometry {
    pub kind: GroupKind,
    pub layers: u32,
    /// KV heads over all tensor-parallel ranks. Fewer heads than ranks are replicated. 1 but for [`GroupKind::Heads`].
    pub kv_heads: u32,
    /// Elements of K per head and token, and as many of V; of the whole latent; of one rank's whole state.
    pub head_size: u32,
    /// Bytes per element.
    pub element_bytes: u32,
    /// Name of the element type, such as `bfloat16`: equal sizes of unequal types are unequal KV.
    pub dtype: String,
    /// Tokens per block.
    pub block_size: u32,
    /// Tokens that attention looks back over, the current one included. Blocks that lie before them may be absent.
    pub window: Option<u32>,
    /// Instruction set whose packing the planes have (vLLM's CPU backend). One plane is then one (block, head), and is
    /// copied whole, between equal block sizes and equal instruction sets only.
    pub opaque_planes: Option<String>,
}

/// What a block of a group holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GroupKind {
    /// K and V of each head and token.
    Heads,
    /// One latent per token instead of K and V per head (MLA); every rank holds all of it.
    Latent,
    /// The state of a recurrent layer (Mamba) after the block's last token, whole: nobody can tell what is in it. Each
    /// rank has its own. Only the last one is needed to go on.
    State,
}

/// Where one rank keeps one layer. Every layout of vLLM is some choice of these strides, all in bytes: the content of
/// (block, half, token, head) starts at
/// `base + block·block_stride + half·half_stride + token·token_stride + head·head_stride`, where `half` is 0 for K and 1
/// for V (but for heads: always 0), and `head` counts from the rank's first head.
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeadRange {
    pub first: u32,
    pub count: u32,
}

impl Geometry {
    /// All layers, over all groups.
    pub fn layers(&self) -> u32 {
        self.groups.iter().map(|group| group.layers).sum()
    }

    /// Bytes of the KV of one token over all groups, layers and heads, each head counted once.
    pub fn token_bytes(&self) -> u64 {
        self.groups.iter().map(GroupGeometry::token_bytes).sum()
    }

    /// A digest of every field: workers that agree on it agree on all of them.
    pub fn digest(&self) -> u64 {
        let bytes = postcard::to_stdvec(self).expect("plain data always encodes");
        let hash = Sha256::digest(&bytes);
        u64::from_le_bytes(*hash.first_chunk().expect("SHA-256 gives 32 bytes"))
    }
}

impl GroupGeometry {
    /// Bytes of one head of one token in one half; of a whole state.
    pub fn content_bytes(&self) -> u64 {
        u64::from(self.head_size) * u64::from(self.element_bytes)
    }

    /// 2 for K and V, otherwise 1.
    pub fn halves(&self) -> u32 {
        if self.kind == GroupKind::Heads { 2 } else { 1 }
    }

    /// Blocks that cover `tokens` tokens.
    pub fn blocks_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_size)
    }

    /// Bytes of the KV of one token over all layers and heads, each head counted once; a state counts as one token's.
    pub fn token_bytes(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.halves()) * u64::from(self.kv_heads) * self.content_bytes()
    }

    /// Whether a (block, head) is one plane that nobody can look into.
    pub fn is_opaque(&self) -> bool {
        self.kind == GroupKind::State || self.opaque_planes.is_some()
    }

    /// Bytes of one opaque plane: K and V of one head in one block, or a state.
    pub fn plane_bytes(&self) -> u64 {
        let tokens = if self.kind == GroupKind::State { 1 } else { self.block_size };
        u64::from(self.halves()) * u64::from(tokens) * self.content_bytes()
    }

    /// The first token whose KV must be there for a request of `tokens` tokens to go on.
    pub fn needed_from(&self, tokens: u32) -> u32 {
        match (self.kind, self.window) {
            (GroupKind::State, _) => tokens.saturating_sub(1),
            // As the token that comes next sees it.
            (_, Some(window)) => (tokens + 1).saturating_sub(window),
            (_, None) => 0,
        }
    }

    /// The first token of the first of `blocks` blocks that reach to the end of `tokens` tokens. `None`: too many.
    pub fn covered_from(&self, blocks: usize, tokens: u32) -> Option<u32> {
        let absent = self.blocks_for(tokens).checked_sub(u32::try_from(blocks).ok()?)?;
        Some(absent * self.block_size)
    }

    /// The ranks, of `tp_size`, that hold `head`.
    pub fn holders_of(&self, head: u32, tp_size: u32) -> Range<u32> {
        match self.kind {
            GroupKind::Latent => 0..tp_size,
            GroupKind::State => head..head + 1,
            GroupKind::Heads if self.kv_heads >= tp_size => {
                let rank = head / (self.kv_heads / tp_size);
                rank..rank + 1
            }
            GroupKind::Heads => {
                let copies = tp_size / self.kv_heads;
                head * copies..(head + 1) * copies
            }
        }
    }

    /// The heads that `rank`, of `tp_size`, holds. A rank's state counts as the head of its number.
    pub fn heads_of(&self, rank: u32, tp_size: u32) -> HeadRange {
        match self.kind {
            GroupKind::Latent => HeadRange { first: 0, count: 1 },
            GroupKind::State => HeadRange { first: rank, count: 1 },
            GroupKind::Heads if self.kv_heads >= tp_size => {
                let count = self.kv_heads / tp_size;
                HeadRange { first: rank * count, count }
            }
            // Replicated: `tp_size / kv_heads` neighbouring ranks hold the same head.
            GroupKind::Heads => HeadRange { first: rank / (tp_size / self.kv_heads), count: 1 },
        }
    }

    /// Heads that keys of a digest tell apart.
    pub(super) fn planes_per_half(&self, tp_size: u32) -> u32 {
        if self.kind == GroupKind::State { tp_size } else { self.kv_heads }
    }
}
