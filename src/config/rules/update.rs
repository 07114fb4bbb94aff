//! `[weights]`: the times of an update against each other, and its paths.

use crate::config::{Path, Staging};

use super::Bench;

const PATHS: &str = "weights.paths";

pub(super) fn judge(bench: &mut Bench<'_>) {
    let weights = &bench.config.weights;
    let waits = [
        ("weights.drain_timeout_s", weights.drain_timeout_s),
        ("weights.pause_timeout_s", weights.pause_timeout_s),
        ("weights.commit_timeout_s", weights.commit_timeout_s),
    ];
    for (key, wait_s) in waits {
        if wait_s >= weights.hold_timeout_s {
            bench.refuse(
                &["weights.hold_timeout_s", key],
                format!(
                    "is out of order: a worker gives an update up after {} s, and others may take {wait_s} s ({key})",
                    weights.hold_timeout_s
                ),
                format!("set weights.hold_timeout_s above {key}"),
            );
        }
    }
    let takes = bench.config.roles().iter().any(|role| bench.config.vllm_takes_weights(*role));
    if !takes && weights.staging == Staging::Device {
        bench.refuse(
            &["weights.staging", "inference.engine", "weights.vllm_workers"],
            "is \"device\", but no worker of this configuration takes weights on a GPU",
            "set weights.staging = \"host\", or let vLLM's workers take weights from pdlink (weights.vllm_workers)",
        );
    }
    let moves = |path: &Path| matches!(path, Path::CudaIpc | Path::Nccl | Path::Shm | Path::Tcp);
    if weights.paths.is_empty() || !weights.paths.iter().all(moves) {
        let message = format!("is [{}], which weights do not go by", Path::list(weights.paths.iter().copied()));
        bench.refuse(&[PATHS], message, "name some of \"nccl\", \"cuda-ipc\", \"shm\", \"tcp\", best first");
    }
}
