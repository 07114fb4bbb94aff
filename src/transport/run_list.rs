//! What one transfer copies: (source, destination, length) runs, grouped by the pair of regions they lie in.
#![forbid(unsafe_code)]

use std::ops::Deref;
use std::sync::Arc;

use super::{End, TransportError};
// Offsets of a run count from the start of its segment's regions.
pub use crate::memory::Run;
use crate::memory::{Rows, RunSlice, in_rows, to_u64};

/// All runs between one source region and one destination region. One segment is one post.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Segment {
    pub src_region: u16,
    pub dst_region: u16,
    /// Shared by segments that differ in their regions alone: layers, mostly.
    pub runs: Arc<Runs>,
}

/// The whole copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunList {
    pub segments: Vec<Segment>,
}

/// A part of one segment: runs `first..end`, without the first `skip` bytes of the first and the last `spare` of the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub segment: usize,
    first: usize,
    end: usize,
    skip: u64,
    spare: u64,
    pub bytes: u64,
}

/// What a valid run list adds up to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    pub bytes: u64,
    /// Runs with at least one byte.
    pub runs: u64,
    /// Segments with at least one byte.
    pub posts: u64,
}

/// A valid run list, added up.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sums {
    pub totals: Totals,
    /// Bytes of each segment.
    pub segments: Vec<u64>,
}

impl RunList {
    /// Bytes that all runs move together.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().flat_map(|segment| segment.runs.iter()).map(|run| run.len).sum()
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.segments.iter().map(|segment| segment.runs.len()).sum()
    }

    /// Holds every run against the lengths of the regions it names, and adds the list up. All of it, before any byte moves.
    pub fn validate(&self, src_lens: &[u64], dst_lens: &[u64]) -> Result<Sums, TransportError> {
        let mut sums = Sums::default();
        for segment in &self.segments {
            let src_len = region_len(End::Source, segment.src_region, src_lens)?;
            let dst_len = region_len(End::Destination, segment.dst_region, dst_lens)?;
            let (bytes, runs) = segment.sums(src_len, dst_len)?;
            let totals = &mut sums.totals;
            totals.bytes = totals.bytes.checked_add(bytes).ok_or(TransportError::TooManyBytes)?;
            totals.runs += runs;
            totals.posts += u64::from(bytes > 0);
            sums.segments.push(bytes);
        }
        Ok(sums)
    }

    /// Holds the destination of every run against the lengths of our regions: what a grant needs.
    pub fn validate_destinations(&self, dst_lens: &[u64]) -> Result<(), TransportError> {
        for segment in &self.segments {
            segment.check_destination(region_len(End::Destination, segment.dst_region, dst_lens)?)?;
        }
        Ok(())
    }

    /// Cuts the list into pieces of at most `bytes_max` bytes and `runs_max` runs, in order and without rest. A long run
    /// is cut, short runs share a piece, so that threads get even work whatever the runs look like. `sums` are this list's.
    pub fn pieces(&self, sums: &Sums, bytes_max: u64, runs_max: usize) -> Vec<Piece> {
        assert!(bytes_max > 0 && runs_max > 0, "a piece holds something");
        let mut pieces = Vec::new();
        for (segment, (runs, bytes)) in
            self.segments.iter().map(|segment| &segment.runs).zip(&sums.segments).enumerate()
        {
            let bytes = *bytes;
            if bytes <= bytes_max && runs.len() <= runs_max {
                let whole = Piece { segment, first: 0, end: runs.len(), skip: 0, spare: 0, bytes };
                pieces.extend((bytes > 0).then_some(whole));
                continue;
            }
            let mut open: Option<(Piece, usize)> = None;
            for (index, run) in runs.iter().enumerate().filter(|(_, run)| run.len > 0) {
                let mut skip = 0;
                while skip < run.len {
                    let new = || (Piece { segment, first: index, end: index, skip, spare: 0, bytes: 0 }, 0);
                    let (mut piece, mut count) = open.take().unwrap_or_else(new);
                    let take = (run.len - skip).min(bytes_max - piece.bytes);
                    piece.bytes += take;
                    count += 1;
                    skip += take;
                    (piece.end, piece.spare) = (index + 1, run.len - skip);
                    if piece.bytes == bytes_max || count == runs_max {
                        pieces.push(piece);
                    } else {
                        open = Some((piece, count));
                    }
                }
            }
            pieces.extend(open.map(|(piece, _)| piece));
        }
        pieces
    }

    /// The runs of `piece` as they stand in the list, with what it leaves out of the first and the last.
    pub fn slice(&self, piece: Piece) -> RunSlice<'_> {
        let runs = &self.segments[piece.segment].runs[piece.first..piece.end];
        RunSlice { runs, skip: piece.skip, spare: piece.spare }
    }

    /// The same as rows, if somebody has found them to be much fewer.
    pub fn rows(&self, piece: Piece) -> Option<&[Rows]> {
        let runs = &self.segments[piece.segment].runs;
        let is_whole = (piece.first, piece.end, piece.skip, piece.spare) == (0, runs.len(), 0, 0);
        runs.rows.as_deref().filter(|_| is_whole)
    }

    /// The runs of `piece`, cut where it starts and ends.
    pub fn walk(&self, piece: Piece) -> impl Iterator<Item = Run> + '_ {
        self.slice(piece).cut().filter(|run| run.len > 0)
    }
}

