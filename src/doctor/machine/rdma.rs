//! RDMA devices, as the kernel lists them, and whether what is configured uses them.

use std::path::Path;

use super::super::check::Answer;
use super::super::setting::Setting;

const CLASS: &str = "sys/class/infiniband";

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
    names(&Path::new("/").join(CLASS))
}

/// One port of one device.
#[derive(Debug, PartialEq, Eq)]
struct Port {
    /// `mlx5_0/1`
    name: String,
    active: bool,
    /// `400 Gb/sec (4X NDR), InfiniBand`
    what: String,
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn ports(root: &Path) -> Vec<Port> {
    let class = root.join(CLASS);
    let of_device = |device: &String| {
        let folder = class.join(device).join("ports");
        let port = |number: &String| {
            let read = |file: &str| {
                let text = std::fs::read_to_string(folder.join(number).join(file)).unwrap_or_default();
                text.trim().to_owned()
            };
            let what = format!("{}, {}", read("rate"), read("link_layer"));
            Port { name: format!("{device}/{number}"), active: read("state").contains("ACTIVE"), what }
        };
        names(&folder).iter().map(port).collect::<Vec<_>>()
    };
    names(&class).iter().flat_map(of_device).collect()
}

fn judge(ports: &[Port], can_open: bool, nixl: bool, other_paths: bool) -> Answer {
    if ports.is_empty() {
        return Answer::skipped("no RDMA devices: /sys/class/infiniband is empty or absent");
    }
    let (active, idle): (Vec<&Port>, Vec<&Port>) = ports.iter().partition(|port| port.active);
    let list = |ports: &[&Port]| {
        ports.iter().map(|port| format!("{} ({})", port.name, port.what)).collect::<Vec<_>>().join(", ")
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
            let folder = root.path().join(CLASS).join(device).join("ports/1");
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
        assert_eq!(seen, "active: mlx5_0/1 (400 Gb/sec (4X NDR), InfiniBand)");
    }
}
