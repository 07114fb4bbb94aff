//! What the workers run: arguments passed on to vLLM, and the shape of the reference engine.

use serde_json::Value;

use crate::config::load::names::{is_secret, is_slip};
use crate::config::{All2AllBackend, EngineKind, Role, SECRET_ARGUMENTS, VllmArgs};

use super::Bench;

/// Arguments that pdlink decides for each worker, and the setting that stands behind each.
const ARGS_OF_OURS: &[(&str, &str)] = &[
    ("data_parallel_size", "inference.parallel.dp"),
    ("host", "pd_disagg.host"),
    ("kv_transfer_config", "pd_disagg.kv_connector"),
    ("model", "inference.model.name"),
    ("port", "pd_disagg.prefill_port and pd_disagg.decode_port"),
    ("tensor_parallel_size", "inference.parallel.tp, pd_disagg.prefill_tp and pd_disagg.decode_tp"),
    ("uds", "pd_disagg.host"),
];

/// Beginnings of arguments that would change what a worker is, and what to do instead.
const ARGS_RESERVED: &[(&str, &str)] = &[
    (
        "data_parallel",
        "take it out; more GPU ids in the lists make more workers, and the proxy spreads requests over them",
    ),
    ("pipeline_parallel_size", "take it out; a worker is one tensor-parallel group, set its `tp`"),
    ("headless", "take it out; every worker has its own HTTP server"),
];

/// Arguments that decide what a block of KV is. Both roles must agree on them, whoever moves the blocks.
const ARGS_OF_KV: &[&str] = &[
    "attention_backend",
    "block_size",
    "disable_hybrid_kv_cache_manager",
    "dtype",
    "hf_overrides",
    "kv_cache_dtype",
    "quantization",
    "revision",
    "tokenizer",
];

/// Environment variables that do the same.
const ENV_OF_KV: &[&str] = &["VLLM_KV_CACHE_LAYOUT", "VLLM_SSM_CONV_STATE_LAYOUT", "VLLM_USE_V2_MODEL_RUNNER"];

pub(super) fn judge(bench: &mut Bench<'_>) {
    match bench.config.inference.engine {
        EngineKind::Vllm => vllm(bench),
        EngineKind::Reference => reference(bench),
    }
}

fn vllm(bench: &mut Bench<'_>) {
    let config = bench.config;
    let args = &config.inference.vllm;
    for (table, args) in [("", &args.all), (".prefill", &args.prefill), (".decode", &args.decode)] {
        args_of_ours(bench, table, args);
        secrets(bench, table, args);
    }
    misspelt_role(bench);
    if config.pd_disagg.enabled {
        roles_agree(bench);
    }
    let backends = [
        ("inference.all2all_backend", Some(config.inference.all2all_backend)),
        ("pd_disagg.prefill_all2all_backend", config.pd_disagg.prefill_all2all_backend),
        ("pd_disagg.decode_all2all_backend", config.pd_disagg.decode_all2all_backend),
    ];
    for (key, backend) in backends {
        if let Some(backend) = backend.filter(|backend| backend.is_replaced_by_vllm()) {
            let used = All2AllBackend::default().name();
            let message =
                format!("is \"{}\", which vLLM 0.24 and later silently replaces by \"{used}\"", backend.name());
            bench.warn(&[key], message, format!("write \"{used}\", or a backend that vLLM still has"));
        }
    }
    let is_spread = config.inference.enable_expert_parallel;
    for (key, backend) in backends.into_iter().skip(1) {
        if backend.is_some() && !is_spread {
            let message = "is given, but experts are not spread over GPUs, so that nothing uses it";
            bench.warn(&[key], message, "set inference.enable_expert_parallel = true, or leave it out");
        }
    }
    if config.inference.enable_eplb && !config.inference.enable_expert_parallel {
        let message = "is true, but without expert parallelism vLLM has no experts to balance and refuses to start";
        bench.warn(&["inference.enable_eplb"], message, "set inference.enable_expert_parallel = true");
    }
}

