//! `[model]`: the model that all parts of a run share.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The shared model. PRIME-RL's trainer reads the same table.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ModelConfig {
    /// Name on the Hugging Face hub, or a folder. Default none: then `[inference.model] name` must say it, or vLLM's own
    /// default is served. `[inference.model] name` wins over this one.
    pub name: Option<String>,
}
