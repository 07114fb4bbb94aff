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

/// The log, what is watched, and traces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// The shape of log lines on stderr. Default `text`.
    pub log_format: LogFormat,
    /// Least severity that is logged: `error`, `warn`, `info`, `debug` or `trace`, or per module, as in
    /// `info,pdlink::kv=debug`. Default `info`. `trace` writes several lines per transfer.
    pub log_level: String,
    /// How often the proxy asks each worker how it is, in seconds: what the page at `/` of the admin routes, the balance hint and
    /// the metrics of pools show. Default 1. Workers' own metrics pages are read every 5 s at most.
    #[schemars(range(min = 0.1, max = 3600.0))]
    pub watch_interval_s: f64,
    /// Where the proxy sends traces, `http://HOST:4318`: a collector that takes OTLP over HTTP. Default none: no traces. Without
    /// TLS: for a collector elsewhere let one on this host pass them on.
    pub otlp_endpoint: Option<String>,
    /// The part of requests that is traced, 0 to 1, of those whose client does not say itself by `traceparent`. Default 0.01. A
    /// traced request costs some 20 µs, seven spans and one question to its decode worker.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub trace_sample_ratio: f64,
    /// `service.name` of the traces. Default `pdlink`.
    pub service_name: String,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log_format: LogFormat::default(),
            log_level: "info".to_owned(),
            watch_interval_s: 1.0,
            otlp_endpoint: None,
            trace_sample_ratio: 0.01,
            service_name: "pdlink".to_owned(),
        }
    }
}
