//! Groups of processes that all get the same buckets at once, over `nccl`.
//!
//! A sender and the receivers on other GPUs are one group: it is rank 0. Who is in it is the sender's to say, once all receivers have
//! come: one for each GPU, because NCCL takes no two ranks on one; whoever is left pulls. A group outlives an update, for to make one
//! takes a second; it is made anew when somebody has gone, come (back) or left an update half-way, and nobody else is restarted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::messages::{Group, Wish};
use crate::transport::Caster;

/// What a process has of groups. One for all senders, or all receivers, of it.
pub struct Casts {
    /// Tells this process from all others, also from one that was restarted in its place.
    process: u64,
    held: Mutex<Option<Held>>,
}

/// A group that can be used again.
#[derive(Clone)]
pub(super) struct Held {
    pub(super) token: u64,
    pub(super) caster: Arc<Caster>,
    /// The processes of ranks 1 and on. Known to rank 0.
    pub(super) members: Vec<u64>,
}

impl Default for Casts {
    fn default() -> Self {
        Self { process: rand::random(), held: Mutex::default() }
    }
}

impl Casts {
    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a receiver on this GPU asks for.
    pub(super) fn wish(&self, gpu: Option<[u8; 16]>) -> Wish {
        let sound = self.held().as_ref().filter(|held| held.caster.is_sound()).map(|held| held.token);
        // In host memory every process is a place of its own: only a stand-in for NCCL moves that.
        let gpu = gpu.unwrap_or_else(|| u128::from(self.process).to_le_bytes());
        Wish { process: self.process, gpu, holds: sound }
    }

    /// Takes the group out for an update. It has to be put back after one that ended well; else it is ended.
    pub(super) fn take(&self, token: u64) -> Option<Held> {
        self.held().take_if(|held| held.token == token)
    }

    /// The same, whatever it is.
    pub(super) fn take_any(&self) -> Option<Held> {
        self.held().take()
    }

    pub(super) fn put(&self, held: Held) {
        if held.caster.is_sound() {
            *self.held() = Some(held);
        }
    }
}

/// Who is to be in the group, by their numbers as receivers: the first of each GPU that is not the sender's.
pub(super) fn chosen(wishes: &BTreeMap<u32, Wish>, own_gpu: Option<[u8; 16]>) -> Vec<(u32, Wish)> {
    let mut taken: BTreeSet<[u8; 16]> = own_gpu.into_iter().collect();
    wishes.iter().filter(|(_, wish)| taken.insert(wish.gpu)).map(|(number, wish)| (*number, *wish)).collect()
}

/// Whether these members are a group already, in this order.
pub(super) fn is_same(held: &Held, members: &[(u32, Wish)]) -> bool {
    held.caster.is_sound()
        && held.members.len() == members.len()
        && held
            .members
            .iter()
            .zip(members)
            .all(|(had, (_, wish))| *had == wish.process && wish.holds == Some(held.token))
}

/// What each member is told. Without a name the group is there already.
pub(super) fn seats(members: &[(u32, Wish)], token: u64, name: &[u8]) -> BTreeMap<u32, Group> {
    let ranks = u32::try_from(members.len() + 1).unwrap_or(u32::MAX);
    let seat = |(number, _): &(u32, Wish), rank| (*number, Group { token, name: name.to_vec(), rank, ranks });
    members.iter().zip(1..).map(|(member, rank)| seat(member, rank)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_has_one_rank_for_each_gpu_but_the_senders() {
        let wish = |process, gpu| Wish { process, gpu: [gpu; 16], holds: None };
        let wishes = BTreeMap::from([(0, wish(10, 0)), (1, wish(11, 1)), (3, wish(13, 2)), (4, wish(14, 1))]);
        let numbers = |own| chosen(&wishes, own).into_iter().map(|(number, _)| number).collect::<Vec<_>>();
        assert_eq!(numbers(Some([0; 16])), [1, 3]);
        assert_eq!(numbers(None), [0, 1, 3]);
        let seats = seats(&chosen(&wishes, Some([0; 16])), 7, b"name");
        let told: Vec<_> = seats.iter().map(|(number, group)| (*number, group.rank, group.ranks)).collect();
        assert_eq!(told, [(1, 1, 3), (3, 2, 3)], "rank 0 is the sender");
    }
}
