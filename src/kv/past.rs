//! What is remembered of transfers that are over, and of aborts that came too early. Bounded: the oldest is forgotten.

use std::collections::{HashMap, VecDeque};

use crate::control::TransferId;
use crate::telemetry::{Side, TransferRecord};

/// Ids remembered. At a thousand requests a second this is some ten seconds, longer than messages can be late.
const IDS_MAX: usize = 16 * 1024;
/// Records kept.
const RECORDS_MAX: usize = 4096;

/// How an id came to be over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gone {
    /// Aborted before it was offered or expected here.
    AbortedEarly,
    /// Decode had it already, before prefill had computed it.
    ReleasedEarly,
    /// Aborted while it was in progress.
    Aborted,
    /// Its lease ended.
    Expired,
    Ended,
}

/// Ids that are over.
#[derive(Debug, Default)]
pub(super) struct Past {
    gone: HashMap<TransferId, Gone>,
    order: VecDeque<TransferId>,
}

impl Past {
    pub(super) fn remember(&mut self, transfer_id: TransferId, gone: Gone) {
        if self.gone.insert(transfer_id, gone).is_none() {
            self.order.push_back(transfer_id);
        }
        if self.order.len() > IDS_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.gone.remove(&oldest);
        }
    }

    pub(super) fn of(&self, transfer_id: TransferId) -> Option<Gone> {
        self.gone.get(&transfer_id).copied()
    }
}

/// The records of recent transfers, oldest first.
#[derive(Debug, Default)]
pub(super) struct Records {
    ring: VecDeque<(TransferId, TransferRecord)>,
}

impl Records {
    pub(super) fn push(&mut self, transfer_id: TransferId, record: TransferRecord) {
        if self.ring.len() == RECORDS_MAX {
            self.ring.pop_front();
        }
        self.ring.push_back((transfer_id, record));
    }

    /// The latest record of a transfer; decode's, where both ends were here.
    pub(super) fn of(&self, transfer_id: TransferId) -> Option<TransferRecord> {
        let mut found = self.ring.iter().rev().filter(|(id, _)| *id == transfer_id).map(|(_, record)| record);
        let latest = found.next()?;
        let decode = std::iter::once(latest).chain(found).find(|record| record.side == Side::Decode);
        Some(decode.unwrap_or(latest).clone())
    }

    pub(super) fn all(&self) -> Vec<TransferRecord> {
        self.ring.iter().map(|(_, record)| record.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_ids_are_forgotten_at_the_bound() {
        let id = |n: usize| TransferId((n as u128).to_le_bytes());
        let mut past = Past::default();
        past.remember(id(0), Gone::AbortedEarly);
        for n in 1..IDS_MAX {
            past.remember(id(n), Gone::Ended);
        }
        past.remember(id(0), Gone::Expired);
        assert_eq!(past.of(id(0)), Some(Gone::Expired));
        past.remember(id(IDS_MAX), Gone::Ended);
        assert_eq!(past.of(id(0)), None);
        assert_eq!((past.gone.len(), past.order.len()), (IDS_MAX, IDS_MAX));
    }
}
