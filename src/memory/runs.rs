//! Runs of a copy, as they lie in a list.
#![forbid(unsafe_code)]

/// One contiguous copy. Offsets count from wherever source and destination start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub src: u64,
    pub dst: u64,
    pub len: u64,
}

/// Shorter runs are worth looking for rows among them.
const ROWS_BELOW_BYTES: u64 = 8 << 10;
/// Rows of more bytes make two.
pub(super) const ROWS_BYTES_MAX: u64 = 256 << 10;
/// A list of rows is kept if it is so many times as short as that of the runs.
const ROWS_WORTH: usize = 4;

/// Runs of one length, each as far from the one before as that from its own: heads of one token after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rows {
    pub src: u64,
    pub dst: u64,
    /// Of one row. All of them have less than 4 GiB, and so have the steps.
    pub len: u32,
    pub rows: u32,
    pub src_step: u32,
    pub dst_step: u32,
}

impl Rows {
    /// `None`: it is longer than rows may be.
    fn of(run: Run) -> Option<Self> {
        if run.len > ROWS_BYTES_MAX {
            return None;
        }
        Some(Self { src: run.src, dst: run.dst, len: run.len.try_into().ok()?, rows: 1, src_step: 0, dst_step: 0 })
    }

    pub fn bytes(&self) -> u64 {
        u64::from(self.len) * u64::from(self.rows)
    }

    /// The first bytes behind the last row, at both ends.
    pub fn ends(&self) -> (u64, u64) {
        let end = |first: u64, step: u32| {
            first
                .saturating_add(u64::from(self.rows.saturating_sub(1)) * u64::from(step))
                .saturating_add(self.len.into())
        };
        (end(self.src, self.src_step), end(self.dst, self.dst_step))
    }

    /// The runs again.
    pub fn runs(self) -> impl Iterator<Item = Run> {
        (0..u64::from(self.rows)).map(move |row| Run {
            src: self.src + row * u64::from(self.src_step),
            dst: self.dst + row * u64::from(self.dst_step),
            len: self.len.into(),
        })
    }

    /// Takes `run` in as the next row, if it is one.
    fn take(&mut self, run: Run) -> bool {
        let step =
            |first: u64, next: u64| u32::try_from(next.checked_sub(first)?).ok().filter(|step| *step >= self.len);
        let fits = u64::from(self.len) == run.len && self.bytes() + run.len <= ROWS_BYTES_MAX;
        let (Some(src_step), Some(dst_step)) = (step(self.src, run.src), step(self.dst, run.dst)) else { return false };
        if fits && self.rows == 1 {
            (self.rows, self.src_step, self.dst_step) = (2, src_step, dst_step);
            return true;
        }
        let is_next = (u64::from(src_step), u64::from(dst_step))
            == (u64::from(self.rows) * u64::from(self.src_step), u64::from(self.rows) * u64::from(self.dst_step));
        if fits && is_next {
            self.rows += 1;
        }
        fits && is_next
    }
}

/// The same runs, in the same order, as rows, where that is much shorter.
pub fn in_rows(runs: &[Run], bytes: u64) -> Option<Vec<Rows>> {
    let few = runs.len() / ROWS_WORTH;
    if few == 0 || bytes / u64::try_from(runs.len()).ok()? >= ROWS_BELOW_BYTES {
        return None;
    }
    let mut rows: Vec<Rows> = Vec::with_capacity(few);
    for run in runs {
        if rows.last_mut().is_some_and(|last| last.take(*run)) {
            continue;
        }
        if rows.len() == few {
            return None;
        }
        rows.push(Rows::of(*run)?);
    }
    Some(rows)
}

/// Runs that lie one behind the other in memory, without the first `skip` bytes of the first and the last `spare` of the last.
#[derive(Debug, Clone, Copy)]
pub struct RunSlice<'a> {
    pub runs: &'a [Run],
    pub skip: u64,
    pub spare: u64,
}

impl<'a> RunSlice<'a> {
    pub fn whole(runs: &'a [Run]) -> Self {
        Self { runs, skip: 0, spare: 0 }
    }

