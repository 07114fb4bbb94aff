//! Which bucket a sender may pack next: a machine without sockets or clock.
//!
//! A sender has memory for a few buckets, and receivers that take them at their own pace. Bucket `k` lies in slot
//! `k mod slots`, so it may be packed once every receiver has taken bucket `k - slots`. Nobody is left behind: what is
//! overwritten, all have. Until all receivers that were announced have joined, only the first buckets are packed.

use std::collections::BTreeMap;

/// One sender's buckets and receivers.
#[derive(Debug)]
pub(super) struct Ring {
    slots: u64,
    buckets: u64,
    /// Buckets that were packed.
    packed: u64,
    packing: bool,
    /// How many there will be; known from the first of them.
    expected: Option<u32>,
    /// Buckets that each receiver has taken.
    taken: BTreeMap<u32, u64>,
    /// Receivers that went, with what they had then.
    gone: BTreeMap<u32, u64>,
}

/// Why a receiver is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoPlace {
    #[error("receiver {receiver} of {receivers}: there are only numbers 0 to {}", receivers.saturating_sub(1))]
    Number { receiver: u32, receivers: u32 },
    #[error("receiver {receiver} speaks of {receivers} receivers, those before it of {expected}")]
    Count { receiver: u32, receivers: u32, expected: u32 },
    #[error("receiver {receiver} has joined already")]
    Twice { receiver: u32 },
}

/// A receiver that did what it may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("receiver {receiver} has {taken} buckets of {packed} and speaks of bucket {bucket}")]
pub(super) struct OutOfTurn {
    receiver: u32,
    bucket: u64,
    taken: u64,
    packed: u64,
}

impl Ring {
    pub(super) fn new(buckets: u64, slots: u64) -> Self {
        assert!(slots > 0 && buckets > 0, "something is sent through something");
        let (taken, gone) = (BTreeMap::new(), BTreeMap::new());
        Self { slots, buckets, packed: 0, packing: false, expected: None, taken, gone }
    }

    pub(super) fn join(&mut self, receiver: u32, receivers: u32) -> Result<(), NoPlace> {
        if receiver >= receivers {
            return Err(NoPlace::Number { receiver, receivers });
        }
        let expected = *self.expected.get_or_insert(receivers);
        if expected != receivers {
            return Err(NoPlace::Count { receiver, receivers, expected });
        }
        if self.taken.contains_key(&receiver) || self.gone.contains_key(&receiver) {
            return Err(NoPlace::Twice { receiver });
        }
        self.taken.insert(receiver, 0);
        Ok(())
    }

    /// A receiver has gone. The others are not held up by it.
    pub(super) fn leave(&mut self, receiver: u32) {
        if let Some(taken) = self.taken.remove(&receiver) {
            self.gone.insert(receiver, taken);
        }
    }

    /// The bucket to pack now, if there is one. Then [`Ring::packed`] is due.
    pub(super) fn pack(&mut self) -> Option<u64> {
        let all_here = self.expected.is_some_and(|expected| self.joined() == expected);
        let slowest = if all_here { self.taken.values().min().copied() } else { Some(0) };
        let may = slowest.is_some_and(|taken| self.packed < taken + self.slots);
        if self.packing || self.packed == self.buckets || self.taken.is_empty() || !may {
            return None;
        }
        self.packing = true;
        Some(self.packed)
    }

    pub(super) fn packed(&mut self) {
        assert!(std::mem::take(&mut self.packing), "a bucket was being packed");
        self.packed += 1;
    }

    /// Buckets that were packed.
    pub(super) fn packed_so_far(&self) -> u64 {
        self.packed
    }

    /// Whether a receiver can have a bucket now. It asks for them in order, one ahead of what it has taken at most.
    pub(super) fn is_ready(&self, receiver: u32, bucket: u64) -> Result<bool, OutOfTurn> {
        let taken = self.taken.get(&receiver).copied().unwrap_or(0);
        if bucket >= self.buckets || bucket < taken || bucket > taken + 1 {
            return Err(OutOfTurn { receiver, bucket, taken, packed: self.packed });
        }
        Ok(bucket < self.packed)
    }

    /// A receiver has the bytes of a bucket.
    pub(super) fn take(&mut self, receiver: u32, bucket: u64) -> Result<(), OutOfTurn> {
        let packed = self.packed;
        let Some(taken) = self.taken.get_mut(&receiver) else { return Ok(()) };
        if bucket != *taken || bucket >= packed {
            return Err(OutOfTurn { receiver, bucket, taken: *taken, packed });
        }
        *taken += 1;
        Ok(())
    }

