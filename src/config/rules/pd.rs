//! Prefill and decode apart: what it needs, and what it leaves unused.

use crate::config::{EngineKind, HOST_ENV};

use super::Bench;

/// Environment variables that the launcher writes itself, and what decides them.
const ENV_OF_OURS: &[(&str, &str)] = &[
    ("CUDA_VISIBLE_DEVICES", "the lists of GPU ids"),
    ("PDLINK_SECRET_FILE", "security.secret_file"),
    (HOST_ENV, "[[hosts.nodes]]"),
];

pub(super) fn judge(bench: &mut Bench<'_>) {
    if bench.config.pd_disagg.enabled {
        needs_inference(bench);
        unused_with_pd(bench);
    } else {
        unused_without_pd(bench);
    }
    elastic(bench);
    hosts(bench);
    model(bench);
    for (name, env) in
        [("prefill_env", &bench.config.pd_disagg.prefill_env), ("decode_env", &bench.config.pd_disagg.decode_env)]
    {
        environment(bench, name, env.keys());
    }
}

fn needs_inference(bench: &mut Bench<'_>) {
    if bench.given.at("inference").is_none() {
        bench.refuse(
            &["pd_disagg.enabled", "inference"],
            "is true, but there is no [inference] section to say what the workers run",
            "add an [inference] section; it may be empty",
        );
    }
}

/// PRIME-RL's search for servers finds workers one by one; behind a proxy there is one address.
fn elastic(bench: &mut Bench<'_>) {
    let key = "orchestrator.client.elastic";
    if !bench.given.at(key).is_some_and(|node| node.value.is_on()) {
        return;
    }
    let message =
        "is on, but the proxy is the one address that clients know: workers behind it must not be found one by one";
    let mend = "take `elastic` out of [orchestrator.client]";
    if bench.config.pd_disagg.enabled {
        bench.refuse(&[key], message, mend);
    } else {
        bench.warn(&[key], message, mend);
    }
}

fn unused_with_pd(bench: &mut Bench<'_>) {
    if bench.has("inference_gpu_ids") {
        let lists = "pd_disagg.prefill_gpu_ids and pd_disagg.decode_gpu_ids say which GPUs the workers have";
        bench.note("inference_gpu_ids", format!("is not used with PD on: {lists}"));
    }
    if bench.has("inference.server.port") {
        bench.note("inference.server.port", "is not used with PD on: pd_disagg.proxy_port is the port of the front");
    }
    if bench.has("inference.kv_transfer_config") {
        bench.note("inference.kv_transfer_config", "is not used with PD on: pdlink writes the settings of both roles");
    }
    let dp = bench.config.inference.parallel.dp;
    if dp != 1 {
        bench.warn(
            &["inference.parallel.dp"],
            format!("is {dp}, but every worker of a PD run has one data-parallel rank"),
            "take it out; more GPU ids in the lists of [pd_disagg] make more workers",
        );
    }
}

fn unused_without_pd(bench: &mut Bench<'_>) {
    for key in ["pd_disagg.prefill_gpu_ids", "pd_disagg.decode_gpu_ids"] {
        if bench.has(key) {
            bench.note(key, "is not used: pd_disagg.enabled is false, so plain workers start");
        }
    }
    if bench.has("inference_gpu_ids") && bench.has("inference.parallel.dp") {
        bench.note("inference.parallel.dp", "is not used: inference_gpu_ids says how many workers start");
    }
}

fn hosts(bench: &mut Bench<'_>) {
    let hosts = [
        ("pd_disagg.host", &bench.config.pd_disagg.host),
        ("inference.server.host", &bench.config.inference.server.host),
    ];
    for (key, host) in hosts {
        let Some(host) = host else { continue };
        if host.is_empty() || host.contains(|letter: char| letter == '/' || letter.is_whitespace()) {
            let message = format!("must be a host name or an address, and here is {host:?}");
            bench.refuse(
                &[key],
                message,
                "write a name or an address alone, as in \"0.0.0.0\"; ports have their own keys",
            );
        }
    }
}

fn model(bench: &mut Bench<'_>) {
    let config = bench.config;
    let unnamed = config.model.name.is_none() && config.inference.model.name.is_none();
    if unnamed && config.inference.engine == EngineKind::Vllm && bench.given.at("inference").is_some() {
        bench.note("model.name", format!("is not given: the workers serve {}", config.model_name()));
    }
}

fn environment<'n>(bench: &mut Bench<'_>, table: &str, names: impl Iterator<Item = &'n String>) {
    for name in names {
        let key = format!("pd_disagg.{table}.{name}");
        if let Some((_, decided_by)) = ENV_OF_OURS.iter().find(|(ours, _)| ours == name) {
            let message = format!("is a variable that pdlink writes itself: {decided_by} decides it");
            bench.refuse(&[&key], message, "take it out");
        } else if name.is_empty() || name.contains(['=', '\0']) {
            bench.refuse(&[&key], "is no name of an environment variable", "write NAME = \"value\"");
        }
    }
}
