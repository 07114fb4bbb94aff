//! RDMA devices, as the kernel lists them, and whether what is configured uses them.

use std::path::Path;

use super::super::check::Answer;
use super::super::setting::Setting;
use crate::launcher::nodes::rdma::{RdmaPort, ports};

pub(super) fn check(setting: &Setting) -> Answer {
    judge(
        &ports(Path::new("/")),
        Path::new("/dev/infiniband").exists(),
        setting.needs_nixl(),
        !setting.paths().is_empty(),
    )
}

/// Names of the devices.
pub(in crate::doctor) fn devices() -> Vec<String> {
    let mut devices: Vec<String> = ports(Path::new("/")).into_iter().map(|port| port.device).collect();
    devices.dedup();
    devices
}

fn judge(ports: &[RdmaPort], can_open: bool, nixl: bool, other_paths: bool) -> Answer {
    if ports.is_empty() {
        return Answer::skipped("no RDMA devices: /sys/class/infiniband is empty or absent");
    }
    let (active, idle): (Vec<&RdmaPort>, Vec<&RdmaPort>) = ports.iter().partition(|port| port.is_active);
    let list = |ports: &[&RdmaPort]| {
        ports
            .iter()
            .map(|port| format!("{} ({}, {})", port.name, port.rate, port.link_layer))
            .collect::<Vec<_>>()
            .join(", ")
    };
    if active.is_empty() {
        let mend = "bring the links up: cable, switch, subnet manager (`ibstat`)";
        return Answer::fault(nixl, format!("no port is active: {}", list(&idle)), mend);
    }
    let seen = format!("active: {}", list(&active));
    if !can_open {
        let mend = "give the container the devices: --device /dev/infiniband, or the device plugin of Kubernetes";
        return Answer::fault(nixl, format!("{seen}, but /dev/infiniband is not here"), mend);
    }
    if other_paths && !nixl {
        let mend =
            "between hosts, put \"nixl\" before \"tcp\" in kv.paths (host memory), or leave it as it is on one host";
        return Answer::warn(format!("{seen}; no configured path uses them"), mend);
    }
    Answer::ok(seen).with("active", active.len()).with("idle", idle.len())
}

#[cfg(test)]
mod tests {
    use super::super::super::check::Verdict;
    use super::*;

    #[test]
    fn devices_are_read_and_judged_by_what_uses_them() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(judge(&ports(root.path()), true, true, true).result, Verdict::Skipped);
        let set = |device: &str, state: &str| {
            let folder = root.path().join("sys/class/infiniband").join(device).join("ports/1");
            std::fs::create_dir_all(&folder).unwrap();
            for (file, text) in [("state", state), ("rate", "400 Gb/sec (4X NDR)\n"), ("link_layer", "InfiniBand\n")] {
                std::fs::write(folder.join(file), text).unwrap();
            }
        };
        set("mlx5_1", "1: DOWN\n");
        let judged = |can_open, nixl, others| judge(&ports(root.path()), can_open, nixl, others).result;
        assert_eq!((judged(true, true, true), judged(true, false, true)), (Verdict::Fail, Verdict::Warn));
        set("mlx5_0", "4: ACTIVE\n");
        assert_eq!((judged(true, true, true), judged(true, false, true)), (Verdict::Ok, Verdict::Warn));
        assert_eq!((judged(false, true, false), judged(true, false, false)), (Verdict::Fail, Verdict::Ok));
        let seen = judge(&ports(root.path()), true, true, true).seen;
        assert_eq!(seen, "active: mlx5_0:1 (400 Gb/sec (4X NDR), InfiniBand)");
    }
}
