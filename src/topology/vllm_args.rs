//! The command line and the environment of a vLLM worker.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::kv_transfer::{self, Seat};
use super::vllm::{VllmProgram, VllmVersion};
use crate::config::{Config, ConnectorImpl, KvConnector, Role, SECRET_ARGUMENTS, host_port};

/// Arguments by name with underscores, in the order in which they are written.
struct Args(Vec<(String, Value)>);

impl Args {
    fn set(&mut self, name: &str, value: Value) {
        match self.0.iter_mut().find(|(own, _)| own == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }

    fn set_some<T: Into<Value>>(&mut self, name: &str, value: Option<T>) {
        if let Some(value) = value {
            self.set(name, value.into());
        }
    }

    fn set_if(&mut self, name: &str, on: bool) {
        if on {
            self.set(name, json!(true));
        }
    }

    /// `true` is the bare flag, `false` its `--no-` form, tables and lists are JSON text.
    fn render(self) -> Vec<String> {
        self.0.into_iter().flat_map(|(name, value)| render(&name, &value)).collect()
    }
}

fn render(name: &str, value: &Value) -> Vec<String> {
    let name = name.replace('_', "-");
    let text = match value {
        Value::Bool(true) => return vec![format!("--{name}")],
        Value::Bool(false) => return vec![format!("--no-{name}")],
        Value::Null => return Vec::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    // A value that begins with a dash would be taken for the next flag.
    if text.starts_with('-') { vec![format!("--{name}={text}")] } else { vec![format!("--{name}"), text] }
}

/// From this version on the log can leave out calls of some routes. Those that come every few seconds would be all that its
/// last lines show when a worker fails.
const QUIET_ENDPOINTS: VllmVersion = VllmVersion::new(0, 24);

/// Holds a worker's part in updates of the weights.
const WEIGHTS_EXTENSION: &str = "pdlink.vllm.weights.WeightsExtension";

/// What sets the size of the KV cache on a CPU, as an argument and in the environment.
const KV_CACHE_BYTES: &str = "kv_cache_memory_bytes";
const CPU_KV_CACHE_SPACE: &str = "VLLM_CPU_KVCACHE_SPACE";

/// `vllm serve MODEL …`.
pub(super) fn command(vllm: &VllmProgram, config: &Config, host: &str, seat: &Seat<'_>) -> Vec<String> {
    let role = seat.role;
    let mut args = Args(Vec::new());
    args.set("host", json!(host));
    args.set("port", json!(seat.port));
    add_model(&mut args, config);
    add_engine(&mut args, config, role);
    if let Some(cpu) = seat.cpu {
        share_memory(&mut args, config, role, cpu.ranks);
    }
    if vllm.version >= QUIET_ENDPOINTS {
        args.set("disable_access_log_for_endpoints", json!("/health,/metrics"));
    }
    if config.vllm_takes_weights(role) {
        args.set("worker_extension_cls", json!(WEIGHTS_EXTENSION));
    }
    add_pass_through(&mut args, config, role);
    if role != Role::Both {
        args.set("kv_transfer_config", kv_transfer::settings(config, vllm.version, seat));
    } else if let Some(given) = &config.inference.kv_transfer_config {
        args.set("kv_transfer_config", given.clone());
    }
    let mut command = vllm.command.clone();
    command.extend(["serve".to_owned(), config.model_name().to_owned()]);
    command.extend(args.render());
    command
}

fn add_model(args: &mut Args, config: &Config) {
    let model = &config.inference.model;
    args.set("dtype", json!(model.dtype.name()));
    args.set_some("max_model_len", model.max_model_len);
    args.set_if("enforce_eager", model.enforce_eager);
    args.set_if("trust_remote_code", model.trust_remote_code);
    args.set_if("enable_auto_tool_choice", model.enable_auto_tool_choice);
    if model.enable_auto_tool_choice {
        args.set("tool_call_parser", json!(model.tool_call_parser));
    }
    args.set_some("reasoning_parser", model.reasoning_parser.clone());
    if let Some(rope) = &model.rope_scaling {
        // `--rope-scaling` itself left vLLM in 0.11.1.
        args.set("hf_overrides", json!({ "rope_parameters": from_text(rope) }));
    }
}

/// A table, or the table that a text holds.
fn from_text(value: &Value) -> Value {
    let parsed = value.as_str().and_then(|text| serde_json::from_str(text).ok());
    parsed.unwrap_or_else(|| value.clone())
}

fn add_engine(args: &mut Args, config: &Config, role: Role) {
    let inference = &config.inference;
    args.set("tensor_parallel_size", json!(config.tp(role)));
    args.set("gpu_memory_utilization", json!(inference.gpu_memory_utilization));
    args.set("api_server_count", json!(inference.api_server_count));
    args.set("seed", json!(inference.seed));
    if inference.enable_lora {
        args.set("enable_lora", json!(true));
        args.set("max_loras", json!(inference.max_loras));
        args.set("max_cpu_loras", json!(inference.max_cpu_loras));
        args.set_some("max_lora_rank", inference.max_lora_rank);
    }
    args.set_some("enable_prefix_caching", inference.enable_prefix_caching);
    if inference.enable_expert_parallel {
        args.set("enable_expert_parallel", json!(true));
        args.set("all2all_backend", json!(config.all2all_backend(role).name()));
    }
    args.set_if("enable_eplb", inference.enable_eplb);
}

/// On a CPU the share of memory is one of the whole host's, and every rank takes it: together they take what one would.
fn share_memory(args: &mut Args, config: &Config, role: Role, ranks: u32) {
    let sized = config.inference.vllm.arg(role, KV_CACHE_BYTES).is_some()
        || config.pd_disagg.env(role).is_some_and(|env| env.contains_key(CPU_KV_CACHE_SPACE));
    if !sized {
        let each = config.inference.gpu_memory_utilization / f64::from(ranks.max(1));
        args.set("gpu_memory_utilization", json!((each * 1000.0).floor() / 1000.0));
    }
}

/// Loading has refused what the plan decides, and secrets that only an argument could carry.
fn add_pass_through(args: &mut Args, config: &Config, role: Role) {
    for (name, value) in config.inference.vllm.args(role) {
        let name = name.replace('-', "_");
        if !SECRET_ARGUMENTS.iter().any(|(secret, _)| *secret == name) {
            args.set(&name, value);
        }
    }
}

/// What the worker's part in updates of the weights is told; the rest it has from the KV connector's settings. `[kv]` it is told
/// anew: what the connector has leaves out whatever KV's own paths do not need.
fn weights(config: &Config, seat: &Seat<'_>) -> Value {
    let mut weights = serde_json::to_value(&config.weights).unwrap_or_default();
    if let Value::Object(weights) = &mut weights {
        weights.retain(|_, value| !value.is_null());
    }
    let kv = kv_transfer::kv_settings(config, &config.weights.paths);
    let mut told =
        json!({ "http": format!("http://{}", host_port(seat.reach, seat.port)), "weights": weights, "kv": kv });
    if !seat.weights_ports.is_empty() {
        told["host"] = json!(seat.kv_reach);
        told["ports"] = json!(seat.weights_ports);
    }
    told
}

/// Variables that vLLM needs for this configuration. The role's own come on top, in `builder`.
pub(super) fn env(config: &Config, seat: &Seat<'_>) -> BTreeMap<String, String> {
    let mut env = BTreeMap::new();
    let mut set = |name: &str, value: &str| env.insert(name.to_owned(), value.to_owned());
    if config.inference.enable_lora {
        set("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1");
    }
    for (name, value) in config.inference.vllm.args(seat.role) {
        let variable = SECRET_ARGUMENTS.iter().find(|(secret, _)| *secret == name.replace('-', "_"));
        if let (Some((_, variable)), Some(value)) = (variable, value.as_str()) {
            set(variable, value);
        }
    }
    if let Some(cpu) = seat.cpu {
        set("VLLM_CPU_OMP_THREADS_BIND", &cpu.share.bind);
        if let Some(threads) = cpu.share.threads {
            set("OMP_NUM_THREADS", &threads.to_string());
            // With cores to bind, vLLM binds them in a worker process of its own. Without, a single rank does as well inside
            // the scheduler's process, which spares a process, its memory, and two loops that wait for each other.
            if config.tp(seat.role) == 1 {
                set("VLLM_ENABLE_V1_MULTIPROCESSING", "0");
            }
        }
    }
    if config.vllm_takes_weights(seat.role) {
        set("VLLM_SERVER_DEV_MODE", "1");
        set("PDLINK_WEIGHTS", &weights(config, seat).to_string());
    }
    match (seat.role, config.pd_disagg.connector_impl, config.pd_disagg.kv_connector) {
        (Role::Both, ..) => {}
        // The runtime has threads of its own before vLLM starts its workers, and threads do not survive a fork.
        (_, ConnectorImpl::Native, _) => _ = set("VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
        (_, ConnectorImpl::Vllm, KvConnector::NixlConnector) => {
            set("VLLM_NIXL_SIDE_CHANNEL_HOST", seat.kv_reach);
            set("VLLM_NIXL_SIDE_CHANNEL_PORT", &seat.kv_port().to_string());
        }
        (_, ConnectorImpl::Vllm, KvConnector::P2pNcclConnector) => {
            // Both sides make tensor names from request ids, which vLLM would otherwise change on each side.
            set("VLLM_DISABLE_REQUEST_ID_RANDOMIZATION", "1");
            set("VLLM_HOST_IP", seat.kv_reach);
        }
    }
    env
}