fn roles_agree(bench: &mut Bench<'_>) {
    let vllm = &bench.config.inference.vllm;
    let (prefill, decode) = (vllm.args(Role::Prefill), vllm.args(Role::Decode));
    for name in ARGS_OF_KV.iter().filter(|name| prefill.get(**name) != decode.get(**name)) {
        let keys = [format!("inference.vllm.decode.{name}"), format!("inference.vllm.prefill.{name}")];
        let message =
            "differs between the roles, and decides what a block of KV is: decode may not be able to use prefill's";
        bench.warn(&[&keys[0], &keys[1]], message, format!("give it once, as inference.vllm.{name}"));
    }
    let pd = &bench.config.pd_disagg;
    for name in ENV_OF_KV.iter().filter(|name| pd.prefill_env.get(**name) != pd.decode_env.get(**name)) {
        let keys = [format!("pd_disagg.decode_env.{name}"), format!("pd_disagg.prefill_env.{name}")];
        let message =
            "differs between the roles, and decides how KV lies in memory: decode may not be able to use prefill's";
        bench.warn(&[&keys[0], &keys[1]], message, "give both roles the same value");
    }
}

fn args_of_ours(bench: &mut Bench<'_>, table: &str, args: &VllmArgs) {
    for (name, setting) in ARGS_OF_OURS {
        if args.contains_key(*name) {
            let key = format!("inference.vllm{table}.{name}");
            bench.refuse(&[&key], "is an argument that pdlink writes for each worker", format!("use {setting}"));
        }
    }
    for name in args.keys().filter(|name| !ARGS_OF_OURS.iter().any(|(ours, _)| ours == name)) {
        if let Some((_, mend)) = ARGS_RESERVED.iter().find(|(reserved, _)| name.starts_with(reserved)) {
            let key = format!("inference.vllm{table}.{name}");
            bench.refuse(&[&key], "is an argument that may not be set: it changes what a worker is", *mend);
        }
    }
}

/// Every user of the host can read the arguments of a process.
fn secrets(bench: &mut Bench<'_>, table: &str, args: &VllmArgs) {
    for (name, value) in args.iter().filter(|(name, value)| is_secret(name) && holds_text(value)) {
        let key = format!("inference.vllm{table}.{name}");
        match SECRET_ARGUMENTS.iter().find(|(secret, _)| secret == name) {
            None => bench.refuse(
                &[&key],
                "looks like a secret, and arguments can be read by every user of the host",
                "give it by pd_disagg.prefill_env and pd_disagg.decode_env, or in the environment of pdlink",
            ),
            Some((_, variable)) if !value.is_string() => {
                let message =
                    format!("must be one text: it goes to vLLM by the variable {variable}, not by an argument");
                bench.refuse(&[&key], message, "write one text in quotes");
            }
            Some(_) => {}
        }
    }
}

fn holds_text(value: &Value) -> bool {
    match value {
        Value::String(_) => true,
        Value::Array(items) => items.iter().any(holds_text),
        Value::Object(table) => table.values().any(holds_text),
        _ => false,
    }
}

/// `[inference.vllm.prefil]` would be an argument of that name.
fn misspelt_role(bench: &mut Bench<'_>) {
    for (name, _) in bench.config.inference.vllm.all.iter().filter(|(_, value)| value.is_object()) {
        if let Some(role) = ["prefill", "decode"].into_iter().find(|role| is_slip(name, role)) {
            let key = format!("inference.vllm.{name}");
            let message = "is a table of this name for every worker, and vLLM has no such argument";
            bench.refuse(&[&key], message, format!("did you mean `inference.vllm.{role}`?"));
        }
    }
}

fn reference(bench: &mut Bench<'_>) {
    let config = bench.config;
    if bench.has("inference.vllm") {
        bench.note("inference.vllm", "is not used: the workers run the reference engine");
    }
    let shape = &config.inference.reference;
    if ![1, 2, 4].contains(&shape.dtype_bytes) {
        let message = format!("must be 1, 2 or 4, and here is {}", shape.dtype_bytes);
        bench.refuse(&["inference.reference.dtype_bytes"], message, "choose one of them");
    }
    for role in config.roles() {
        let ranks = usize::try_from(config.tp(*role)).unwrap_or(usize::MAX);
        let heads = shape.kv_heads;
        // Zero of either is refused where the values are checked.
        let fits = heads == 0 || ranks == 0 || heads.is_multiple_of(ranks) || ranks.is_multiple_of(heads);
        if !fits {
            let message = format!(
                "is {heads}, which {ranks} ranks of a {} worker can neither share nor repeat evenly",
                role.name()
            );
            bench.refuse(
                &[
                    "inference.reference.kv_heads",
                    "pd_disagg.prefill_tp",
                    "pd_disagg.decode_tp",
                    "inference.parallel.tp",
                ],
                message,
                "choose heads and ranks so that one divides the other",
            );
            break;
        }
    }
}
