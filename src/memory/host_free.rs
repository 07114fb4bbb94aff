//! How much memory of the host may still be taken.

use std::path::Path;

/// Without swapping, by the machine and by the container that we are in, as the kernel under `root` tells. `None`: it does not.
pub fn host_free_bytes(root: &Path) -> Option<u64> {
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
        assert_eq!(host_free_bytes(root.path()), None);
        write("proc/meminfo", "MemTotal:       100 kB\nMemAvailable:    50 kB\n");
        assert_eq!(host_free_bytes(root.path()), Some(50 * 1024));
        write("sys/fs/cgroup/memory.max", "max\n");
        write("sys/fs/cgroup/memory.current", "10000\n");
        assert_eq!(host_free_bytes(root.path()), Some(50 * 1024));
        write("sys/fs/cgroup/memory.max", "30000\n");
        assert_eq!(host_free_bytes(root.path()), Some(20_000));
    }
}
