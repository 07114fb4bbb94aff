//! Who served this before? A bounded memory from hashes to workers, for sessions and for prompt beginnings.
//!
//! A fixed table without locks: a new entry simply takes the place of another one with the same slot. Losing an entry
//! costs a prefix cache hit, never a wrong answer, so nothing has to be exact here.

use std::hash::{DefaultHasher, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

/// Entries of a table: 512 KiB.
const SLOTS: usize = 1 << 16;
/// Bits of an entry that name the worker; the others are the hash's tag.
const WORKER_BITS: u32 = 16;

/// Bytes of a prompt per link of its hash chain, and most links: the first 32 KiB of a prompt decide.
const PREFIX_BLOCK_BYTES: usize = 512;
const PREFIX_BLOCKS_MAX: usize = 64;

/// Hash → worker number.
#[derive(Debug)]
pub(crate) struct AffinityTable {
    slots: Box<[AtomicU64]>,
}

impl AffinityTable {
    pub(crate) fn new() -> Self {
        Self { slots: (0..SLOTS).map(|_| AtomicU64::new(0)).collect() }
    }

    fn slot(&self, hash: u64) -> &AtomicU64 {
        let at = usize::try_from(hash % SLOTS as u64).unwrap_or(0);
        &self.slots[at]
    }

    pub(crate) fn get(&self, hash: u64) -> Option<usize> {
        let entry = self.slot(hash).load(Ordering::Relaxed);
        // Workers are stored from 1, so that an empty slot is no worker.
        let worker = entry & ((1 << WORKER_BITS) - 1);
        let same = entry >> WORKER_BITS == hash >> WORKER_BITS && worker != 0;
        same.then(|| usize::try_from(worker - 1).unwrap_or(0))
    }

    pub(crate) fn put(&self, hash: u64, worker: usize) {
        let worker = (worker as u64 + 1) & ((1 << WORKER_BITS) - 1);
        self.slot(hash).store((hash >> WORKER_BITS) << WORKER_BITS | worker, Ordering::Relaxed);
    }
}

/// A hash that is the same on all threads for the life of the process.
pub(crate) fn hash_of(parts: &[&[u8]]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for part in parts {
        hasher.write(part);
        hasher.write_u8(0xff);
    }
    hasher.finish()
}

/// Hashes of the beginnings of `prompt`, shortest first: one per whole block.
pub(crate) fn prefix_hashes(prompt: &[u8]) -> Vec<u64> {
    let mut hasher = DefaultHasher::new();
    let blocks = prompt.chunks_exact(PREFIX_BLOCK_BYTES).take(PREFIX_BLOCKS_MAX);
    blocks
        .map(|block| {
            hasher.write(block);
            hasher.finish()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_found_until_another_takes_its_slot() {
        let table = AffinityTable::new();
        let hash = hash_of(&[b"session"]);
        assert_eq!(table.get(hash), None);
        table.put(hash, 3);
        assert_eq!(table.get(hash), Some(3));
        assert_eq!(table.get(hash ^ (1 << 40)), None, "another hash in the same slot is not taken for it");
        table.put(hash ^ (1 << 40), 1);
        assert_eq!(table.get(hash), None);
    }

    #[test]
    fn equal_beginnings_share_their_hashes() {
        let a = [vec![b'a'; 2048], vec![b'b'; 2048]].concat();
        let b = [vec![b'a'; 2048], vec![b'c'; 2048]].concat();
        let (a, b) = (prefix_hashes(&a), prefix_hashes(&b));
        assert_eq!(a.len(), 8);
        assert_eq!(a[..4], b[..4]);
        assert_ne!(a[4], b[4]);
        assert!(prefix_hashes(b"short").is_empty());
    }
}