    /// The runs that are copied.
    pub fn cut(self) -> impl Iterator<Item = Run> + 'a {
        let last = self.runs.len().saturating_sub(1);
        self.runs.iter().enumerate().map(move |(index, run)| self.cut_one(*run, index == 0, index == last))
    }

    /// The first run and the last, cut, and those between as they are.
    pub(super) fn split(self) -> (Option<Run>, &'a [Run], Option<Run>) {
        match self.runs {
            [] => (None, &[], None),
            [only] => (Some(self.cut_one(*only, true, true)), &[], None),
            [first, between @ .., last] => {
                (Some(self.cut_one(*first, true, false)), between, Some(self.cut_one(*last, false, true)))
            }
        }
    }

    fn cut_one(self, run: Run, is_first: bool, is_last: bool) -> Run {
        let skip = if is_first { self.skip } else { 0 };
        let spare = if is_last { self.spare } else { 0 };
        Run { src: run.src + skip, dst: run.dst + skip, len: run.len - skip - spare }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(at: u64, len: u64) -> Run {
        Run { src: at, dst: 2 * at, len }
    }

    #[test]
    fn runs_at_equal_distances_are_rows_and_the_same_runs_again() {
        let heads =
            |at: u64| (0..16).map(move |token| Run { src: at + token * 2048, dst: 7 * at + token * 1024, len: 1024 });
        let blocks = [0, 3 << 20, 1 << 20, 5 << 30].map(heads);
        let runs: Vec<Run> = blocks.into_iter().flatten().collect();
        let bytes = runs.iter().map(|run| run.len).sum();
        let rows = in_rows(&runs, bytes).expect("a quarter as many");
        assert_eq!((rows.len(), rows[0].rows, rows[0].src_step, rows[0].dst_step), (4, 16, 2048, 1024));
        assert_eq!(rows.iter().flat_map(|rows| rows.runs()).collect::<Vec<_>>(), runs);
        assert_eq!(rows[3].ends(), (runs[63].src + 1024, runs[63].dst + 1024));
        assert_eq!(rows.iter().map(Rows::bytes).sum::<u64>(), bytes);
        // Neither backwards nor one over the other, nor what is hardly shorter, nor what is long anyway.
        let back: Vec<Run> = runs.iter().rev().copied().collect();
        assert_eq!(in_rows(&back, bytes), None);
        let over: Vec<Run> = (0..64).map(|at| Run { src: at * 512, dst: at * 1024, len: 1024 }).collect();
        assert_eq!(in_rows(&over, 64 << 10), None);
        let pairs: Vec<Run> = runs.chunks(16).flat_map(|block| [block[0], block[1]]).collect();
        assert_eq!(in_rows(&pairs, 8 << 10), None);
        assert_eq!((in_rows(&runs, 64 * ROWS_BELOW_BYTES), in_rows(&[], 0)), (None, None));
        // Nor where one is too long to be a row.
        let mut mixed = runs.clone();
        mixed.push(Run { src: 6 << 30, dst: 6 << 30, len: ROWS_BYTES_MAX + 1 });
        assert_eq!(in_rows(&mixed, bytes + ROWS_BYTES_MAX + 1), None);
        *mixed.last_mut().unwrap() = Run { src: 6 << 30, dst: 6 << 30, len: ROWS_BYTES_MAX };
        assert_eq!(in_rows(&mixed, bytes + ROWS_BYTES_MAX).map(|rows| rows.len()), Some(5));
    }

    #[test]
    fn rows_of_many_bytes_are_cut() {
        let runs: Vec<Run> = (0..1000).map(|at| Run { src: at * 8192, dst: at * 4096, len: 4096 }).collect();
        let rows = in_rows(&runs, 1000 * 4096).unwrap();
        assert!(rows.iter().all(|rows| rows.bytes() <= ROWS_BYTES_MAX));
        assert_eq!(rows.iter().flat_map(|rows| rows.runs()).collect::<Vec<_>>(), runs);
    }

    #[test]
    fn the_first_and_the_last_are_cut_whichever_way_they_are_asked_for() {
        let runs = [run(10, 5), run(20, 5), run(30, 5)];
        for (count, want) in [
            (0, vec![]),
            (1, vec![Run { src: 12, dst: 22, len: 2 }]),
            (2, vec![Run { src: 12, dst: 22, len: 3 }, Run { src: 20, dst: 40, len: 4 }]),
            (3, vec![Run { src: 12, dst: 22, len: 3 }, run(20, 5), Run { src: 30, dst: 60, len: 4 }]),
        ] {
            let slice = RunSlice { runs: &runs[..count], skip: 2, spare: 1 };
            assert_eq!(slice.cut().collect::<Vec<_>>(), want);
            let (first, between, last) = slice.split();
            let split: Vec<_> = first.iter().chain(between).chain(&last).copied().collect();
            assert_eq!(split, want);
        }
    }
}