fn region_len(end: End, region: u16, lens: &[u64]) -> Result<u64, TransportError> {
    lens.get(usize::from(region)).copied().ok_or(TransportError::UnknownRegion { end, region, regions: lens.len() })
}

impl Segment {
    pub fn new(src_region: u16, dst_region: u16, runs: Vec<Run>) -> Self {
        Self { src_region, dst_region, runs: Arc::new(Runs::new(runs)) }
    }

    /// Bytes, and runs with at least one, if all lie inside both regions.
    fn sums(&self, src_len: u64, dst_len: u64) -> Result<(u64, u64), TransportError> {
        match self.runs.reach {
            Reach { src_end, dst_end, bytes, runs, exact: true } if src_end <= src_len && dst_end <= dst_len => {
                Ok((bytes, runs))
            }
            _ => self.sums_one_by_one(src_len, dst_len),
        }
    }

    /// As [`Segment::sums`], and says which run does not fit.
    fn sums_one_by_one(&self, src_len: u64, dst_len: u64) -> Result<(u64, u64), TransportError> {
        let (mut bytes, mut runs) = (0_u64, 0);
        for run in self.runs.iter() {
            hold(End::Source, self.src_region, run.src, run.len, src_len)?;
            hold(End::Destination, self.dst_region, run.dst, run.len, dst_len)?;
            bytes = bytes.checked_add(run.len).ok_or(TransportError::TooManyBytes)?;
            runs += u64::from(run.len > 0);
        }
        Ok((bytes, runs))
    }

    /// Whether every run ends inside its destination.
    fn check_destination(&self, dst_len: u64) -> Result<(), TransportError> {
        let Reach { dst_end, exact, .. } = self.runs.reach;
        if exact && dst_end <= dst_len {
            return Ok(());
        }
        self.runs.iter().try_for_each(|run| hold(End::Destination, self.dst_region, run.dst, run.len, dst_len))
    }
}

/// Runs, and how far they reach: worked out once, when they are made, however often they are copied.
///
/// There are many thousand, nothing moves before all were seen, and hardly ever is one wrong: so their outermost ends are kept,
/// and each is looked at by itself only where those do not fit.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Runs {
    list: Vec<Run>,
    reach: Reach,
    /// The same as rows, where that is much shorter.
    rows: Option<Vec<Rows>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Reach {
    bytes: u64,
    /// With at least one byte.
    runs: u64,
    src_end: u64,
    dst_end: u64,
    /// Whether none of these numbers has overflowed.
    exact: bool,
}

impl Runs {
    pub fn new(list: Vec<Run>) -> Self {
        let (mut bytes, mut runs, mut src_end, mut dst_end, mut bits) = (0_u64, 0, 0, 0, 0);
        for run in &list {
            bits |= run.src | run.dst | run.len;
            src_end = src_end.max(run.src.wrapping_add(run.len));
            dst_end = dst_end.max(run.dst.wrapping_add(run.len));
            bytes = bytes.wrapping_add(run.len);
            runs += u64::from(run.len > 0);
        }
        // No number is greater than all bits together: if so many of that do not overflow, neither did an end or the sum.
        let exact = bits.checked_mul(to_u64(list.len()).max(2)).is_some();
        let rows = in_rows(&list, bytes).filter(|_| exact);
        Self { list, reach: Reach { bytes, runs, src_end, dst_end, exact }, rows }
    }
}

impl Deref for Runs {
    type Target = [Run];

    fn deref(&self) -> &[Run] {
        &self.list
    }
}

