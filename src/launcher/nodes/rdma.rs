//! The RDMA ports of this host, and which of them are next to which GPU, as the kernel knows it.
//!
//! Both are PCI devices, and their places in `/sys/devices` are paths: the longer the part that two paths share, the fewer bridges
//! lie between. Devices that share nothing but the root are told apart by their NUMA node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::launcher::nvidia_smi;

const CLASS: &str = "sys/class/infiniband";
const PCI: &str = "sys/bus/pci/devices";

/// One port of one RDMA device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RdmaPort {
    pub device: String,
    /// `mlx5_0:1`, as UCX and NCCL write it.
    pub name: String,
    pub is_active: bool,
    /// `400 Gb/sec (4X NDR)`
    pub rate: String,
    /// `InfiniBand` or `Ethernet`
    pub link_layer: String,
    /// `None`: it is no PCI device.
    place: Option<Seat>,
}

/// Where a PCI device is.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seat {
    /// From the root complex down: `pci0000:3a`, `0000:3a:00.0`, `0000:3b:00.0`.
    path: Vec<String>,
    numa: Option<u32>,
}

impl Seat {
    /// How near: bridges that two devices share, then the NUMA node.
    fn nearness(&self, other: &Self) -> (usize, bool) {
        let shared = self.path.iter().zip(&other.path).take_while(|(ours, theirs)| ours == theirs).count();
        (shared, self.numa.is_some() && self.numa == other.numa)
    }
}

/// By GPU: the ports that are nearest to it. GPUs whose place is not known are left out.
pub async fn near_gpus() -> BTreeMap<u32, Vec<String>> {
    let root = Path::new("/");
    let ports = ports(root);
    if !ports.iter().any(|port| port.is_active) {
        return BTreeMap::new();
    }
    nearest(&gpus(root).await, &ports)
}

fn nearest(gpus: &BTreeMap<u32, Seat>, ports: &[RdmaPort]) -> BTreeMap<u32, Vec<String>> {
    let usable = || ports.iter().filter(|port| port.is_active).filter_map(|port| Some((port, port.place.as_ref()?)));
    let of_gpu = |gpu: &Seat| {
        let best = usable().map(|(_, place)| gpu.nearness(place)).max()?;
        let near = usable().filter(|(_, place)| gpu.nearness(place) == best);
        Some(near.map(|(port, _)| port.name.clone()).collect())
    };
    gpus.iter().filter_map(|(id, gpu)| Some((*id, of_gpu(gpu)?))).collect()
}

/// Places of the GPUs by their numbers.
async fn gpus(root: &Path) -> BTreeMap<u32, Seat> {
    let in_proc = || in_proc(&names(&root.join("proc/driver/nvidia/gpus")));
    let listed = nvidia_smi::gpus().await.unwrap_or_else(in_proc);
    listed.into_iter().filter_map(|(id, address)| Some((id, seat(&root.join(PCI).join(address))?))).collect()
}

/// The driver's folders are named by address.
fn in_proc(names: &[String]) -> Vec<(u32, String)> {
    (0..).zip(names.iter().map(|name| name.to_lowercase())).collect()
}

/// Every port of every device that the kernel under `root` lists.
pub fn ports(root: &Path) -> Vec<RdmaPort> {
    let class = root.join(CLASS);
    let mut found = Vec::new();
    for device in names(&class) {
        let folder = class.join(&device);
        let place = seat(&folder.join("device"));
        for port in names(&folder.join("ports")) {
            let read = |file: &str| {
                let text = std::fs::read_to_string(folder.join("ports").join(&port).join(file)).unwrap_or_default();
                text.trim().to_owned()
            };
            found.push(RdmaPort {
                device: device.clone(),
                name: format!("{device}:{port}"),
                is_active: read("state").contains("ACTIVE"),
                rate: read("rate"),
                link_layer: read("link_layer"),
                place: place.clone(),
            });
        }
    }
    found
}

/// Where the device behind a link of sysfs is.
fn seat(link: &Path) -> Option<Seat> {
    let place: PathBuf = std::fs::canonicalize(link).ok()?;
    let parts = place.components().map(|part| part.as_os_str().to_string_lossy().into_owned());
    let path: Vec<String> = parts.skip_while(|part| !part.starts_with("pci")).collect();
    // -1 where the firmware does not say.
    let numa = std::fs::read_to_string(place.join("numa_node")).ok().and_then(|text| text.trim().parse().ok());
    (!path.is_empty()).then_some(Seat { path, numa })
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use std::fs::{create_dir_all, write};
    use std::os::unix::fs::symlink;

    use super::*;

    /// A device in a tree as the kernel shows it, with a link to it.
    fn device(root: &Path, place: &str, numa: &str, link: &str) {
        let (place, link) = (root.join("sys/devices").join(place), root.join(link));
        create_dir_all(&place).unwrap();
        write(place.join("numa_node"), numa).unwrap();
        create_dir_all(link.parent().unwrap()).unwrap();
        symlink(place, link).unwrap();
    }

    fn port(root: &Path, device: &str, state: &str) {
        let folder = root.join(CLASS).join(device).join("ports/1");
        create_dir_all(&folder).unwrap();
        write(folder.join("state"), state).unwrap();
    }

    #[test]
    fn the_device_behind_the_same_switch_is_nearest_and_then_the_one_of_the_same_node() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        for (gpu, place, numa) in [
            ("0000:3b:00.0", "pci0000:3a/0000:3a:00.0/0000:3b:00.0", "0"),
            ("0000:5e:00.0", "pci0000:5d/0000:5d:00.0/0000:5e:00.0", "0"),
            ("0000:af:00.0", "pci0000:ae/0000:ae:00.0/0000:af:00.0", "1"),
        ] {
            device(root, place, numa, &format!("{PCI}/{gpu}"));
        }
        device(root, "pci0000:3a/0000:3a:00.0/0000:3c:00.0", "0", &format!("{CLASS}/mlx5_0/device"));
        device(root, "pci0000:90/0000:90:00.0/0000:91:00.0", "1", &format!("{CLASS}/mlx5_1/device"));
        device(root, "pci0000:3a/0000:3a:00.0/0000:3d:00.0", "0", &format!("{CLASS}/mlx5_2/device"));
        for (device, state) in [("mlx5_0", "4: ACTIVE\n"), ("mlx5_1", "4: ACTIVE\n"), ("mlx5_2", "1: DOWN\n")] {
            port(root, device, state);
        }
        let listed = [(0, "0000:3b:00.0"), (1, "0000:5e:00.0"), (2, "0000:af:00.0")];
        let gpus = listed.map(|(id, at)| (id, seat(&root.join(PCI).join(at)).expect("a place"))).into_iter();
        let near = nearest(&gpus.collect(), &ports(root));
        assert_eq!(near[&0], ["mlx5_0:1"], "behind one switch; the other port there is down");
        assert_eq!((&near[&1], &near[&2]), (&vec!["mlx5_0:1".to_owned()], &vec!["mlx5_1:1".to_owned()]), "one node");
        assert_eq!(in_proc(&["0000:3B:00.0".to_owned()]), [(0, "0000:3b:00.0".to_owned())]);
    }

    #[tokio::test]
    async fn a_host_without_such_devices_gives_no_hints() {
        assert!(ports(tempfile::tempdir().unwrap().path()).is_empty());
        let _ = near_gpus().await;
    }
}
