//! Runs of a copy, as they lie in a list.
#![forbid(unsafe_code)]

/// One contiguous copy. Offsets count from wherever source and destination start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub src: u64,
    pub dst: u64,
    pub len: u64,
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