fn hold(end: End, region: u16, offset: u64, len: u64, region_len: u64) -> Result<(), TransportError> {
    match offset.checked_add(len) {
        Some(last) if last <= region_len => Ok(()),
        _ => Err(TransportError::OutOfRange { end, region, offset, len, region_len }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(runs: &[(u64, u64, u64)]) -> RunList {
        let runs = runs.iter().map(|&(src, dst, len)| Run { src, dst, len }).collect();
        RunList { segments: vec![Segment::new(0, 0, runs)] }
    }

    #[test]
    fn runs_are_held_to_their_regions_at_both_ends() {
        assert_eq!(
            list(&[(0, 8, 4), (12, 0, 0), (8, 12, 4)]).validate(&[12], &[16]).unwrap(),
            Sums { totals: Totals { bytes: 8, runs: 2, posts: 1 }, segments: vec![8] }
        );
        let refused = |runs: &[(u64, u64, u64)]| list(runs).validate(&[12], &[16]).unwrap_err().to_string();
        assert_eq!(refused(&[(0, 0, 1), (9, 0, 4)]), "source bytes 9..9+4 lie outside region 0 of 12 bytes");
        assert_eq!(refused(&[(0, 13, 4)]), "destination bytes 13..13+4 lie outside region 0 of 16 bytes");
        assert_eq!(
            refused(&[(u64::MAX, 0, 2)]),
            format!("source bytes {0}..{0}+2 lie outside region 0 of 12 bytes", u64::MAX)
        );
        assert_eq!(refused(&[(13, 0, 0)]), "source bytes 13..13+0 lie outside region 0 of 12 bytes");
        assert_eq!(
            list(&[(0, 0, 1)]).validate(&[12], &[]).unwrap_err().to_string(),
            "destination region 0 does not exist: 0 are registered"
        );
    }

    #[test]
    fn segments_that_share_their_runs_are_each_held_to_their_own_regions() {
        let first = Segment::new(0, 0, vec![Run { src: 4, dst: 8, len: 4 }]);
        let with = |src_region, dst_region| Segment { src_region, dst_region, ..first.clone() };
        let list = RunList { segments: vec![first.clone(), with(1, 1), with(2, 2)] };
        let sums = list.validate(&[8, 8, 9], &[12, 12, 12]).unwrap();
        assert_eq!((sums.totals, sums.segments), (Totals { bytes: 12, runs: 3, posts: 3 }, vec![4; 3]));
        for (src, dst) in [([8, 7, 9], [12; 3]), ([8, 8, 7], [12; 3]), ([8; 3], [12, 12, 11])] {
            assert!(list.validate(&src, &dst).is_err(), "{src:?} {dst:?}");
        }
        assert!(
            list.validate_destinations(&[12, 12, 12]).is_ok() && list.validate_destinations(&[12, 12, 11]).is_err()
        );
    }

    #[test]
    fn more_bytes_than_a_number_holds_are_refused_not_wrapped() {
        let whole = (0, 0, u64::MAX);
        let refused = list(&[whole, whole]).validate(&[u64::MAX], &[u64::MAX]);
        assert!(matches!(refused, Err(TransportError::TooManyBytes)), "{refused:?}");
    }

    proptest! {
        #[test]
        fn pieces_are_the_list_again(
            lens in prop::collection::vec(prop::collection::vec(0_u64..40, 0..30), 0..4),
            bytes_max in 1_u64..50,
            runs_max in 1_usize..6,
        ) {
            let mut at = 0;
            let segments = lens.iter().enumerate().map(|(index, lens)| {
                let runs = lens.iter().map(|&len| { at += len; Run { src: at - len, dst: 3 * at, len } }).collect();
                Segment::new(u16::try_from(index).unwrap(), 0, runs)
            }).collect();
            let list = RunList { segments };
            let lens = vec![1_u64 << 20; list.segments.len().max(1)];
            let sums = list.validate(&lens, &lens).unwrap();
            let pieces = list.pieces(&sums, bytes_max, runs_max);
            let each_byte = |segment: usize, run: Run| (0..run.len).map(move |i| (segment, run.src + i, run.dst + i));
            let want: Vec<_> = list.segments.iter().enumerate()
                .flat_map(|(index, segment)| segment.runs.iter().flat_map(move |run| each_byte(index, *run))).collect();
            let got: Vec<_> = pieces.iter()
                .flat_map(|piece| list.walk(*piece).flat_map(|run| each_byte(piece.segment, run))).collect();
            prop_assert_eq!(got, want);
            for piece in &pieces {
                prop_assert!((1..=bytes_max).contains(&piece.bytes));
                prop_assert!(list.walk(*piece).count() <= runs_max);
            }
        }
    }
}
