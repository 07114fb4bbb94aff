//! `[telemetry]`: what pdlink says about itself.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The shape of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people: time, level, target, text.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// The log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// The shape of log lines on stderr. Default `text`.
    pub log_format: LogFormat,
    /// Least severity that is logged: `error`, `warn`, `info`, `debug` or `trace`, or per module, as in
    /// `info,pdlink::kv=debug`. Default `info`. `trace` writes several lines per transfer.
    pub log_level: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self { log_format: LogFormat::default(), log_level: "info".to_owned() }
    }
}
