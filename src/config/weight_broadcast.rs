//! `[weight_broadcast]` and `[trainer.weight_broadcast]`: how a trainer's new weights reach the workers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How weights travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightBroadcastType {
    /// The trainer writes a checkpoint, the workers read it.
    #[default]
    Filesystem,
    /// From GPU to GPU. Needs `max_async_level = 1`, no LoRA, and two GPUs.
    Nccl,
}

impl WeightBroadcastType {
    /// The name used in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Filesystem => "filesystem",
            Self::Nccl => "nccl",
        }
    }
}

/// How weights travel. PRIME-RL's further keys (`host`, `port`, `timeout`, …) are its trainer's business: accepted, not kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("x-shared-with" = "PRIME-RL"))]
pub struct WeightBroadcastConfig {
    /// How weights travel. Default `filesystem`.
    pub r#type: Option<WeightBroadcastType>,
}

/// The part of `[trainer]` that pdlink reads.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("x-shared-with" = "PRIME-RL"))]
pub struct TrainerConfig {
    /// The trainer's own copy of `[weight_broadcast]`. The copies must not disagree.
    pub weight_broadcast: Option<WeightBroadcastConfig>,
}
