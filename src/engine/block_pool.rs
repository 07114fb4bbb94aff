//! Which blocks are free, which are used by how many, and which cached ones may be given up.
//!
//! A block is *blank* (poisoned, nobody uses it), *used* (one or more sequences or leases), or *idle* (nobody uses it, but
//! the prefix cache still finds it; the least recently used is given up first).

use std::collections::{BTreeMap, VecDeque};

use crate::kv::BlockId;

/// The blocks of one worker.
#[derive(Debug)]
pub(super) struct BlockPool {
    blank: VecDeque<BlockId>,
    /// Idle blocks by when they became idle.
    idle: BTreeMap<u64, BlockId>,
    states: Vec<BlockState>,
    clock: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct BlockState {
    users: u32,
    /// Whether the prefix cache finds this block.
    cached: bool,
    /// When it became idle, if it is.
    idle_since: Option<u64>,
}

impl BlockPool {
    pub(super) fn new(blocks: u32) -> Self {
        Self {
            blank: (0..blocks).map(BlockId).collect(),
            idle: BTreeMap::new(),
            states: vec![BlockState::default(); blocks as usize],
            clock: 0,
        }
    }

    /// All blocks there are.
    pub(super) fn total(&self) -> usize {
        self.states.len()
    }

    /// Blocks that can be taken now, idle ones included.
    pub(super) fn available(&self) -> usize {
        self.blank.len() + self.idle.len()
    }

    /// Idle blocks among the available ones.
    pub(super) fn idle(&self) -> usize {
        self.idle.len()
    }

    /// Takes one block for one user. `evicted` says that the prefix cache must forget it.
    pub(super) fn take(&mut self) -> Option<Taken> {
        if let Some(block) = self.blank.pop_front() {
            self.state(block).users = 1;
            return Some(Taken { block, evicted: false });
        }
        let (_, block) = self.idle.pop_first()?;
        *self.state(block) = BlockState { users: 1, cached: false, idle_since: None };
        Some(Taken { block, evicted: true })
    }

    /// One more user for a block that the prefix cache found.
    pub(super) fn share(&mut self, block: BlockId) {
        let state = self.state(block);
        assert!(state.users > 0 || state.cached, "block {} is shared but blank", block.0);
        state.users += 1;
        if let Some(since) = state.idle_since.take() {
            self.idle.remove(&since);
        }
    }

    /// The prefix cache finds this used block from now on.
    pub(super) fn set_cached(&mut self, block: BlockId) {
        let state = self.state(block);
        assert!(state.users > 0, "block {} is cached while nobody uses it", block.0);
        state.cached = true;
    }

    /// One user less. True if the block is blank now: its bytes must be overwritten.
    pub(super) fn give_back(&mut self, block: BlockId) -> bool {
        self.clock += 1;
        let now = self.clock;
        let state = self.state(block);
        assert!(state.users > 0, "block {} is given back twice", block.0);
        state.users -= 1;
        if state.users > 0 {
            return false;
        }
        if state.cached {
            state.idle_since = Some(now);
            self.idle.insert(now, block);
            return false;
        }
        self.blank.push_back(block);
        true
    }

    /// Gives up all idle blocks, which are blank from now on and must be overwritten.
    pub(super) fn evict_idle(&mut self) -> Vec<BlockId> {
        let evicted: Vec<_> = std::mem::take(&mut self.idle).into_values().collect();
        for &block in &evicted {
            *self.state(block) = BlockState::default();
            self.blank.push_back(block);
        }
        evicted
    }

    fn state(&mut self, block: BlockId) -> &mut BlockState {
        &mut self.states[block.0 as usize]
    }
}

/// A block taken from the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Taken {
    pub block: BlockId,
    /// It was idle: the prefix cache must forget it, and its old bytes are another sequence's.
    pub evicted: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_blank_again_when_its_last_user_leaves() {
        let mut pool = BlockPool::new(1);
        let block = pool.take().expect("one block").block;
        assert_eq!(pool.take(), None);
        pool.share(block);
        assert!(!pool.give_back(block));
        assert_eq!(pool.available(), 0);
        assert!(pool.give_back(block));
        assert_eq!(pool.available(), 1);
    }

    #[test]
    fn cached_blocks_stay_until_blank_ones_run_out_and_the_oldest_goes_first() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<_> = (0..3).map(|_| pool.take().expect("a block").block).collect();
        pool.set_cached(blocks[0]);
        pool.set_cached(blocks[1]);
        assert!(!pool.give_back(blocks[1]));
        assert!(!pool.give_back(blocks[0]));
        assert!(pool.give_back(blocks[2]));
        assert_eq!((pool.available(), pool.idle()), (3, 2));
        assert_eq!(pool.take(), Some(Taken { block: blocks[2], evicted: false }));
        assert_eq!(pool.take(), Some(Taken { block: blocks[1], evicted: true }));
        assert_eq!(pool.take(), Some(Taken { block: blocks[0], evicted: true }));
    }

    #[test]
    fn sharing_an_idle_block_saves_it() {
        let mut pool = BlockPool::new(1);
        let block = pool.take().expect("one block").block;
        pool.set_cached(block);
        pool.give_back(block);
        pool.share(block);
        assert_eq!(pool.take(), None);
        assert!(!pool.give_back(block));
        assert_eq!(pool.evict_idle(), [block]);
        assert_eq!((pool.available(), pool.idle()), (1, 0));
    }

    #[test]
    #[should_panic(expected = "given back twice")]
    fn giving_back_twice_is_our_own_mistake() {
        let mut pool = BlockPool::new(1);
        let block = pool.take().expect("one block").block;
        pool.give_back(block);
        pool.give_back(block);
    }
}
