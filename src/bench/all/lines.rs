//! Which lines of `raw`, `link` and `kv` a run of everything has.

use crate::bench::environment::Environment;
use crate::bench::kv;
use crate::bench::link::{self, Way};

/// Sizes of whole transfers, from a block to a gigabyte.
const BYTES: [u64; 10] =
    [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20, 1 << 30];
const BYTES_QUICK: [u64; 4] = [4 << 10, 64 << 10, 1 << 20, 16 << 20];
/// Sizes up to this show what there is to see of a variant: beyond it bandwidth hardly grows, and a round takes long.
const BYTES_ASIDE_MAX: u64 = 64 << 20;
/// Runs as engines have them, over all sizes.
const RUN_BYTES: u64 = 64 << 10;
/// Shorter ones, and one that hides what a run costs, over some.
const RUN_BYTES_ASIDE: [u64; 2] = [16 << 10, 1 << 20];
const BYTES_OF_RUNS: [u64; 3] = [1 << 20, 16 << 20, 64 << 20];
/// Sizes at which both ways and several at once are measured.
const BYTES_AT_ONCE: [u64; 2] = [1 << 20, 16 << 20];
const AT_ONCE: [usize; 2] = [4, 16];
/// Requests whose KV is handed over at once, and most bytes of all of them.
const REQUESTS_AT_ONCE: [u32; 2] = [4, 16];
const KV_BYTES_AT_ONCE_MAX: u64 = 160 << 20;
/// Part of this host's memory that one size may take: both ends and the ceiling may hold it twice.
const MEMORY_SHARE: u64 = 16;

/// Sizes that this host's memory holds.
pub(super) fn bytes(quick: bool) -> Vec<u64> {
    let most = Environment::memory_bytes() / MEMORY_SHARE;
    let all: &[u64] = if quick { &BYTES_QUICK } else { &BYTES };
    all.iter().copied().filter(|bytes| *bytes <= most).collect()
}

/// Of them, those for `raw` by one thread and both ways.
pub(super) fn bytes_aside(quick: bool) -> Vec<u64> {
    bytes(quick).into_iter().filter(|bytes| *bytes <= BYTES_ASIDE_MAX).collect()
}

/// Lines of `link` for each path. Several at once are pulled.
pub(super) fn link(quick: bool) -> [(Way, Vec<link::Case>); 3] {
    let sizes = bytes(quick);
    let in_runs: Vec<u64> = BYTES_OF_RUNS.iter().copied().filter(|bytes| sizes.contains(bytes)).collect();
    let mut single = link::Case::all(&sizes, &[RUN_BYTES], &[1]);
    single.extend(link::Case::all(&in_runs, &RUN_BYTES_ASIDE, &[1]));
    let at_once = |counts: &[usize]| link::Case::all(&BYTES_AT_ONCE, &[RUN_BYTES], counts);
    let pulled = [single.clone(), at_once(&AT_ONCE)].concat();
    [(Way::Pull, pulled), (Way::Push, single), (Way::Both, at_once(&[1]))]
}

/// Lines of `kv` for each path and send type: prompts of these lengths alone, and several at once of those that are short enough.
pub(super) fn kv(quick: bool, tokens: &[u32], token_bytes: u64) -> Vec<kv::Case> {
    let mut cases = kv::Case::all(tokens, &[1]);
    let counts: &[u32] = if quick { &[] } else { &REQUESTS_AT_ONCE };
    for &at_once in counts {
        let fits = |tokens: &&u32| u64::from(**tokens) * u64::from(at_once) * token_bytes <= KV_BYTES_AT_ONCE_MAX;
        cases.extend(tokens.iter().filter(fits).map(|&tokens| kv::Case::new(tokens, true, at_once)));
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_line_comes_twice() {
        for quick in [false, true] {
            for (way, cases) in link(quick) {
                let twice = cases.iter().enumerate().find(|(at, case)| cases[..*at].contains(case));
                assert_eq!(twice, None, "{way:?}");
            }
        }
    }

    #[test]
    fn several_requests_at_once_are_measured_where_they_are_short_and_there_is_time() {
        let (alone, token_bytes) = (kv::Case::all(&[16, 256, 2048], &[1]), 144 << 10);
        assert_eq!(kv(true, &[16, 256, 2048], token_bytes), alone);
        let more = [(16, 4), (256, 4), (16, 16)].map(|(tokens, at_once)| kv::Case::new(tokens, true, at_once));
        assert_eq!(kv(false, &[16, 256, 2048], token_bytes), [&alone[..], &more].concat());
    }
}
