//! Memory of the host against the KV that is to lie in it.

use std::path::Path;

use super::super::check::Answer;
use super::super::setting::Setting;
use crate::config::EngineKind;
use crate::memory::host_free_bytes;

/// What a proxy, a launcher and the workers' own code take beside KV.
const BESIDE_BYTES: u64 = 512 << 20;

pub(super) fn check(setting: &Setting) -> Answer {
    let Some(free) = host_free_bytes(Path::new("/")) else {
        return Answer::skipped("the kernel does not tell: /proc/meminfo has no MemAvailable");
    };
    let wanted = kv_bytes(setting).saturating_add(BESIDE_BYTES);
    let seen = format!("{} free", gib(free));
    let answer = if free < wanted {
        Answer::fault(
            setting.config().is_some(),
            format!("{seen}, and {} are needed", gib(wanted)),
            "give the host or the container more memory, or make the KV cache smaller",
        )
    } else {
        Answer::ok(format!("{seen}, {} needed at least", gib(wanted)))
    };
    answer.with("free_bytes", free).with("wanted_bytes", wanted)
}

/// KV of all workers in host memory, where its size is known before they start.
fn kv_bytes(setting: &Setting) -> u64 {
    let Some(config) = setting.config().filter(|config| config.inference.engine == EngineKind::Reference) else {
        return 0;
    };
    let reference = &config.inference.reference;
    let tokens = u64::try_from(reference.block_size.saturating_mul(reference.num_blocks)).unwrap_or(u64::MAX);
    let (workers, _) = setting.workers_and_ranks();
    reference.bytes_per_token().saturating_mul(tokens).saturating_mul(u64::try_from(workers).unwrap_or(u64::MAX))
}

pub(super) fn gib(bytes: u64) -> String {
    const GIB: f64 = (1_u64 << 30) as f64;
    if bytes < 1 << 30 {
        format!("{:.0} MiB", bytes as f64 / GIB * 1024.0)
    } else {
        format!("{:.1} GiB", bytes as f64 / GIB)
    }
}
