//! What one transfer copies: (source, destination, length) runs, grouped by the pair of regions they lie in.
#![forbid(unsafe_code)]

use super::{End, TransportError};

/// One contiguous copy. Offsets count from the start of the segment's regions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub src: u64,
    pub dst: u64,
    pub len: u64,
}

/// All runs between one source region and one destination region. One segment is one post.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Segment {
    pub src_region: u16,
    pub dst_region: u16,
    pub runs: Vec<Run>,
}

/// The whole copy.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunList {
    pub segments: Vec<Segment>,
}

/// A part of one segment: `bytes` bytes, from `skip` bytes into run number `run` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    pub segment: usize,
    pub run: usize,
    pub skip: u64,
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

impl RunList {
    /// Bytes that all runs move together.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().flat_map(|segment| &segment.runs).map(|run| run.len).sum()
    }

    /// Number of runs.
    pub fn runs(&self) -> usize {
        self.segments.iter().map(|segment| segment.runs.len()).sum()
    }

    /// Holds every run against the lengths of the regions it names, and adds the list up. All of it, before any byte moves.
    pub fn validate(&self, src_lens: &[u64], dst_lens: &[u64]) -> Result<Totals, TransportError> {
        let mut totals = Totals::default();
        for segment in &self.segments {
            let src_len = region_len(End::Source, segment.src_region, src_lens)?;
            let dst_len = region_len(End::Destination, segment.dst_region, dst_lens)?;
            let (mut bytes, mut runs, mut fits) = (0_u64, 0_u64, true);
            // There are many thousand runs, nothing moves before all were seen, and hardly ever is one wrong: so without a branch
            // for each.
            for run in &segment.runs {
                fits &= inside(run.src, run.len, src_len) & inside(run.dst, run.len, dst_len);
                let (sum, over) = bytes.overflowing_add(run.len);
                (bytes, fits) = (sum, fits & !over);
                runs += u64::from(run.len > 0);
            }
            if !fits {
                return Err(segment.what_does_not_fit(src_len, dst_len));
            }
            totals.bytes = totals.bytes.checked_add(bytes).ok_or(TransportError::TooManyBytes)?;
            totals.runs += runs;
            totals.posts += u64::from(bytes > 0);
        }
        Ok(totals)
    }

    /// Holds the destination of every run against the lengths of our regions: what a grant needs.
    pub fn validate_destinations(&self, dst_lens: &[u64]) -> Result<(), TransportError> {
        for segment in &self.segments {
            let dst_len = region_len(End::Destination, segment.dst_region, dst_lens)?;
            for run in &segment.runs {
                hold(End::Destination, segment.dst_region, run.dst, run.len, dst_len)?;
            }
        }
        Ok(())
    }

    /// Cuts the list into pieces of at most `bytes_max` bytes and `runs_max` runs, in order and without rest. A long run
    /// is cut, short runs share a piece, so that threads get even work whatever the runs look like.
    pub fn pieces(&self, bytes_max: u64, runs_max: usize) -> Vec<Piece> {
        assert!(bytes_max > 0 && runs_max > 0, "a piece holds something");
        let mut pieces = Vec::new();
        for (segment, runs) in self.segments.iter().map(|segment| &segment.runs).enumerate() {
            let bytes = runs.iter().fold(0_u64, |sum, run| sum.saturating_add(run.len));
            if bytes <= bytes_max && runs.len() <= runs_max {
                pieces.extend((bytes > 0).then_some(Piece { segment, run: 0, skip: 0, bytes }));
                continue;
            }
            let mut open: Option<(Piece, usize)> = None;
            for (index, run) in runs.iter().enumerate().filter(|(_, run)| run.len > 0) {
                let mut skip = 0;
                while skip < run.len {
                    let new = || (Piece { segment, run: index, skip, bytes: 0 }, 0);
                    let (mut piece, mut count) = open.take().unwrap_or_else(new);
                    let take = (run.len - skip).min(bytes_max - piece.bytes);
                    piece.bytes += take;
                    count += 1;
                    skip += take;
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

    /// The runs of `piece`, cut where it starts and ends.
    pub fn walk(&self, piece: Piece) -> impl Iterator<Item = Run> + '_ {
        let runs = &self.segments[piece.segment].runs[piece.run..];
        let (mut skip, mut left) = (piece.skip, piece.bytes);
        runs.iter().filter(|run| run.len > 0).map_while(move |run| {
            if left == 0 {
                return None;
            }
            let len = (run.len - skip).min(left);
            let part = Run { src: run.src + skip, dst: run.dst + skip, len };
            skip = 0;
            left -= len;
            Some(part)
        })
    }
}

fn region_len(end: End, region: u16, lens: &[u64]) -> Result<u64, TransportError> {
    lens.get(usize::from(region)).copied().ok_or(TransportError::UnknownRegion { end, region, regions: lens.len() })
}

impl Segment {
    /// Says which run it is.
    fn what_does_not_fit(&self, src_len: u64, dst_len: u64) -> TransportError {
        let wrong = self.runs.iter().find_map(|run| {
            let source = hold(End::Source, self.src_region, run.src, run.len, src_len);
            source.and_then(|()| hold(End::Destination, self.dst_region, run.dst, run.len, dst_len)).err()
        });
        wrong.unwrap_or(TransportError::TooManyBytes)
    }
}

/// Whether `len` bytes at `offset` lie in a region of `region_len`.
fn inside(offset: u64, len: u64, region_len: u64) -> bool {
    (offset <= region_len) & (len <= region_len.wrapping_sub(offset))
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
        RunList { segments: vec![Segment { src_region: 0, dst_region: 0, runs }] }
    }

    #[test]
    fn runs_are_held_to_their_regions_at_both_ends() {
        assert_eq!(
            list(&[(0, 8, 4), (12, 0, 0), (8, 12, 4)]).validate(&[12], &[16]).unwrap(),
            Totals { bytes: 8, runs: 2, posts: 1 }
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
                Segment { src_region: u16::try_from(index).unwrap(), dst_region: 0, runs }
            }).collect();
            let list = RunList { segments };
            let pieces = list.pieces(bytes_max, runs_max);
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
