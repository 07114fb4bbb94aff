//! What this machine has: GPUs, cores, the model's folder. Each look may find nothing and says so, without failing.

use std::path::Path;

use super::nvidia_smi;
use crate::topology::host::{Gpus, Host, ModelFault};

/// Looks at this machine, for a model of this name.
pub async fn look(model: &str) -> Host {
    Host { gpus: gpus().await, cores: cores(), model_fault: model_fault(model) }
}

/// The device files are what is left where `nvidia-smi` is not installed.
async fn gpus() -> Gpus {
    if let Some(listed) = nvidia_smi::gpus().await {
        return Gpus::Count(u32::try_from(listed.len()).unwrap_or(u32::MAX));
    }
    match count_device_files(Path::new("/dev")) {
        0 => Gpus::Unknown,
        count => Gpus::Count(count),
    }
}

/// `/dev/nvidia0` and so on; a container has only those it was given.
fn count_device_files(folder: &Path) -> u32 {
    let is_gpu = |name: &str| name.strip_prefix("nvidia").is_some_and(|number| number.parse::<u32>().is_ok());
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let count = entries.filter(|entry| entry.file_name().to_str().is_some_and(is_gpu)).count();
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// One logical core of each physical one that we may use: two ranks on the halves of one core take from each other.
fn cores() -> Vec<u32> {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    let number = |core: usize| u32::try_from(core).unwrap_or(u32::MAX);
    (0..rustix::thread::CpuSet::MAX_CPU)
        .filter(|core| allowed.is_set(*core))
        .map(number)
        .filter(is_first_sibling)
        .collect()
}

/// Whether this logical core is the first of its physical one. A core that says nothing of itself stands alone.
fn is_first_sibling(core: &u32) -> bool {
    let file = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
    let siblings = std::fs::read_to_string(file).unwrap_or_default();
    first_of(&siblings).is_none_or(|first| first == *core)
}

/// The first number of `0,64` or `0-1`.
fn first_of(list: &str) -> Option<u32> {
    list.trim().split([',', '-']).next()?.parse().ok()
}

/// A name that begins like a path can only be a folder (or a file of weights); any other may be of the hub.
fn model_fault(name: &str) -> Option<ModelFault> {
    let path = Path::new(name);
    let is_path = path.is_absolute() || name.starts_with("./") || name.starts_with("../") || name.starts_with('~');
    if !is_path {
        return None;
    }
    if !path.exists() {
        return Some(ModelFault::Missing);
    }
    let is_model = |file: &str| path.join(file).is_file();
    let known = path.is_file() || is_model("config.json") || is_model("params.json");
    (!known).then_some(ModelFault::NoModel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_counted_from_what_is_there() {
        let folder = tempfile::tempdir().expect("folder");
        for name in ["nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"] {
            std::fs::write(folder.path().join(name), "").expect("write");
        }
        assert_eq!(count_device_files(folder.path()), 2);
    }

    #[test]
    fn cores_are_those_we_may_use() {
        assert_eq!((first_of("3,67\n"), first_of("0-1"), first_of("")), (Some(3), Some(0), None));
        assert!(!cores().is_empty());
    }

    #[test]
    fn a_model_that_is_a_path_must_be_there() {
        let folder = tempfile::tempdir().expect("folder");
        let name = folder.path().to_str().expect("UTF-8");
        assert_eq!(model_fault("org/model"), None);
        assert_eq!(model_fault("/no/such/model"), Some(ModelFault::Missing));
        assert_eq!(model_fault(name), Some(ModelFault::NoModel));
        std::fs::write(folder.path().join("config.json"), "{}").expect("write");
        assert_eq!(model_fault(name), None);
    }
}
