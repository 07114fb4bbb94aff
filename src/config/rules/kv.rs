//! The link's times against each other, and its paths against the memory of the engine.

use crate::config::{ConnectorImpl, EngineKind, KvMemory, Path};

use super::Bench;

/// Pings that may be lost before a peer counts as dead.
const PINGS_MIN: u64 = 3;

const KEY: &str = "kv.paths";

pub(super) fn judge(bench: &mut Bench<'_>) {
    times(bench);
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
        paths_of_this_version(bench, paths);
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

/// Whether vLLM computes on a GPU or on a CPU is known where it runs only: here a path must exist for one of them.
fn paths_of_this_version(bench: &mut Bench<'_>, paths: &[Path]) {
    let exists = |path: Path| path.moves(KvMemory::Gpu) || path.moves(KvMemory::Host);
    let missing: Vec<Path> = paths.iter().copied().filter(|path| !exists(*path)).collect();
    let message = format!("has {}, which this version cannot move KV by", Path::list(missing.iter().copied()));
    if !paths.is_empty() && missing.len() == paths.len() {
        bench.refuse(&[KEY], message, what_there_is());
    } else if !missing.is_empty() {
        bench.warn(&[KEY], message, what_there_is());
    }
}

fn what_there_is() -> String {
    let (gpu, host) = (Path::list(Path::that_move(KvMemory::Gpu)), Path::list(Path::that_move(KvMemory::Host)));
    format!("name {gpu} for KV on a GPU; {host} for KV on a CPU")
}

fn has_runtime_in_vllm(bench: &Bench<'_>) -> bool {
    let pd = &bench.config.pd_disagg;
    pd.enabled && pd.connector_impl == ConnectorImpl::Native && bench.config.inference.engine == EngineKind::Vllm
}
