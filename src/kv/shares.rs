//! Who gives which heads to whom: between ranks, between the runtimes that hold them, and within one pair of runtimes.
//!
//! Everything follows from the two geometries and from how each worker spreads its ranks over runtimes, so both sides
//! find the same without a word. A head that several source ranks hold comes from one of them; the receiving ranks are
//! spread over the holders. A source rank that nobody reads is let go of by one decode runtime, chosen the same way.

use std::collections::BTreeSet;
use std::ops::Range;

use super::{GroupGeometry, HeadRange, Layout};

/// Heads that one rank gives another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) src_rank: u32,
    pub(super) dst_rank: u32,
    pub(super) heads: HeadRange,
}

/// What `dst_ranks` get, and from whom.
pub(super) fn shares(group: &GroupGeometry, src_tp: u32, dst_tp: u32, dst_ranks: Range<u32>) -> Vec<Share> {
    let mut shares = Vec::new();
    for dst_rank in dst_ranks {
        let wanted = group.heads_of(dst_rank, dst_tp);
        let wanted_end = wanted.first + wanted.count;
        let mut head = wanted.first;
        while head < wanted_end {
            let holders = group.holders_of(head, src_tp);
            let src_rank = holders.start + dst_rank % (holders.end - holders.start);
            let held = group.heads_of(src_rank, src_tp);
            let count = (held.first + held.count).min(wanted_end) - head;
            shares.push(Share { src_rank, dst_rank, heads: HeadRange { first: head, count } });
            head += count;
        }
    }
    shares
}

/// How a worker spreads its ranks over runtimes: all in one, or one in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Split {
    pub(super) tp_size: u32,
    /// Ranks of each runtime: 1, or all.
    pub(super) held: u32,
}

impl Split {
    pub(super) fn of(layout: &Layout) -> Self {
        let held = layout.held();
        Self { tp_size: layout.geometry().tp_size, held: held.end - held.start }
    }

    pub(super) fn parts(self) -> u32 {
        self.tp_size / self.held
    }

    pub(super) fn part_of(self, rank: u32) -> u32 {
        rank / self.held
    }

    fn ranks_of(self, part: u32) -> Range<u32> {
        part * self.held..(part + 1) * self.held
    }
}

/// Which runtimes of two workers have to do with one another.
#[derive(Debug)]
pub(super) struct Meeting {
    /// For each runtime of decode: the runtimes of prefill that it reads.
    sources: Vec<Vec<u32>>,
    src_parts: u32,
}

impl Meeting {
    pub(super) fn new(groups: &[GroupGeometry], src: Split, dst: Split) -> Self {
        let sources_of = |part| {
            let all = groups.iter().flat_map(|group| shares(group, src.tp_size, dst.tp_size, dst.ranks_of(part)));
            all.map(|share| src.part_of(share.src_rank)).collect::<BTreeSet<u32>>().into_iter().collect()
        };
        Self { sources: (0..dst.parts()).map(sources_of).collect(), src_parts: src.parts() }
    }

    /// The runtimes of prefill that one of decode reads.
    pub(super) fn sources_of(&self, dst_part: u32) -> &[u32] {
        &self.sources[dst_part as usize]
    }

    /// The runtimes of decode that read one of prefill.
    pub(super) fn readers_of(&self, src_part: u32) -> Vec<u32> {
        let reads = |part: &u32| self.sources[*part as usize].contains(&src_part);
        (0..self.dst_parts()).filter(reads).collect()
    }

    /// The runtimes of prefill that nobody reads, and that this one of decode lets go of.
    pub(super) fn released_by(&self, dst_part: u32) -> Vec<u32> {
        let unread = |part: &u32| !self.sources.iter().any(|sources| sources.contains(part));
        (0..self.src_parts).filter(|part| part % self.dst_parts() == dst_part).filter(unread).collect()
    }

    fn dst_parts(&self) -> u32 {
        u32::try_from(self.sources.len()).unwrap_or(u32::MAX)
    }
}

/// Heads of held ranks, group by group: those that one pair of runtimes shares, on one side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Scope {
    /// For each group, heads and the rank that holds them. In order; replicas of one head are neighbours.
    pub(super) groups: Vec<Vec<(HeadRange, u32)>>,
}

impl Scope {
    /// How many shares there are, in all groups.
    pub(super) fn len(&self) -> usize {
        self.groups.iter().map(Vec::len).sum()
    }

