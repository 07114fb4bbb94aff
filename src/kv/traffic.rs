//! What went over a runtime's links since it started, and the last transfers that failed: for people who watch a fleet.
//!
//! Decode counts, so that each transfer is counted once. Bounded: a fleet whose workers restart for weeks leaves no more
//! links here than fit, and the last few failures.

use std::collections::VecDeque;

use crate::config::Path;
use crate::control::{LinkTraffic, RecentFailure, RuntimeStatus, Traffic};
use crate::telemetry::{Side, TransferOutcome, TransferRecord, clock};

/// Links that are told apart. Those of workers that are long gone are the first to be forgotten.
const LINKS_MAX: usize = 512;
const FAILURES_MAX: usize = 16;
/// Most of a failure's text that is kept.
const CAUSE_CHARS_MAX: usize = 400;

/// A runtime's own part.
#[derive(Debug, Default)]
pub(super) struct Account {
    /// The one that carried something last comes last.
    links: VecDeque<LinkTraffic>,
    failures: VecDeque<RecentFailure>,
    failed: u64,
}

impl Account {
    /// Counts a transfer that ended; `kind` names how.
    pub(super) fn ended(&mut self, record: &TransferRecord, kind: &'static str) {
        let cause = match &record.outcome {
            TransferOutcome::Failed(cause) => Some(cause.as_str()),
            TransferOutcome::Expired => Some("nobody came for its blocks within the lease (`kv.lease_ms`)"),
            TransferOutcome::Done | TransferOutcome::Aborted => None,
        };
        if let Some(cause) = cause {
            self.failed(record, kind, cause);
        }
        let Some(peer) = record.peer_engine_id.as_ref().filter(|_| record.side == Side::Decode) else { return };
        let is = |link: &LinkTraffic| link.path == record.path && link.peer_engine_id == *peer;
        let known = self.links.iter().position(is).and_then(|at| self.links.remove(at));
        let mut link = known.unwrap_or_else(|| LinkTraffic {
            peer_engine_id: peer.clone(),
            path: record.path,
            ..LinkTraffic::default()
        });
        match record.outcome {
            TransferOutcome::Done => {
                link.done += 1;
                link.bytes += record.bytes;
                link.wait_us += record.wait_us;
                link.copy_us += record.copy_us;
                link.validate_us += record.validate_us;
            }
            TransferOutcome::Failed(_) => link.failed += 1,
            TransferOutcome::Aborted | TransferOutcome::Expired => {}
        }
        if self.links.len() == LINKS_MAX {
            self.links.pop_front();
        }
        self.links.push_back(link);
    }

    fn failed(&mut self, record: &TransferRecord, kind: &'static str, cause: &str) {
        self.failed += 1;
        if self.failures.len() == FAILURES_MAX {
            self.failures.pop_front();
        }
        self.failures.push_back(RecentFailure {
            rank: record.rank,
            number: self.failed,
            at_unix_ms: record.ended_unix_us / 1000,
            transfer_id: record.transfer_id.clone(),
            kind: kind.to_owned(),
            cause: cause.chars().take(CAUSE_CHARS_MAX).collect(),
        });
    }

    pub(super) fn told(&self, status: RuntimeStatus, connected: Vec<(String, Path)>) -> Traffic {
        Traffic {
            status,
            told_unix_us: clock::unix_us(),
            links: self.links.iter().cloned().collect(),
            connected,
            failures: self.failures.iter().cloned().collect(),
            unheard: Vec::new(),
        }
    }
}

