//! How much memory of the host may still be taken.

use std::path::Path;

/// Without swapping, by the machine and by the container that we are in, as the kernel under `root` tells. `None`: it does not.
pub fn host_free_bytes(root: &Path) -> Option<u64> {
    let info = std::fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let machine = line.split_whitespace().next()?.parse::<u64>().ok()?.saturating_mul(1024);
    Some(container(root).map_or(machine, |container| machine.min(container)))
}

/// The limit less what is used, of version 2 or 1 of control groups. `None`: no limit.
fn container(root: &Path) -> Option<u64> {
    let group = root.join("sys/fs/cgroup");
    free_of(&group, ["memory.max", "memory.current"], ["inactive_file ", "active_file "]).or_else(|| {
        let names = ["memory.limit_in_bytes", "memory.usage_in_bytes"];
        free_of(&group.join("memory"), names, ["total_inactive_file ", "total_active_file "])
    })
}

/// What a group has read of files counts as used, and goes when the memory is wanted: a checkpoint that was loaded, above all.
fn free_of(group: &Path, [limit, used]: [&str; 2], files: [&str; 2]) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let statistics = read("memory.stat").unwrap_or_default();
    let of_file = |name: &&str| statistics.lines().find_map(|line| number(line.strip_prefix(name)?));
    let cached: u64 = files.iter().filter_map(of_file).sum();
    let taken = number(&read(used)?)?.saturating_sub(cached);
    Some(number(&read(limit)?)?.saturating_sub(taken))
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
        write("sys/fs/cgroup/memory.stat", "anon 4000\nfile 6000\ninactive_file 3500\nactive_file 2500\n");
        assert_eq!(host_free_bytes(root.path()), Some(26_000), "what files were read into is given back");
    }
}
