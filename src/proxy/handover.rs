//! Whose fault it is when decode answers that it failed with KV that prefill had: a pair failed, and either half may be why.
//!
//! Who fails with one partner alone may be right: the partner's KV may be out of reach, its network gone while it answers everything
//! else. Who fails with several in a row, without success between, is not. Where there is one partner only, nothing can be told
//! apart, and it counts at once. What was not counted at first is counted when the second partner comes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Failures of one worker in a row with others' KV, or of others with its KV.
#[derive(Debug, Default)]
pub(crate) struct Handovers {
    /// Whether there is any: a success on the usual way takes no lock.
    any: AtomicBool,
    row: Mutex<Row>,
}

#[derive(Debug, Default)]
struct Row {
    partner: Option<usize>,
    several: bool,
    /// Not held against anybody yet.
    open: u32,
    /// Held against this worker.
    counted: u32,
}

impl Handovers {
    fn lock(&self) -> MutexGuard<'_, Row> {
        self.row.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A hand-over with `partner`, one of so many, failed. How many failures that adds against this worker.
    pub(crate) fn failed(&self, partner: usize, partners: usize) -> u32 {
        self.any.store(true, Ordering::Relaxed);
        let mut row = self.lock();
        row.several |= row.partner.is_some_and(|last| last != partner);
        row.partner = Some(partner);
        row.open += 1;
        if !row.several && partners > 1 {
            return 0;
        }
        let added = std::mem::take(&mut row.open);
        row.counted += added;
        added
    }

    /// Failures in a row that speak against this worker.
    pub(crate) fn counted(&self) -> u32 {
        self.lock().counted
    }

    /// A hand-over was well.
    pub(crate) fn succeeded(&self) {
        if self.any.swap(false, Ordering::Relaxed) {
            *self.lock() = Row::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    // PX-2.
    fn px_2_who_fails_with_one_partner_alone_is_not_blamed_until_another_says_the_same() {
        let decode = Handovers::default();
        assert_eq!([decode.failed(1, 2), decode.failed(1, 2), decode.failed(1, 2)], [0, 0, 0]);
        assert_eq!((decode.failed(0, 2), decode.counted()), (4, 4), "all of them, once two partners say so");
        assert_eq!(decode.failed(0, 2), 1);
        decode.succeeded();
        assert_eq!((decode.failed(0, 2), decode.counted()), (0, 0));
        let alone = Handovers::default();
        assert_eq!((alone.failed(0, 1), alone.failed(0, 1), alone.counted()), (1, 1, 2), "nobody else to ask");
    }
}
