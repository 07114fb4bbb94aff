//! The link's times against each other, and its paths against the memory of the engine.

use crate::config::{ConnectorImpl, EngineKind, KvMemory, Path};

use super::Bench;
use crate::config::variables::nixl_fault;

/// Pings that may be lost before a peer counts as dead.
const PINGS_MIN: u64 = 3;

const KEY: &str = "kv.paths";

pub(super) fn judge(bench: &mut Bench<'_>) {
    times(bench);
    nixl_env(bench);
    if let Some(paths) = &bench.config.kv.paths {
        self::paths(bench, paths);
    }
}

fn times(bench: &mut Bench<'_>) {
    let kv = &bench.config.kv;
    if kv.transfer_timeout_ms >= kv.lease_ms {
        bench.refuse(
            &["kv.transfer_timeout_ms", "kv.lease_ms"],
            format!(
                "is out of order: a transfer may take {} ms, but prefill holds its blocks for {} ms only",
                kv.transfer_timeout_ms, kv.lease_ms
            ),
            "set kv.transfer_timeout_ms below kv.lease_ms",
        );
    }
    if kv.ping_interval_ms.saturating_mul(PINGS_MIN) > kv.peer_timeout_ms {
        bench.refuse(
            &["kv.peer_timeout_ms", "kv.ping_interval_ms"],
            format!(
                "is out of order: a peer is dead after {} ms, with a ping every {} ms; one late ping would end it",
                kv.peer_timeout_ms, kv.ping_interval_ms
            ),
            format!("set kv.peer_timeout_ms to {PINGS_MIN} times kv.ping_interval_ms at least"),
        );
    }
}

fn paths(bench: &mut Bench<'_>, paths: &[Path]) {
    if paths.is_empty() {
        bench.refuse(
            &[KEY],
            "is empty: no byte could move",
            "name a path, as in [\"shm\", \"tcp\"], or leave the key out",
        );
    }
    for (index, path) in paths.iter().enumerate() {
        if paths[..index].contains(path) {
            bench.refuse(&[KEY], format!("has \"{}\" more than once", path.name()), "name each path once, best first");
            break;
        }
    }
    if bench.config.inference.engine == EngineKind::Reference {
        paths_of_reference(bench, paths);
    } else if has_runtime_in_vllm(bench) {
        nccl_on_shared_gpus(bench, paths);
    }
}

fn paths_of_reference(bench: &mut Bench<'_>, paths: &[Path]) {
    let beyond: Vec<Path> = paths.iter().copied().filter(|path| !path.moves(KvMemory::Host)).collect();
    let message =
        format!("has {}, but the reference engine keeps its KV in host memory", Path::list(beyond.iter().copied()));
    if !paths.is_empty() && beyond.len() == paths.len() {
        bench.refuse(&[KEY], message, "name \"shm\", \"tcp\" or \"nixl\"");
    } else if !beyond.is_empty() {
        bench.warn(&[KEY], message, "name \"shm\", \"tcp\" and \"nixl\" alone");
    }
}

/// Ranks of both roles on one GPU can only be named by hand, with `shared_gpus`.
fn nccl_on_shared_gpus(bench: &mut Bench<'_>, paths: &[Path]) {
    let pd = &bench.config.pd_disagg;
    let shared: Vec<String> =
        pd.prefill_gpu_ids.iter().filter(|gpu| pd.decode_gpu_ids.contains(gpu)).map(u32::to_string).collect();
    if paths == [Path::Nccl] && !shared.is_empty() {
        let shared = shared.join(", ");
        bench.refuse(
            &[KEY],
            format!("has nccl alone, which refuses two ranks on one GPU, and both roles are on GPU {shared}"),
            "name \"cuda-ipc\" as well, which moves KV there",
        );
    }
}

/// Variables of `[kv.nixl.env]`: known ones, no secrets, and not contradicted by what a role is given.
fn nixl_env(bench: &mut Bench<'_>) {
    let config = bench.config;
    for (name, value) in &config.kv.nixl.env {
        let key = format!("kv.nixl.env.{name}");
        if let Some((message, mend)) = nixl_fault(name, value) {
            bench.refuse(&[&key], message, mend);
            continue;
        }
        let roles = [("prefill_env", &config.pd_disagg.prefill_env), ("decode_env", &config.pd_disagg.decode_env)];
        for (table, env) in roles {
            if let Some(other) = env.get(name).filter(|other| *other != value) {
                let own = format!("pd_disagg.{table}.{name}");
                let message = format!("is \"{other}\" there and \"{value}\" in kv.nixl.env");
                bench.refuse(&[&own, &key], message, "say it in one of the two places");
            }
        }
    }
}

fn has_runtime_in_vllm(bench: &Bench<'_>) -> bool {
    let pd = &bench.config.pd_disagg;
    pd.enabled && pd.connector_impl == ConnectorImpl::Native && bench.config.inference.engine == EngineKind::Vllm
}
