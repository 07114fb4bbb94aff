//! Blocks as the scheduler sees them: taken, shared by content, given back, overwritten when nobody needs them.

use super::block_pool::BlockPool;
use super::kv_cache::KvCache;
use super::prefix_cache::{BlockHash, PrefixCache};
use crate::kv::BlockId;

/// Pool, prefix cache and the memory under them.
#[derive(Debug)]
pub(super) struct Blocks {
    pub cache: KvCache,
    pool: BlockPool,
    prefix: PrefixCache,
    prefix_caching: bool,
    /// Blocks that a peer may still write into: out of use until the worker ends (KV-7).
    quarantined: usize,
}

impl Blocks {
    pub(super) fn new(cache: KvCache, prefix_caching: bool) -> Self {
        let pool = BlockPool::new(cache.num_blocks());
        // Memory that nobody has written yet reads as zeros, which no KV is: it need not be touched to be told apart.
        Self { cache, pool, prefix: PrefixCache::default(), prefix_caching, quarantined: 0 }
    }

    /// Blocks for a new sequence that needs `count` in all: those that hold the beginning of `hashes` already, then
    /// fresh ones. The second value is how many were found. `None`, and nothing taken, if there are too few.
    pub(super) fn take_for(&mut self, hashes: &[BlockHash], count: usize) -> Option<(Vec<BlockId>, usize)> {
        let mut blocks = if self.prefix_caching { self.prefix.find(hashes) } else { Vec::new() };
        let found = blocks.len();
        for &block in &blocks {
            self.pool.share(block);
        }
        if self.pool.available() < count - found {
            self.give_back(blocks);
            return None;
        }
        blocks.extend((found..count).map(|_| self.take().expect("counted before")));
        Some((blocks, found))
    }

    /// One fresh block.
    pub(super) fn take(&mut self) -> Option<BlockId> {
        let taken = self.pool.take()?;
        if taken.evicted {
            self.prefix.forget(taken.block);
            self.cache.poison(taken.block);
        }
        Some(taken.block)
    }

    /// Lets others find a full block by what it holds.
    pub(super) fn publish(&mut self, hash: BlockHash, block: BlockId) {
        if self.prefix_caching && self.prefix.insert(hash, block) {
            self.pool.set_cached(block);
        }
    }

    /// Ends one user's use. Last blocks first, so that the beginning of a prompt is evicted after its end.
    pub(super) fn give_back(&mut self, blocks: Vec<BlockId>) {
        for block in blocks.into_iter().rev() {
            if self.pool.give_back(block) {
                self.cache.poison(block);
            }
        }
    }

    /// Counts used blocks that will never be given back.
    pub(super) fn quarantine(&mut self, blocks: usize) {
        self.quarantined += blocks;
    }

    /// Forgets all content. False, and nothing forgotten, while any block is used.
    pub(super) fn reset_prefix_cache(&mut self) -> bool {
        if self.used() > 0 {
            return false;
        }
        self.forget_idle();
        true
    }

    /// Forgets cached KV that nobody uses: it is of weights that have been replaced (WT-3).
    pub(super) fn forget_idle(&mut self) {
        for block in self.pool.evict_idle() {
            self.prefix.forget(block);
            self.cache.poison(block);
        }
    }

    pub(super) fn total(&self) -> usize {
        self.pool.total()
    }

    /// Blocks that can be taken now, idle cached ones included.
    pub(super) fn available(&self) -> usize {
        self.pool.available()
    }

    pub(super) fn idle(&self) -> usize {
        self.pool.idle()
    }

    pub(super) fn quarantined(&self) -> usize {
        self.quarantined
    }

    /// Blocks in use by sequences or leases.
    pub(super) fn used(&self) -> usize {
        self.total() - self.available() - self.quarantined
    }
}