/// Adds another rank's. Ranks share the bytes of a transfer; its number and its times are those of the slowest.
pub(super) fn add(ours: &mut Traffic, theirs: Traffic) {
    ours.status.held_blocks = ours.status.held_blocks.max(theirs.status.held_blocks);
    ours.status.transfers_active = ours.status.transfers_active.max(theirs.status.transfers_active);
    // The version that all of them have.
    ours.status.weight_version = ours.status.weight_version.min(theirs.status.weight_version);
    for link in theirs.links {
        let is = |known: &&mut LinkTraffic| known.path == link.path && known.peer_engine_id == link.peer_engine_id;
        match ours.links.iter_mut().find(is) {
            Some(known) => {
                known.bytes += link.bytes;
                known.done = known.done.max(link.done);
                known.failed = known.failed.max(link.failed);
                known.wait_us = known.wait_us.max(link.wait_us);
                known.copy_us = known.copy_us.max(link.copy_us);
                known.validate_us = known.validate_us.max(link.validate_us);
            }
            None => ours.links.push(link),
        }
    }
    let has = |connected: &[(String, Path)], engine_id: &str| connected.iter().any(|(id, _)| id == engine_id);
    ours.connected.retain(|(engine_id, _)| has(&theirs.connected, engine_id));
    for connected in theirs.connected {
        if has(&ours.connected, &connected.0) && !ours.connected.contains(&connected) {
            ours.connected.push(connected);
        }
    }
    for failure in theirs.failures {
        if ours.failures.iter().all(|known| known.transfer_id != failure.transfer_id) {
            ours.failures.push(failure);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Dispatch, Role};

    fn record(peer: &str, bytes: u64, outcome: TransferOutcome) -> TransferRecord {
        TransferRecord {
            transfer_id: format!("{bytes:032x}"),
            side: Side::Decode,
            engine_id: "decode".to_owned(),
            peer_engine_id: Some(peer.to_owned()),
            rank: 0,
            path: Some(Path::Shm),
            bytes,
            runs: 1,
            posts: 1,
            blocks: 1,
            tokens: 16,
            wait_us: 1,
            copy_us: 2,
            validate_us: 3,
            dispatch: Dispatch::Sequential,
            exposed_us: 0,
            digest_checked: false,
            weight_version: 0,
            ended_unix_us: 5_000,
            outcome,
        }
    }

    fn told(account: &Account) -> Traffic {
        let status = RuntimeStatus {
            engine_id: "decode".to_owned(),
            incarnation: 1,
            role: Role::Decode,
            held_blocks: 2,
            transfers_active: 1,
            weight_version: 0,
        };
        account.told(status, vec![("a".to_owned(), Path::Shm)])
    }

    #[test]
    fn links_add_up_and_failures_are_told() {
        let mut account = Account::default();
        account.ended(&record("a", 10, TransferOutcome::Done), "done");
        account.ended(&record("a", 20, TransferOutcome::Done), "done");
        account.ended(&record("b", 5, TransferOutcome::Failed("it broke".to_owned())), "copy");
        account.ended(&TransferRecord { side: Side::Prefill, ..record("a", 9, TransferOutcome::Expired) }, "expired");
        let traffic = told(&account);
        assert_eq!(traffic.links.len(), 2);
        assert_eq!((traffic.links[0].done, traffic.links[0].bytes, traffic.links[0].copy_us), (2, 30, 4));
        assert_eq!((traffic.links[1].failed, traffic.links[1].bytes), (1, 0));
        let kinds: Vec<_> = traffic.failures.iter().map(|failure| (failure.number, failure.kind.as_str())).collect();
        assert_eq!(kinds, [(1, "copy"), (2, "expired")]);
    }

    #[test]
    fn memory_is_bounded_however_many_peers_come_and_go() {
        let mut account = Account::default();
        for number in 0..LINKS_MAX + 10 {
            account.ended(&record(&format!("peer {number}"), 1, TransferOutcome::Failed("x".repeat(10_000))), "copy");
        }
        let traffic = told(&account);
        assert_eq!((traffic.links.len(), traffic.failures.len()), (LINKS_MAX, FAILURES_MAX));
        assert_eq!(traffic.links[0].peer_engine_id, "peer 10");
        assert!(traffic.failures.iter().all(|failure| failure.cause.len() == CAUSE_CHARS_MAX));
    }

    #[test]
    fn ranks_share_the_bytes_of_a_transfer_and_not_its_number() {
        let mut account = Account::default();
        account.ended(&record("a", 10, TransferOutcome::Done), "done");
        let mut sum = told(&account);
        add(&mut sum, told(&account));
        assert_eq!((sum.links.len(), sum.links[0].done, sum.links[0].bytes), (1, 1, 20));
        assert_eq!((sum.status.held_blocks, sum.connected.len()), (2, 1));
    }
}
