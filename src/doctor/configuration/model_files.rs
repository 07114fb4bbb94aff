//! Where a model's files are on this machine.

use std::path::{Path, PathBuf};

/// `config.json` of a model that is named as configured.
pub(in crate::doctor) fn config_file(model: &str) -> Option<PathBuf> {
    find(model, hub(|variable| std::env::var_os(variable).map(PathBuf::from)).as_deref())
}

/// Bytes of its weights, where they are here as safetensors.
pub(in crate::doctor) fn weights_bytes(model: &str) -> Option<u64> {
    let folder = config_file(model)?.parent()?.to_owned();
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|file| file.path());
    let weights = files.filter(|file| file.extension().is_some_and(|kind| kind == "safetensors"));
    // Files of the hub are links.
    let bytes: u64 = weights.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
    (bytes > 0).then_some(bytes)
}

/// Where the hub's files are kept.
fn hub(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let home = || variable("HF_HOME").or_else(|| Some(variable("HOME")?.join(".cache/huggingface")));
    variable("HF_HUB_CACHE").or_else(|| Some(home()?.join("hub")))
}

/// Of a folder, or of the newest copy of a model of the hub.
fn find(model: &str, hub: Option<&Path>) -> Option<PathBuf> {
    let own = Path::new(model).join("config.json");
    if own.is_file() {
        return Some(own);
    }
    let snapshots = hub?.join(format!("models--{}", model.replace('/', "--"))).join("snapshots");
    let copies = std::fs::read_dir(snapshots).ok()?.flatten().map(|copy| copy.path().join("config.json"));
    copies.filter(|file| file.is_file()).max_by_key(|file| file.metadata().and_then(|data| data.modified()).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_found_in_folders_and_in_the_hubs_cache() {
        let hub = tempfile::tempdir().unwrap();
        let copy = hub.path().join("models--Qwen--Qwen3-8B/snapshots/abc");
        std::fs::create_dir_all(&copy).unwrap();
        assert_eq!(find("Qwen/Qwen3-8B", Some(hub.path())), None);
        std::fs::write(copy.join("config.json"), "{}").unwrap();
        assert_eq!(find("Qwen/Qwen3-8B", Some(hub.path())), Some(copy.join("config.json")));
        assert_eq!(find(copy.to_str().unwrap(), None), Some(copy.join("config.json")));
        assert_eq!(weights_bytes(copy.to_str().unwrap()), None);
        std::fs::write(copy.join("model-1.safetensors"), [0; 7]).unwrap();
        std::fs::write(copy.join("model-2.safetensors"), [0; 5]).unwrap();
        assert_eq!(weights_bytes(copy.to_str().unwrap()), Some(12));
    }
}
