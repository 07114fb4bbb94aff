//! The link's times against each other, and its paths against the memory of the engine.

use crate::config::{EngineKind, Path};

use super::Bench;

/// Pings that may be lost before a peer counts as dead.
const PINGS_MIN: u64 = 3;

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
    let key = "kv.paths";
    if paths.is_empty() {
        bench.refuse(
            &[key],
            "is empty: no byte could move",
            "name a path, as in [\"shm\", \"tcp\"], or leave the key out",
        );
    }
    for (index, path) in paths.iter().enumerate() {
        if paths[..index].contains(path) {
            bench.refuse(&[key], format!("has \"{}\" more than once", path.name()), "name each path once, best first");
            break;
        }
    }
    let reachable = |path: &&Path| matches!(path, Path::Shm | Path::Tcp | Path::Nixl);
    if bench.config.inference.engine == EngineKind::Reference {
        let beyond: Vec<&str> = paths.iter().filter(|path| !reachable(path)).map(|path| path.name()).collect();
        let message = format!("has {}, but the reference engine keeps its KV in host memory", beyond.join(", "));
        if !paths.is_empty() && beyond.len() == paths.len() {
            bench.refuse(&[key], message, "name \"shm\", \"tcp\" or \"nixl\"");
        } else if !beyond.is_empty() {
            bench.warn(&[key], message, "name \"shm\", \"tcp\" and \"nixl\" alone");
        }
    }
}
