//! Waiting to running or loading: oldest first, and only with blocks for all that the sequence already has.

use super::super::sequence::{Load, Sequence};
use super::{Key, RUNNING_MAX, Scheduler};

/// Where a sequence went.
enum Admitted {
    Runs(Sequence),
    Loads(Sequence),
    /// There are too few blocks; nothing was taken.
    Waits(Sequence),
}

impl Scheduler {
    /// Admits from the front of the queue until one has to wait. Later, shorter ones do not overtake it: it would starve.
    pub(super) fn admit(&mut self) {
        while self.running.len() + self.loading.len() < RUNNING_MAX {
            let Some((key, sequence)) = self.waiting.pop_first() else { return };
            if !self.may_begin(key) {
                self.waiting.insert(key, sequence);
                return;
            }
            match self.try_admit(sequence) {
                Admitted::Runs(sequence) => {
                    self.running.insert(key, sequence);
                }
                Admitted::Loads(sequence) => self.start_load(key, sequence),
                Admitted::Waits(sequence) => {
                    self.waiting.insert(key, sequence);
                    return;
                }
            }
        }
    }

    fn try_admit(&mut self, mut sequence: Sequence) -> Admitted {
        let block_size = self.parts.blocks.cache.block_size();
        let count = sequence.len().div_ceil(block_size);
        let Some((blocks, found)) = self.parts.blocks.take_for(sequence.reusable(block_size), count) else {
            return Admitted::Waits(sequence);
        };
        sequence.blocks = blocks;
        sequence.computed = found * block_size;
        sequence.start_after(found);
        self.parts.metrics.prompt_cached.inc_by((found * block_size) as u64);
        // The last token is computed here in any case: a load that would bring nothing else is not worth a copy.
        let Load::Claimed { handle } = sequence.load else { return Admitted::Runs(ran(sequence)) };
        if sequence.computed + 1 >= sequence.prompt_len() {
            self.parts.link.release(handle);
            sequence.load = Load::Local;
            return Admitted::Runs(ran(sequence));
        }
        Admitted::Loads(sequence)
    }

    fn start_load(&mut self, key: Key, sequence: Sequence) {
        let Load::Claimed { handle } = sequence.load else { unreachable!("only claimed sequences load") };
        let first = sequence.computed / self.parts.blocks.cache.block_size();
        let blocks = sequence.blocks[first..].to_vec();
        let first_token = u32::try_from(sequence.computed).expect("prompts are shorter than 2^32 tokens");
        // Entered first: the report may come before `fetch` returns.
        self.loading.insert(handle.transfer_id, (key, sequence));
        self.parts.link.fetch(handle, vec![blocks], first_token);
    }
}

fn ran(mut sequence: Sequence) -> Sequence {
    let computed = sequence.computed;
    sequence.cached_tokens.get_or_insert(computed);
    sequence
}