    /// All that `layout` holds.
    pub(super) fn all(layout: &Layout) -> Self {
        let tp_size = layout.geometry().tp_size;
        Self::new(layout, |group| layout.held().map(|rank| (group.heads_of(rank, tp_size), rank)).collect())
    }

    /// What `src` gives `dst`, as `src` holds it.
    pub(super) fn given(src: &Layout, dst: &Layout) -> Self {
        Self::new(src, |group| shared(group, src, dst).map(|share| (share.heads, share.src_rank)).collect())
    }

    /// What `src` gives `dst`, as `dst` holds it.
    pub(super) fn taken(src: &Layout, dst: &Layout) -> Self {
        Self::new(src, |group| shared(group, src, dst).map(|share| (share.heads, share.dst_rank)).collect())
    }

    fn new(layout: &Layout, heads: impl Fn(&GroupGeometry) -> BTreeSet<(HeadRange, u32)>) -> Self {
        Self { groups: layout.geometry().groups.iter().map(|group| heads(group).into_iter().collect()).collect() }
    }
}

/// The shares between the ranks that two runtimes hold.
pub(super) fn shared<'a>(
    group: &GroupGeometry,
    src: &'a Layout,
    dst: &Layout,
) -> impl Iterator<Item = Share> + use<'a> {
    let all = shares(group, src.geometry().tp_size, dst.geometry().tp_size, dst.held());
    all.into_iter().filter(|share| src.held().contains(&share.src_rank))
}

#[cfg(test)]
mod tests {
    use super::super::testing::Shape;
    use super::super::{Geometry, GroupKind};
    use super::*;

    fn split(tp_size: u32, together: bool) -> Split {
        Split { tp_size, held: if together { tp_size } else { 1 } }
    }

    fn geometry(kv_heads: u32, kind: GroupKind) -> Geometry {
        Shape { kv_heads, mla: kind == GroupKind::Latent, ..Shape::default() }.geometry()
    }

    #[test]
    fn every_rank_of_prefill_is_read_or_let_go_of_once() {
        for (kv_heads, kind) in
            [(4, GroupKind::Heads), (2, GroupKind::Heads), (1, GroupKind::Heads), (1, GroupKind::Latent)]
        {
            let groups = geometry(kv_heads, kind).groups;
            for (src_tp, dst_tp) in [1, 2, 4].into_iter().flat_map(|src| [1, 2, 4, 8].map(|dst| (src, dst))) {
                for (src_together, dst_together) in [(false, false), (false, true), (true, false), (true, true)] {
                    let (src, dst) = (split(src_tp, src_together), split(dst_tp, dst_together));
                    let meeting = Meeting::new(&groups, src, dst);
                    for src_part in 0..src.parts() {
                        let readers = meeting.readers_of(src_part);
                        let frees = |part: &u32| meeting.released_by(*part).contains(&src_part);
                        let freed = (0..dst.parts()).filter(frees).count();
                        assert_eq!(freed, usize::from(readers.is_empty()), "{kv_heads} {kind:?} {src:?} {dst:?}");
                        assert!(readers.iter().all(|part| meeting.sources_of(*part).contains(&src_part)));
                    }
                    assert!((0..dst.parts()).all(|part| !meeting.sources_of(part).is_empty()));
                }
            }
        }
    }

    #[test]
    fn ranks_meet_those_whose_heads_they_need() {
        let met = |kv_heads, kind, src_tp, dst_tp| {
            let meeting = Meeting::new(&geometry(kv_heads, kind).groups, split(src_tp, false), split(dst_tp, false));
            (0..dst_tp).map(|part| (meeting.sources_of(part).to_vec(), meeting.released_by(part))).collect::<Vec<_>>()
        };
        use GroupKind::{Heads, Latent};
        assert_eq!(met(4, Heads, 1, 2), [(vec![0], vec![]), (vec![0], vec![])]);
        assert_eq!(met(4, Heads, 4, 2), [(vec![0, 1], vec![]), (vec![2, 3], vec![])]);
        assert_eq!(met(2, Heads, 4, 2), [(vec![0], vec![2]), (vec![3], vec![1])], "replicas: one is read");
        assert_eq!(met(1, Latent, 4, 2), [(vec![0], vec![2]), (vec![1], vec![3])], "MLA: spread");
        assert_eq!(met(1, Latent, 2, 4), [0, 1, 0, 1].map(|part| (vec![part], vec![])), "MLA: spread");
        assert_eq!(met(2, Heads, 2, 4), [0, 0, 1, 1].map(|part| (vec![part], vec![])));
    }
}
