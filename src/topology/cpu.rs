//! Cores for workers that compute on the CPU: each rank its own, or none bound where they do not go round.
//!
//! Left to itself (`auto`) vLLM counts cores from the first in every process, so that two servers of one host sit on the
//! same ones. A worker also has an HTTP process and a scheduler, which are not bound: one core of its share stays theirs.

use super::plan::count;

/// Cores that a rank needs before binding it is worth it. With fewer, the other role's idle cores are worth more.
const CORES_PER_RANK_MIN: usize = 2;

/// What one worker is told about cores.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Share {
    /// `VLLM_CPU_OMP_THREADS_BIND`: a list for each rank, separated by `|`; `nobind` where cores do not go round.
    pub(super) bind: String,
    /// `OMP_NUM_THREADS`, where vLLM does not set it by the list.
    pub(super) threads: Option<u32>,
}

/// Shares `cores` among workers of so many ranks each.
pub(super) fn shares(cores: &[u32], ranks: &[u32]) -> Vec<Share> {
    let ranks: Vec<usize> = ranks.iter().map(|ranks| usize::try_from(*ranks).unwrap_or(usize::MAX).max(1)).collect();
    let total: usize = ranks.iter().sum();
    // One core of each worker is left to what is not a rank.
    let per_rank = cores.len().saturating_sub(ranks.len()) / total.max(1);
    if per_rank < CORES_PER_RANK_MIN {
        let threads = (cores.len() / total.max(1)).max(1);
        let unbound = Share { bind: "nobind".to_owned(), threads: Some(count(threads)) };
        return vec![unbound; ranks.len()];
    }
    let mut left = cores;
    let mut take = |number: usize| {
        let (taken, rest) = left.split_at(number);
        left = rest;
        taken
    };
    let bound = |ranks: &usize| {
        take(1);
        let lists: Vec<String> = (0..*ranks).map(|_| list(take(per_rank))).collect();
        Share { bind: lists.join("|"), threads: None }
    };
    ranks.iter().map(bound).collect()
}

/// `0-3,8`: what vLLM and the kernel call a core list.
fn list(cores: &[u32]) -> String {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for core in cores {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(*core) => *last = *core,
            _ => runs.push((*core, *core)),
        }
    }
    let run = |(first, last): &(u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    runs.iter().map(run).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_without_overlap_or_not_bound_at_all() {
        let cores = |number: u32| (0..number).collect::<Vec<_>>();
        let binds =
            |cores: &[u32], ranks: &[u32]| shares(cores, ranks).into_iter().map(|share| share.bind).collect::<Vec<_>>();
        assert_eq!(binds(&cores(2), &[1, 1]), ["nobind", "nobind"]);
        assert_eq!(shares(&cores(2), &[1, 1])[0].threads, Some(1));
        assert_eq!(shares(&cores(5), &[1, 1])[0].threads, Some(2));
        assert_eq!(binds(&cores(6), &[1, 1]), ["1-2", "4-5"]);
        assert_eq!(binds(&cores(12), &[1, 2]), ["1-3", "5-7|8-10"]);
        assert_eq!(binds(&[0, 2, 4, 6, 8, 10], &[1, 1]), ["2,4", "8,10"]);
        assert!(shares(&[], &[1]).iter().all(|share| share.threads == Some(1)));
        assert!(shares(&cores(8), &[1]).iter().all(|share| share.threads.is_none()));
    }
}
