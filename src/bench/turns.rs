//! How long each line of a table is measured: in parts, with all other lines between them, until the time of all of them is gone.

use std::time::{Duration, Instant};

/// Every line is measured in so many parts: what drifts, drifts into its spread.
const PARTS: usize = 3;
/// Rounds of each part that count, at the least: together one more than `compare` asks for.
const ROUNDS_MIN: usize = 2;
/// Part of its own time that a line is measured for, however much others took.
const SHARE_MIN: f64 = 0.1;

/// Calls `round` with the number of a line, many times for each, and whether the round counts: the first of each part only warms
/// up. Together they take `seconds` for each line, but every line has its rounds. A line whose rounds take longer than that
/// has it from the others, so the lines are to come from the shortest to the longest.
pub(super) fn in_turns(
    lines: usize,
    seconds: f64,
    mut round: impl FnMut(usize, bool) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (started, turns) = (Instant::now(), lines * PARTS);
    for turn in 0..turns {
        // The longest first: what they took is known when it is the others' turn.
        let line = lines - 1 - turn % lines;
        let until = Instant::now() + share(seconds, turns, turn, started.elapsed());
        round(line, false)?;
        let mut counted = 0;
        while counted < ROUNDS_MIN || Instant::now() < until {
            round(line, true)?;
            counted += 1;
        }
    }
    Ok(())
}

/// What one turn may take of what all before it have left.
fn share(seconds: f64, turns: usize, turn: usize, gone: Duration) -> Duration {
    let own = seconds / PARTS as f64;
    let left = (own * turns as f64 - gone.as_secs_f64()) / (turns - turn) as f64;
    Duration::from_secs_f64(left.max(own * SHARE_MIN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_its_rounds_in_parts_however_little_time_there_is() {
        let mut calls = Vec::new();
        in_turns(2, 0.0, |line, counts| {
            calls.push((line, counts));
            Ok(())
        })
        .expect("rounds");
        let part = [(1, false), (1, true), (1, true), (0, false), (0, true), (0, true)];
        assert_eq!(calls, part.repeat(PARTS));
        const { assert!(PARTS * ROUNDS_MIN > super::super::compare::SAMPLES_MIN) };
        assert!(in_turns(0, 1.0, |_, _| anyhow::bail!("no line")).is_ok());
        assert!(in_turns(1, 1.0, |_, _| anyhow::bail!("broken")).is_err(), "it ends with the first that fails");
    }

    #[test]
    fn what_one_line_takes_too_much_the_others_have_less() {
        let at = |turn, gone| share(3.0, 6, turn, Duration::from_secs_f64(gone)).as_secs_f64();
        assert_eq!((at(0, 0.0), at(3, 3.0)), (1.0, 1.0));
        assert_eq!((at(1, 3.5), at(5, 4.0)), (0.5, 2.0));
        assert_eq!((at(1, 6.0), at(5, 600.0)), (0.1, 0.1), "some time in any case");
    }
}
