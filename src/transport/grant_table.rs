//! The grants that a path enforces: which ranges a pusher may write, and the moment from which it may not (KV-7).
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::flight::locked;
use super::{Grant, GrantToken, RunList, TransportError};

/// All live grants of one transport.
#[derive(Default)]
pub(super) struct GrantTable {
    grants: Mutex<HashMap<GrantToken, Arc<Granted>>>,
}

/// What one grant allows.
pub(super) struct Granted {
    /// Per region: disjoint ranges in ascending order, as (first byte, end).
    ranges: HashMap<u16, Vec<(u64, u64)>>,
    /// Held for reading round every write; revoking takes it for writing and so waits out the write in progress.
    live: RwLock<bool>,
}

impl GrantTable {
    /// Allows writes into the destination ranges of `runs`, which the caller has validated.
    pub(super) fn grant(self: &Arc<Self>, runs: &RunList) -> Grant {
        let token = GrantToken::random();
        let granted = Arc::new(Granted { ranges: ranges(runs), live: RwLock::new(true) });
        locked(&self.grants).insert(token, granted.clone());
        let table = self.clone();
        Grant::fenced(
            token,
            Box::new(move || {
                locked(&table.grants).remove(&token);
                granted.revoke();
            }),
        )
    }

    pub(super) fn find(&self, token: GrantToken) -> Option<Arc<Granted>> {
        locked(&self.grants).get(&token).cloned()
    }
}

impl Granted {
    /// Refuses bytes that are not granted.
    pub(super) fn check(&self, region: u16, offset: u64, len: u64) -> Result<(), TransportError> {
        let refused = TransportError::NotGranted { region, offset, len };
        let (Some(ranges), Some(end)) = (self.ranges.get(&region), offset.checked_add(len)) else {
            return Err(refused);
        };
        let after = ranges.partition_point(|&(start, _)| start <= offset);
        let within = after > 0 && end <= ranges[after - 1].1;
        if within || len == 0 { Ok(()) } else { Err(refused) }
    }

    /// Runs `write` unless the grant is revoked. `write` must not block: revoking waits for it.
    pub(super) fn unless_revoked<R>(&self, write: impl FnOnce() -> R) -> Option<R> {
        let live = self.live.read().unwrap_or_else(PoisonError::into_inner);
        live.then(write)
    }

    fn revoke(&self) {
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = false;
    }
}

/// The destination ranges of `runs`, per region, sorted and merged.
fn ranges(runs: &RunList) -> HashMap<u16, Vec<(u64, u64)>> {
    let mut by_region: HashMap<u16, Vec<(u64, u64)>> = HashMap::new();
    for segment in &runs.segments {
        let filled = segment.runs.iter().filter(|run| run.len > 0);
        by_region.entry(segment.dst_region).or_default().extend(filled.map(|run| (run.dst, run.dst + run.len)));
    }
    for ranges in by_region.values_mut() {
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let touches = next.0 <= last.1;
            if touches {
                last.1 = last.1.max(next.1);
            }
            touches
        });
    }
    by_region
}

#[cfg(test)]
mod tests {
    use super::super::{Fence, Run, Segment};
    use super::*;

    #[test]
    fn a_grant_covers_its_ranges_merged_and_nothing_beside_them() {
        let run = |dst, len| Run { src: 0, dst, len };
        let runs = vec![run(40, 10), run(0, 10), run(10, 5), run(60, 0)];
        let table = Arc::new(GrantTable::default());
        let grant = table.grant(&RunList { segments: vec![Segment::new(9, 3, runs)] });
        let granted = table.find(grant.token()).unwrap();
        let cases = [
            (3, 0, 15, true),
            (3, 5, 10, true),
            (3, 5, 11, false),
            (3, 40, 10, true),
            (3, 39, 2, false),
            (3, 60, 1, false),
            (3, 60, 0, true),
            (3, u64::MAX, 2, false),
            (9, 0, 1, false),
        ];
        for (region, offset, len, allowed) in cases {
            assert_eq!(granted.check(region, offset, len).is_ok(), allowed, "region {region}, {offset}..+{len}");
        }
    }

    #[test]
    fn kv_7_nothing_is_written_once_a_grant_is_revoked_or_dropped() {
        let table = Arc::new(GrantTable::default());
        let grant = table.grant(&RunList::default());
        let granted = table.find(grant.token()).unwrap();
        assert_eq!(granted.unless_revoked(|| 1), Some(1));
        let token = grant.token();
        assert_eq!(grant.revoke(), Fence::Fenced);
        assert_eq!(granted.unless_revoked(|| 1), None);
        assert!(table.find(token).is_none());
    }
}
