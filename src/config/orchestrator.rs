//! `[orchestrator.client]`: how PRIME-RL's orchestrator reaches the fleet. The rest of `[orchestrator]` is PRIME-RL's own.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The part of `[orchestrator]` that pdlink reads.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("x-shared-with" = "PRIME-RL"))]
pub struct OrchestratorConfig {
    /// The orchestrator's HTTP client.
    pub client: ClientConfig,
}

/// The orchestrator's HTTP client. pdlink reads `elastic`; the rest is accepted because the file is shared.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("x-shared-with" = "PRIME-RL"))]
pub struct ClientConfig {
    /// PRIME-RL's search for servers that come and go. Must be absent or off with PD: the proxy is the one address.
    pub elastic: Option<Value>,
    /// How long the orchestrator waits for an answer, in seconds. Its own default is 1200.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub timeout: Option<f64>,
    /// Where the orchestrator sends requests, one address or a list. pdlink's plan says the proxy's.
    pub base_url: Option<Value>,
    /// Name of the environment variable with the orchestrator's key.
    pub api_key_var: Option<String>,
    /// Headers the orchestrator adds to each request.
    pub headers: BTreeMap<String, String>,
    /// Whether the orchestrator skips its look at `/v1/models`.
    pub skip_model_check: Option<bool>,
}