    fn joined(&self) -> u32 {
        u32::try_from(self.taken.len() + self.gone.len()).unwrap_or(u32::MAX)
    }

    /// How many receivers were announced, and how many of them came.
    pub(super) fn attendance(&self) -> (Option<u32>, u32) {
        (self.expected, self.joined())
    }

    /// Buckets that every receiver has.
    pub(super) fn taken_by_all(&self) -> u64 {
        let all_here = self.expected.is_some_and(|expected| self.joined() == expected);
        if all_here { self.taken.values().chain(self.gone.values()).min().copied().unwrap_or(0) } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wt_4_missing_extra_and_repeated_receivers_are_named() {
        let mut ring = Ring::new(5, 2);
        assert_eq!(ring.join(2, 2), Err(NoPlace::Number { receiver: 2, receivers: 2 }));
        ring.join(0, 2).unwrap();
        assert_eq!(ring.join(0, 2), Err(NoPlace::Twice { receiver: 0 }));
        assert_eq!(ring.join(1, 3), Err(NoPlace::Count { receiver: 1, receivers: 3, expected: 2 }));
        for bucket in 0..2 {
            assert_eq!(ring.pack(), Some(bucket));
            assert_eq!(ring.pack(), None, "one at a time");
            ring.packed();
            ring.take(0, bucket).unwrap();
        }
        assert_eq!(ring.pack(), None, "the second has not come, and would miss the first bucket");
        assert_eq!((ring.attendance(), ring.taken_by_all()), ((Some(2), 1), 0));
        ring.join(1, 2).unwrap();
        assert_eq!(ring.pack(), None);
        ring.take(1, 0).unwrap();
        assert_eq!((ring.pack(), ring.taken_by_all()), (Some(2), 1));
        ring.leave(1);
        assert_eq!(ring.join(1, 2), Err(NoPlace::Twice { receiver: 1 }), "what it missed is gone");
    }

    #[test]
    fn buckets_are_taken_in_order() {
        let mut ring = Ring::new(3, 2);
        ring.join(0, 1).unwrap();
        assert_eq!(ring.is_ready(0, 0), Ok(false));
        assert!(ring.take(0, 0).is_err(), "not packed yet");
        assert_eq!(ring.pack(), Some(0));
        ring.packed();
        assert_eq!((ring.is_ready(0, 0), ring.is_ready(0, 1)), (Ok(true), Ok(false)));
        assert!(ring.is_ready(0, 2).is_err() && ring.take(0, 1).is_err());
        ring.take(0, 0).unwrap();
        assert!(ring.is_ready(0, 0).is_err() && ring.take(0, 0).is_err());
    }

    proptest! {
        /// Whatever the order of events: no slot is packed again before all have its bucket, and all get all.
        #[test]
        fn nothing_is_overwritten_that_somebody_still_needs(
            buckets in 1..12_u64, slots in 1..4_u64, receivers in 1..4_u32, moves in prop::collection::vec(0..8_usize, 0..200)
        ) {
            let mut ring = Ring::new(buckets, slots);
            let mut memory: Vec<Option<u64>> = vec![None; usize::try_from(slots).unwrap()];
            let mut has: Vec<Option<u64>> = vec![None; receivers as usize];
            let slot = |bucket: u64| usize::try_from(bucket % slots).unwrap();
            let order = moves.into_iter().chain((0..8).cycle().take(8 * 12 * 8));
            for step in order {
                let receiver = u32::try_from(step).unwrap() % receivers;
                match (step, &mut has[receiver as usize]) {
                    (6.., _) => {
                        if let Some(bucket) = ring.pack() {
                            memory[slot(bucket)] = Some(bucket);
                            ring.packed();
                        }
                    }
                    (_, joined @ None) => {
                        ring.join(receiver, receivers).unwrap();
                        *joined = Some(0);
                    }
                    (_, Some(next)) => {
                        if *next < buckets && ring.is_ready(receiver, *next).unwrap() {
                            prop_assert_eq!(memory[slot(*next)], Some(*next), "receiver {} reads another bucket", receiver);
                            ring.take(receiver, *next).unwrap();
                            *next += 1;
                        }
                    }
                }
            }
            prop_assert!(has.iter().all(|next| *next == Some(buckets)), "{:?}", has);
            prop_assert_eq!(ring.taken_by_all(), buckets);
        }
    }
}
