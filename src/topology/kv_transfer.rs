//! vLLM's `--kv-transfer-config`, by connector and version.
//!
//! vLLM refuses unknown keys, and from 0.32 on also `kv_rank`, `kv_parallel_size`, `kv_ip` and `kv_buffer_size`. What our own
//! connector needs therefore goes into `kv_connector_extra_config`, which is free in every version.

use serde_json::{Map, Value, json};

use super::cpu::Share;
use super::vllm::VllmVersion;
use crate::config::{
    Config, ConnectorImpl, KvConnector, KvSendType, LoadFailurePolicy, LogFormat, Path, Role, TelemetryConfig,
};

/// The Python module in which vLLM finds our connectors, under the names it ships its own with.
const NATIVE_MODULE: &str = "pdlink.vllm";

/// From this version on `kv_load_failure_policy` is known.
const LOAD_FAILURE_POLICY: VllmVersion = VllmVersion::new(0, 24);

/// Where one worker stands among all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seat<'a> {
    pub role: Role,
    /// Number among all workers, prefill first.
    pub kv_rank: u32,
    /// Number of workers.
    pub kv_parallel_size: u32,
    pub reach: &'a str,
    /// The address of its KV runtime, or of vLLM's own side channel.
    pub kv_reach: &'a str,
    pub port: u16,
    /// One per tensor-parallel rank; the first is the worker's KV port.
    pub kv_ports: &'a [u16],
    /// One per rank, where the ranks have doors of their own for orders about weights.
    pub weights_ports: &'a [u16],
    /// Ways for KV to go, best first, with pdlink's own connector.
    pub kv_paths: &'a [Path],
    /// Where the worker computes on the CPU: its cores among those of all.
    pub cpu: Option<CpuSeat<'a>>,
}

/// A worker's place among those that share one CPU and its memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct CpuSeat<'a> {
    pub share: &'a Share,
    /// Ranks of all workers together.
    pub ranks: u32,
}

impl Seat<'_> {
    fn kv_role(&self) -> &'static str {
        match self.role {
            Role::Prefill => "kv_producer",
            Role::Decode => "kv_consumer",
            Role::Both => "kv_both",
        }
    }

    pub(super) fn kv_port(&self) -> u16 {
        self.kv_ports.first().copied().unwrap_or(0)
    }
}

/// The settings as vLLM `version` takes them.
pub(super) fn settings(config: &Config, version: VllmVersion, seat: &Seat<'_>) -> Value {
    match (config.pd_disagg.connector_impl, config.pd_disagg.kv_connector) {
        (ConnectorImpl::Native, _) => native(config, version, seat),
        (ConnectorImpl::Vllm, KvConnector::NixlConnector) => nixl(config, version, seat),
        (ConnectorImpl::Vllm, KvConnector::P2pNcclConnector) => p2p_nccl(config, seat),
    }
}

fn native(config: &Config, version: VllmVersion, seat: &Seat<'_>) -> Value {
    let mut settings = json!({
        "kv_connector": config.pd_disagg.kv_connector.name(),
        "kv_connector_module_path": NATIVE_MODULE,
        "kv_role": seat.kv_role(),
        "kv_port": seat.kv_port(),
    });
    add_failure_policy(&mut settings, config, version);
    settings["kv_connector_extra_config"] = json!({
        "kv_rank": seat.kv_rank,
        "kv_parallel_size": seat.kv_parallel_size,
        "kv_host": seat.kv_reach,
        "kv_ports": seat.kv_ports,
        "http_port": seat.port,
        "send_type": config.pd_disagg.send_type().name(),
        "kv": kv_settings(config, seat.kv_paths),
    });
    let (telemetry, usual) = (&config.telemetry, TelemetryConfig::default());
    if telemetry.log_level != usual.log_level {
        settings["kv_connector_extra_config"]["log"] = json!(telemetry.log_level);
    }
    if telemetry.log_format == LogFormat::Json {
        settings["kv_connector_extra_config"]["log_format"] = json!("json");
    }
    settings
}

/// `[kv]` as the runtime reads it, with the paths that were chosen.
pub(super) fn kv_settings(config: &Config, paths: &[Path]) -> Value {
    let mut kv = match serde_json::to_value(&config.kv) {
        Ok(Value::Object(kv)) => kv,
        _ => Map::new(),
    };
    kv.insert("paths".to_owned(), json!(paths));
    for path in [Path::Nccl, Path::Nixl] {
        if !paths.contains(&path) {
            kv.remove(path.name());
        } else if let Some(Value::Object(of_path)) = kv.get_mut(path.name()) {
            of_path.retain(|_, value| !value.is_null());
        }
    }
    kv.retain(|_, value| !value.is_null());
    Value::Object(kv)
}

/// vLLM's own NIXL classes. `NixlConnector` is the one in which decode reads, by the name that every version has.
fn nixl(config: &Config, version: VllmVersion, seat: &Seat<'_>) -> Value {
    let connector = match config.pd_disagg.send_type() {
        KvSendType::Get => "NixlConnector",
        KvSendType::Put | KvSendType::PutAsync => "NixlPushConnector",
    };
    let mut settings = json!({ "kv_connector": connector, "kv_role": seat.kv_role() });
    if seat.cpu.is_some() {
        settings["kv_buffer_device"] = json!("cpu");
    }
    add_failure_policy(&mut settings, config, version);
    settings
}

/// The class that vLLM shipped until 0.23: ranks listen at `kv_port` + rank, `http_port` is text.
fn p2p_nccl(config: &Config, seat: &Seat<'_>) -> Value {
    json!({
        "kv_connector": "P2pNcclConnector",
        "kv_role": seat.kv_role(),
        "kv_rank": seat.kv_rank,
        "kv_parallel_size": seat.kv_parallel_size,
        "kv_port": seat.kv_port(),
        "kv_connector_extra_config": {
            "http_port": seat.port.to_string(),
            "send_type": config.pd_disagg.send_type().name(),
        },
    })
}

fn add_failure_policy(settings: &mut Value, config: &Config, version: VllmVersion) {
    if version >= LOAD_FAILURE_POLICY {
        settings["kv_load_failure_policy"] = json!(match config.kv.load_failure_policy {
            LoadFailurePolicy::Fail => "fail",
            LoadFailurePolicy::Recompute => "recompute",
        });
    }
}
