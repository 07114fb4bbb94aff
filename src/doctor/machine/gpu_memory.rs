//! Memory of each GPU: what vLLM will take of it, against what is free, and what that leaves for staging KV and weights.

use std::collections::BTreeMap;

use super::super::check::Answer;
use super::super::configuration::model_files;
use super::super::setting::Setting;
use super::memory::gib;
use crate::config::{Config, Path, Role, Staging};
use crate::ffi::nvml::{Room, rooms};
use crate::transport::NIXL_GPU_STAGING_MB;

/// What the workers' ranks on one GPU want of it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Wish {
    ranks: u32,
    /// Of its memory, for all of them and for the greediest.
    share: f64,
    share_max: f64,
    /// Whether a KV cache was given its size: then vLLM does not fill its share, and what it leaves is not known.
    is_sized: bool,
    /// Beside vLLM's share.
    staging_bytes: u64,
}

pub(super) fn check(setting: &Setting) -> Answer {
    let Some(config) = setting.config().filter(|_| setting.needs_gpus()) else {
        return Answer::skipped("no worker computes on a GPU");
    };
    let rooms = match rooms() {
        Ok(rooms) => rooms,
        Err(error) => return Answer::skipped(error),
    };
    let wishes = wishes(setting, config);
    judge(&rooms, &wishes, setting.target.is_some())
}

/// By GPU of this host.
fn wishes(setting: &Setting, config: &Config) -> BTreeMap<u32, Wish> {
    let mut wishes: BTreeMap<u32, Wish> = BTreeMap::new();
    for role in config.roles() {
        let vllm = &config.inference.vllm;
        let said = vllm.arg(*role, "gpu_memory_utilization").and_then(|share| share.as_f64());
        let share = said.unwrap_or(config.inference.gpu_memory_utilization);
        let is_sized = vllm.arg(*role, "kv_cache_memory_bytes").is_some();
        let staging_bytes = for_kv(setting, config).saturating_add(for_weights(config, *role));
        for gpu in setting.gpu_ids(*role) {
            let wish = wishes.entry(gpu).or_default();
            wish.ranks += 1;
            wish.share += share;
            wish.share_max = wish.share_max.max(share);
            wish.is_sized |= is_sized;
            wish.staging_bytes = wish.staging_bytes.saturating_add(staging_bytes);
        }
    }
    wishes
}

/// Of one rank, once every allowed path has met a peer.
fn for_kv(setting: &Setting, config: &Config) -> u64 {
    let mib = |path: Path| match path {
        Path::Nccl => config.kv.nccl.staging_mib,
        Path::Nixl => config.kv.nixl.staging_mb.unwrap_or(NIXL_GPU_STAGING_MB),
        Path::CudaIpc | Path::Shm | Path::Tcp => 0,
    };
    setting.paths().into_iter().map(mib).fold(0_u64, u64::saturating_add).saturating_mul(1 << 20)
}

/// Of one rank, while weights are received.
fn for_weights(config: &Config, role: Role) -> u64 {
    let weights = &config.weights;
    if !config.vllm_takes_weights(role) || weights.staging == Staging::Host {
        return 0;
    }
    let buckets = weights.bucket_bytes.saturating_mul(2);
    if weights.staging == Staging::None {
        return buckets;
    }
    let whole = model_files::weights_bytes(config.model_name()).unwrap_or(0) / u64::from(config.tp(role).max(1));
    buckets.saturating_add(weights.staging_bytes_max.map_or(whole, |most| whole.min(most)))
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a share of a number of bytes, held to its range"
)]
fn of(share: f64, bytes: u64) -> u64 {
    (share * bytes as f64).clamp(0.0, bytes as f64) as u64
}

