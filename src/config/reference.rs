//! `[inference.reference]`: the engine that needs no model and no GPU.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The shape of the reference engine's KV cache and the pace it keeps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ReferenceConfig {
    /// Attention layers. Default 4.
    #[schemars(range(min = 1))]
    pub layers: usize,
    /// KV heads over all tensor-parallel ranks. Default 4. Fewer heads than ranks are replicated.
    #[schemars(range(min = 1))]
    pub kv_heads: usize,
    /// Elements per head, K and V each. Default 32.
    #[schemars(range(min = 1))]
    pub head_size: usize,
    /// Bytes per element: 1, 2 or 4. Default 2.
    pub dtype_bytes: usize,
    /// Tokens per block. Default 16.
    #[schemars(range(min = 1))]
    pub block_size: usize,
    /// Blocks in the cache. Default 4096.
    #[schemars(range(min = 1))]
    pub num_blocks: usize,
    /// How blocks lie in memory. Default `split-kv`.
    pub layout: ReferenceLayout,
    /// Time prefill takes per prompt token, in microseconds. Default 0.
    #[schemars(range(min = 0))]
    pub prefill_us_per_token: f64,
    /// Time one decode step takes, in microseconds. Default 0.
    #[schemars(range(min = 0))]
    pub decode_us_per_token: f64,
    /// Longest prompt plus answer, in tokens. Default 8192; `[inference.model] max_model_len` wins.
    #[schemars(range(min = 1))]
    pub max_model_len: usize,
    /// Requests that wait or run at once before new ones get 429. Default 4096.
    #[schemars(range(min = 1))]
    pub requests_max: usize,
}

/// The two block layouts that vLLM uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ReferenceLayout {
    /// `[block, 2, token, head, dim]`: K half, then V half; one allocation per layer (vLLM to 0.28).
    #[default]
    SplitKv,
    /// `[block, head, token, K then V]`, all layers in one allocation (vLLM from 0.29, `LBHNC`).
    HeadMajor,
    /// `[block, token, head, K then V]`, all layers in one allocation (vLLM from 0.29, `LBNHC`).
    TokenMajor,
}

impl ReferenceConfig {
    /// Bytes of KV per token, of all layers and heads.
    pub fn bytes_per_token(&self) -> u64 {
        let elements = 2 * self.layers * self.kv_heads * self.head_size;
        u64::try_from(elements * self.dtype_bytes).unwrap_or(u64::MAX)
    }
}

impl Default for ReferenceConfig {
    fn default() -> Self {
        Self {
            layers: 4,
            kv_heads: 4,
            head_size: 32,
            dtype_bytes: 2,
            block_size: 16,
            num_blocks: 4096,
            layout: ReferenceLayout::default(),
            prefill_us_per_token: 0.0,
            decode_us_per_token: 0.0,
            max_model_len: 8192,
            requests_max: 4096,
        }
    }
}
