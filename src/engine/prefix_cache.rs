//! Finds full blocks by what they hold: a hash over all tokens up to the block's end, the cache salt and the weights.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use super::model::Weights;
use super::tokenizer::Token;
use crate::kv::BlockId;

/// Names the content of one full block and of everything before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct BlockHash([u8; 16]);

impl BlockHash {
    /// Before the first block. Requests with different salts never share a block, nor do different weights (WT-3).
    pub(super) fn root(weights: Weights, cache_salt: Option<&str>) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(b"pdlink prefix");
        hasher.update(weights.version.to_le_bytes());
        hasher.update(weights.word().to_le_bytes());
        if let Some(salt) = cache_salt {
            hasher.update([1]);
            hasher.update(salt.as_bytes());
        }
        Self::of(hasher)
    }

    /// After one more full block.
    pub(super) fn then(self, tokens: &[Token]) -> Self {
        let mut hasher = Sha256::new();
        hasher.update(self.0);
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        Self::of(hasher)
    }

    fn of(hasher: Sha256) -> Self {
        let mut short = [0; 16];
        short.copy_from_slice(&hasher.finalize()[..16]);
        Self(short)
    }
}

/// Content to block, both ways. The pool decides which blocks stay.
#[derive(Debug, Default)]
pub(super) struct PrefixCache {
    blocks: HashMap<BlockHash, BlockId>,
    hashes: HashMap<BlockId, BlockHash>,
}

impl PrefixCache {
    /// The blocks that hold the beginning of `hashes`, without a gap.
    pub(super) fn find(&self, hashes: &[BlockHash]) -> Vec<BlockId> {
        hashes.iter().map_while(|hash| self.blocks.get(hash).copied()).collect()
    }

    /// Makes `block` the one found for `hash`. False if another block already is: then this one stays private.
    pub(super) fn insert(&mut self, hash: BlockHash, block: BlockId) -> bool {
        if self.blocks.contains_key(&hash) || self.hashes.contains_key(&block) {
            return false;
        }
        self.blocks.insert(hash, block);
        self.hashes.insert(block, hash);
        true
    }

    /// Forgets a block whose bytes are about to be overwritten.
    pub(super) fn forget(&mut self, block: BlockId) {
        if let Some(hash) = self.hashes.remove(&block) {
            self.blocks.remove(&hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    // WT-3: the version is part of every hash.
    fn a_hash_depends_on_tokens_salt_weights_and_everything_before() {
        let root = BlockHash::root(Weights::base(0), None);
        assert_eq!(root.then(&[1, 2]), BlockHash::root(Weights::base(0), None).then(&[1, 2]));
        let others = [
            root.then(&[2, 1]),
            root.then(&[1, 2]).then(&[1, 2]),
            BlockHash::root(Weights::base(1), None).then(&[1, 2]),
            BlockHash::root(Weights::base(0), Some("")).then(&[1, 2]),
            BlockHash::root(Weights::base(0), Some("a")).then(&[1, 2]),
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(*other, root.then(&[1, 2]), "case {index}");
        }
    }

    #[test]
    fn a_hit_ends_at_the_first_gap() {
        let chain: Vec<_> = (0..3)
            .scan(BlockHash::root(Weights::base(0), None), |hash, token| {
                *hash = hash.then(&[token]);
                Some(*hash)
            })
            .collect();
        let mut cache = PrefixCache::default();
        assert!(cache.insert(chain[0], BlockId(7)));
        assert!(cache.insert(chain[2], BlockId(9)));
        assert_eq!(cache.find(&chain), [BlockId(7)]);
        assert!(!cache.insert(chain[0], BlockId(8)), "the first block stays the one that is found");
        cache.forget(BlockId(7));
        assert_eq!(cache.find(&chain), []);
        cache.forget(BlockId(7));
    }
}