fn judge(rooms: &[Room], wishes: &BTreeMap<u32, Wish>, runs: bool) -> Answer {
    let mut seen = Vec::new();
    let (mut taken, mut tight) = (Vec::new(), Vec::new());
    // Ids beyond them are told by `gpus`.
    let here = |gpu: &u32| rooms.get(usize::try_from(*gpu).ok()?);
    for (gpu, wish) in wishes {
        let Some(room) = here(gpu) else { continue };
        let (first, rest) = (of(wish.share_max, room.bytes), of(1.0 - wish.share, room.bytes));
        seen.push(format!(
            "GPU {gpu}: {} of {} free, {} ranks take {:.0} %",
            gib(room.free_bytes),
            gib(room.bytes),
            wish.ranks,
            wish.share * 100.0
        ));
        if !runs && room.free_bytes < first {
            taken.push(format!(
                "GPU {gpu} has {} free, and vLLM wants {} before it starts",
                gib(room.free_bytes),
                gib(first)
            ));
        }
        if wish.is_sized {
            continue;
        }
        if wish.share > 1.0 {
            tight.push(format!("the ranks on GPU {gpu} want {:.0} % of it", wish.share * 100.0));
        } else if rest < wish.staging_bytes {
            tight.push(format!("GPU {gpu} has {} left for {} of staging", gib(rest), gib(wish.staging_bytes)));
        }
    }
    let lower =
        "lower inference.gpu_memory_utilization, or kv.nccl.staging_mib, kv.nixl.staging_mb and weights.staging";
    let answer = if !taken.is_empty() {
        Answer::fail(
            taken.join("; "),
            "end what uses it (`nvidia-smi` lists processes), or lower inference.gpu_memory_utilization",
        )
    } else if !tight.is_empty() {
        Answer::warn(tight.join("; "), lower)
    } else if seen.is_empty() {
        Answer::skipped("no configured GPU is on this host; see gpus")
    } else {
        Answer::ok(seen.join("; "))
    };
    let free: Vec<u64> = rooms.iter().map(|room| room.free_bytes).collect();
    answer.with("free_bytes", free)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Verdict;

    const GIB: u64 = 1 << 30;

    fn wish(ranks: u32, share: f64, staging_bytes: u64) -> BTreeMap<u32, Wish> {
        [(0, Wish { ranks, share, share_max: share / f64::from(ranks), staging_bytes, ..Wish::default() })].into()
    }

    #[test]
    fn memory_that_another_has_and_staging_that_has_no_room_are_named() {
        let room = |free: u64| [Room { bytes: 80 * GIB, free_bytes: free * GIB }];
        let right = judge(&room(79), &wish(2, 0.8, GIB / 2), false);
        assert_eq!(
            (right.result, right.seen.as_str()),
            (Verdict::Ok, "GPU 0: 79.0 GiB of 80.0 GiB free, 2 ranks take 80 %")
        );
        let taken = judge(&room(20), &wish(1, 0.9, 0), false);
        assert_eq!(taken.result, Verdict::Fail);
        assert!(taken.seen.contains("20.0 GiB free, and vLLM wants 72.0 GiB"), "{}", taken.seen);
        assert_eq!(judge(&room(2), &wish(1, 0.9, 0), true).result, Verdict::Ok, "the deployment itself has it");
        let tight = judge(&room(80), &wish(1, 0.99, GIB), false);
        assert_eq!(
            (tight.result, tight.seen.as_str()),
            (Verdict::Warn, "GPU 0 has 819 MiB left for 1.0 GiB of staging")
        );
        let mut greedy = wish(2, 1.8, 0);
        assert_eq!(judge(&room(80), &greedy, false).result, Verdict::Warn);
        greedy.values_mut().for_each(|wish| wish.is_sized = true);
        assert_eq!(judge(&room(80), &greedy, false).result, Verdict::Ok);
        assert_eq!(judge(&[], &wish(1, 0.9, 0), false).result, Verdict::Skipped);
    }

    #[test]
    fn every_path_and_every_rank_counts() {
        let mut config = Config::default();
        config.weights.staging = Staging::None;
        (config.weights.vllm_workers, config.weights.bucket_bytes) = (Some(true), 1 << 20);
        assert_eq!(for_weights(&config, Role::Decode), 2 << 20);
        config.weights.staging = Staging::Host;
        assert_eq!(for_weights(&config, Role::Decode), 0);
    }
}
