//! Memory of the host against the KV that is to lie in it.

use std::path::Path;

use super::super::check::Answer;
use super::super::setting::Setting;
use crate::config::EngineKind;

/// What a proxy, a launcher and the workers' own code take beside KV.
const BESIDE_BYTES: u64 = 512 << 20;

pub(super) fn check(setting: &Setting) -> Answer {
    let Some(free) = available(Path::new("/")) else {
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

/// What may still be taken: by the machine, and by the container that we are in.
fn available(root: &Path) -> Option<u64> {
    let info = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine = line.split_whitespace().next()?.parse::<u64>().ok()?.saturating_mul(1024);
    Some(container(root).map_or(machine, |container| machine.min(container)))
}

/// `memory.max` less what is used, of version 2 or 1 of control groups. `None`: no limit.
fn container(root: &Path) -> Option<u64> {
    let read = |name: &str| {
        let text = std::fs::read_to_string(root.join("sys/fs/cgroup").join(name)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let limit = |max: &str, used: &str| Some(read(max)?.saturating_sub(read(used)?));
    limit("memory.max", "memory.current")
        .or_else(|| limit("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
}

pub(super) fn gib(bytes: u64) -> String {
    const GIB: f64 = (1_u64 << 30) as f64;
    if bytes < 1 << 30 {
        format!("{:.0} MiB", bytes as f64 / GIB * 1024.0)
    } else {
        format!("{:.1} GiB", bytes as f64 / GIB)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smaller_of_machine_and_container_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let file = root.path().join(name);
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        };
        assert_eq!(available(root.path()), None);
        write("proc/meminfo", "MemTotal:       100 kB\nMemAvailable:    50 kB\n");
        assert_eq!(available(root.path()), Some(50 * 1024));
        write("sys/fs/cgroup/memory.max", "max\n");
        write("sys/fs/cgroup/memory.current", "10000\n");
        assert_eq!(available(root.path()), Some(50 * 1024));
        write("sys/fs/cgroup/memory.max", "30000\n");
        assert_eq!(available(root.path()), Some(20_000));
    }
}
