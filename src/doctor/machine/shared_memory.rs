//! `/dev/shm`: what vLLM's processes, NCCL and UCX share. pdlink's own `shm` path uses memory files, which do not count there.
//!
//! A page that finds no room kills the process that writes it (SIGBUS), minutes after a start that looked well.

use std::io::Write;
use std::path::Path;

use super::super::check::Answer;
use super::super::setting::Setting;
use super::memory::gib;
use crate::config::{Config, EngineKind};

const FOLDER: &str = "/dev/shm";

/// A vLLM worker with several ranks: a ring of ten messages of 16 MiB to its ranks, and from each a ring of ten of 10 MiB.
const RING_BYTES: u64 = 160 << 20;
const RING_BYTES_PER_RANK: u64 = 100 << 20;
/// NCCL between two ranks of one host: its rings, where the GPUs cannot reach each other.
const NCCL_BYTES_PER_RANK: u64 = 32 << 20;
/// UCX: the queues of one agent.
const UCX_BYTES_PER_RANK: u64 = 16 << 20;

pub(super) fn check(setting: &Setting) -> Answer {
    let wanted = wanted(setting);
    let mend = format!(
        "give it {} or more: `--shm-size` or `--ipc=host` of docker, an emptyDir with medium Memory in Kubernetes, \
         `mount -o remount,size=` elsewhere",
        gib(wanted.max(1 << 30))
    );
    let (size, free) = match room(Path::new(FOLDER)) {
        Ok(room) => room,
        Err(error) => return Answer::fault(wanted > 0, format!("{FOLDER} cannot be used: {error}"), mend),
    };
    let seen = format!("{FOLDER} has {}, {} free", gib(size), gib(free));
    let answer = match wanted {
        0 if free < UCX_BYTES_PER_RANK => {
            Answer::warn(format!("{seen}: too little for any of vLLM, NCCL and UCX"), mend)
        }
        0 => Answer::ok(format!("{seen}; pdlink's own shm path takes nothing of it")),
        wanted if free < wanted => Answer::fail(format!("{seen}, and {} are needed", gib(wanted)), mend),
        wanted => Answer::ok(format!("{seen}, {} needed at most", gib(wanted))),
    };
    answer.with("size_bytes", size).with("free_bytes", free).with("wanted_bytes", wanted)
}

/// What all workers may take of it.
fn wanted(setting: &Setting) -> u64 {
    let Some(config) = setting.config() else { return 0 };
    let (_, ranks) = setting.workers_and_ranks();
    let ranks = u64::try_from(ranks).unwrap_or(u64::MAX);
    let ucx = if setting.needs_nixl() { ranks.saturating_mul(UCX_BYTES_PER_RANK) } else { 0 };
    ucx.saturating_add(rings(setting, config))
}

fn rings(setting: &Setting, config: &Config) -> u64 {
    if config.inference.engine != EngineKind::Vllm {
        return 0;
    }
    let of_role = |role: &crate::config::Role| {
        let (tp, ranks) = (u64::from(config.tp(*role)), u64::try_from(setting.gpu_ids(*role).len()).unwrap_or(0));
        if tp < 2 { 0 } else { ranks / tp * RING_BYTES + ranks * (RING_BYTES_PER_RANK + NCCL_BYTES_PER_RANK) }
    };
    config.roles().iter().map(of_role).sum()
}

/// Its size and what is free, in bytes, once a byte could be written there.
fn room(folder: &Path) -> std::io::Result<(u64, u64)> {
    let told = rustix::fs::statvfs(folder)?;
    let file = folder.join(format!("pdlink-doctor-{}", std::process::id()));
    let written = std::fs::File::create_new(&file).and_then(|mut file| file.write_all(&[1]));
    let removed = std::fs::remove_file(&file);
    written.and(removed)?;
    Ok((told.f_blocks * told.f_frsize, told.f_bavail * told.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        assert!(room(folder.path()).is_ok_and(|(size, free)| size >= free));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(room(&folder.path().join("none")).is_err());
    }
}
