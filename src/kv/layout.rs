//! Block shape → byte ranges.

/// A KV cache that is described wrongly, or two that do not fit (KV-6).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    #[error("{name} is 0")]
    Zero { name: &'static str },
    #[error("{kv_heads} KV heads cannot be spread over {tp_size} ranks: one must divide the other")]
    Heads { kv_heads: u32, tp_size: u32 },
    #[error("{name} differs: {ours} here, {theirs} there")]
    Differs { name: &'static str, ours: String, theirs: String },
    #[error("block sizes {ours} here and {theirs} there: one must divide the other")]
    BlockSizes { ours: u32, theirs: u32 },
    #[error("rank {rank}: {given} layers are placed, the model has {layers}")]
    LayerCount { rank: u32, given: usize, layers: u32 },
    #[error("the ranks given are {given:?}, they must be 0 to {tp_size} in order")]
    Ranks { given: Vec<u32>, tp_size: u32 },
    #[error("rank {rank}, layer {layer}: blocks reach to byte {end} of region {region}, which has {len} bytes")]
    BeyondRegion { rank: u32, layer: usize, region: u16, end: u64, len: u64 },
    #[error("rank {rank}, layer {layer}: region {region} is named, there are {regions}")]
    NoRegion { rank: u32, layer: usize, region: u16, regions: usize },
    #[error("first token {first_token} is no multiple of block size {block_size}")]
    FirstToken { first_token: u32, block_size: u32 },
    #[error("{blocks} blocks of {block_size} tokens do not cover tokens {first_token} to {tokens}")]
    Uncovered { blocks: usize, block_size: u32, first_token: u32, tokens: u32 },
    #[error("block {block} is beyond the cache's {num_blocks} blocks")]
    Block { block: u32, num_blocks: u32 },
}
