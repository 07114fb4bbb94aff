//! Two reports held against each other: what got slower or faster by more than noise.
//!
//! A figure has changed when all of these are so: the medians differ by more than the tolerance; the boxes from the 25th to the
//! 75th percentile do not touch; and where the same run measured what the machine takes for it without pdlink (a ceiling, a
//! relay, a server without PD), the figure has changed by more than the tolerance against that, too. Anything less is noise, or
//! another machine. With `again`, further reports of what the first one
//! measured, the first side is the range over all of them: how much two runs of one build differ is then measured, too.

use std::collections::BTreeMap;

use serde::Serialize;

use super::report::{Figure, Report, Unit};
use super::table::Table;

/// Fewer samples say nothing of their noise.
pub const SAMPLES_MIN: usize = 5;

/// What became of one figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Slower,
    Faster,
    /// Beyond the tolerance, but with too few samples to tell from noise.
    Unsure,
    /// Changed, but nothing of pdlink is in it: the machine has.
    Machine,
    Same,
}

/// One figure of both.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    pub name: String,
    pub unit: Unit,
    pub before: f64,
    pub after: f64,
    /// Of the median, of what it was: -0.1 is a tenth less.
    pub change: f64,
    pub verdict: Verdict,
}

/// All that two reports have in common, and what they have not.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    pub tolerance: f64,
    pub lines: Vec<Line>,
    /// Figures of the first that the second lacks.
    pub gone: Vec<String>,
    pub new: Vec<String>,
    /// What makes the two hard to compare.
    pub warnings: Vec<String>,
}

/// One side of a figure: the range of its medians, and of its boxes.
#[derive(Debug, Clone, Copy)]
struct Side {
    medians: [f64; 2],
    inner: [f64; 2],
    /// Of the medians as parts of their controls.
    relative: Option<[f64; 2]>,
    samples: usize,
}

impl Side {
    fn of(figure: &Figure) -> Self {
        let spread = figure.spread;
        let relative = figure.control.map(|control| [spread.median / control; 2]);
        Self { medians: [spread.median; 2], inner: [spread.p25, spread.p75], relative, samples: spread.count }
    }

    fn or(self, other: Self) -> Self {
        let range = |one: [f64; 2], other: [f64; 2]| [one[0].min(other[0]), one[1].max(other[1])];
        Self {
            medians: range(self.medians, other.medians),
            inner: range(self.inner, other.inner),
            relative: self.relative.zip(other.relative).map(|(one, other)| range(one, other)),
            samples: self.samples.min(other.samples),
        }
    }
}

/// Holds `after` against `before`, and against what measured the same as `before` again.
pub fn compare(before: &Report, again: &[Report], after: &Report, tolerance: f64) -> Comparison {
    let mut sides: BTreeMap<String, Side> = BTreeMap::new();
    for figure in again.iter().flat_map(Report::figures) {
        let side = Side::of(&figure);
        sides.entry(figure.name).and_modify(|known| *known = known.or(side)).or_insert(side);
    }
    let after_by_name: BTreeMap<String, Figure> =
        after.figures().into_iter().map(|figure| (figure.name.clone(), figure)).collect();
    let (mut lines, mut gone, mut known) = (Vec::new(), Vec::new(), Vec::new());
    for figure in before.figures() {
        known.push(figure.name.clone());
        let Some(other) = after_by_name.get(&figure.name) else {
            gone.push(figure.name);
            continue;
        };
        let side = Side::of(&figure);
        let side = sides.get(&figure.name).map_or(side, |more| side.or(*more));
        lines.push(line(&figure, side, other, tolerance));
    }
    let new = after_by_name.into_keys().filter(|name| !known.contains(name)).collect();
    Comparison { tolerance, lines, gone, new, warnings: warnings(before, after) }
}

fn line(before: &Figure, side: Side, after: &Figure, tolerance: f64) -> Line {
    let (was, is, now) = (before.spread.median, after.spread.median, Side::of(after));
    let leaves =
        |[low, high]: [f64; 2], value: f64| (value > high * (1.0 + tolerance), value < low * (1.0 - tolerance));
    let (mut grown, mut shrunk) = leaves(side.medians, is);
    if let (Some(range), Some([value, _])) = (side.relative, now.relative) {
        let against_control = leaves(range, value);
        (grown, shrunk) = (grown && against_control.0, shrunk && against_control.1);
    }
    let apart = now.inner[0] > side.inner[1] || now.inner[1] < side.inner[0];
    let verdict = match (grown || shrunk, side.samples.min(now.samples) < SAMPLES_MIN) {
        (false, _) => Verdict::Same,
        (true, true) => Verdict::Unsure,
        (true, false) if !apart => Verdict::Same,
        (true, false) if before.is_machine => Verdict::Machine,
        (true, false) if grown == before.unit.grows_better() => Verdict::Faster,
        (true, false) => Verdict::Slower,
    };
    let change = if was == 0.0 { 0.0 } else { is / was - 1.0 };
    Line { name: before.name.clone(), unit: before.unit, before: was, after: is, change, verdict }
}

fn warnings(before: &Report, after: &Report) -> Vec<String> {
    let (one, other) = (&before.environment, &after.environment);
    let mut warnings = Vec::new();
    let mut differ = |what: &str, one: String, other: String| {
        if one != other {
            warnings.push(format!("{what}: {one} before, {other} after"));
        }
    };
    differ("processor", format!("{}, {} cores", one.cpu, one.cores), format!("{}, {} cores", other.cpu, other.cores));
    differ("GPUs", one.gpus.join(", "), other.gpus.join(", "));
    differ("kernel", one.kernel.clone(), other.kernel.clone());
    differ("variables", format!("{:?}", one.variables), format!("{:?}", other.variables));
    for (environment, when) in [(one, "before"), (other, "after")] {
        warnings.extend(environment.warnings().into_iter().map(|warning| format!("{when}: {warning}")));
    }
    warnings
}

impl Comparison {
    pub fn count(&self, verdict: Verdict) -> usize {
        self.lines.iter().filter(|line| line.verdict == verdict).count()
    }
}

impl std::fmt::Display for Comparison {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for warning in &self.warnings {
            writeln!(f, "careful: {warning}")?;
        }
        let mut table = Table::new(&["verdict", "figure", "unit", "before", "after", "change"], 3);
        let mut changed: Vec<&Line> = self.lines.iter().filter(|line| line.verdict != Verdict::Same).collect();
        changed.sort_by(|one, other| {
            one.verdict.cmp(&other.verdict).then(other.change.abs().total_cmp(&one.change.abs()))
        });
        for line in &changed {
            let verdict = match line.verdict {
                Verdict::Slower => "slower",
                Verdict::Faster => "faster",
                Verdict::Unsure => "unsure",
                Verdict::Machine => "machine",
                Verdict::Same => "same",
            };
            let mut cells = vec![verdict.to_owned(), line.name.clone(), line.unit.name().to_owned()];
            cells.extend([line.before, line.after].map(|value| format!("{value:.2}")));
            cells.push(format!("{:+.1} %", line.change * 100.0));
            table.row(cells);
        }
        if !changed.is_empty() {
            write!(f, "{table}")?;
        }
        for (what, names) in [("not measured any more", &self.gone), ("new", &self.new)] {
            if !names.is_empty() {
                writeln!(f, "{what}: {} figures, such as {}", names.len(), names[0])?;
            }
        }
        let count = |verdict| self.count(verdict);
        writeln!(
            f,
            "{} figures: {} slower, {} faster, {} unsure, {} of the machine itself, {} within noise (tolerance {:.0} %)",
            self.lines.len(),
            count(Verdict::Slower),
            count(Verdict::Faster),
            count(Verdict::Unsure),
            count(Verdict::Machine),
            count(Verdict::Same),
            self.tolerance * 100.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Samples;

    fn figure(unit: Unit, values: &[f64]) -> Figure {
        let spread = values.iter().copied().collect::<Samples>().spread().expect("samples");
        Figure::new("one".to_owned(), unit, spread)
    }

    fn judge(unit: Unit, before: &[f64], after: &[f64]) -> Verdict {
        let before = figure(unit, before);
        line(&before, Side::of(&before), &figure(unit, after), 0.05).verdict
    }

    #[test]
    fn a_change_counts_beyond_the_tolerance_and_outside_the_boxes() {
        let steady = [100.0, 101.0, 99.0, 100.0, 100.0, 102.0, 98.0];
        let by = |factor: f64| steady.map(|value| value * factor);
        assert_eq!(judge(Unit::Microseconds, &steady, &by(1.2)), Verdict::Slower);
        assert_eq!(judge(Unit::Microseconds, &steady, &by(0.8)), Verdict::Faster);
        assert_eq!(judge(Unit::GigabytesPerSecond, &steady, &by(1.2)), Verdict::Faster);
        assert_eq!(judge(Unit::GigabytesPerSecond, &steady, &by(0.8)), Verdict::Slower);
        assert_eq!(judge(Unit::Microseconds, &steady, &by(1.04)), Verdict::Same, "within the tolerance");
    }

    #[test]
    fn noise_is_no_change() {
        let noisy = [60.0, 80.0, 100.0, 120.0, 140.0];
        let later = noisy.map(|value| value * 1.2);
        assert_eq!(judge(Unit::Microseconds, &noisy, &later), Verdict::Same, "the boxes touch");
        let one_spike = [100.0, 100.0, 101.0, 100.0, 900.0, 100.0, 99.0];
        assert_eq!(judge(Unit::Microseconds, &[100.0; 7], &one_spike), Verdict::Same, "a spike moves no median");
        assert_eq!(judge(Unit::Microseconds, &[100.0; 3], &[150.0; 3]), Verdict::Unsure, "too few samples");
    }

    #[test]
    fn a_figure_that_moves_with_its_control_has_met_another_machine() {
        let at = |median: f64, control: f64| figure(Unit::GigabytesPerSecond, &[median; 6]).beside(Some(control));
        let judge = |before: &Figure, after: &Figure| line(before, Side::of(before), after, 0.05).verdict;
        assert_eq!(judge(&at(10.0, 20.0), &at(5.0, 10.0)), Verdict::Same, "half as fast as all else");
        assert_eq!(judge(&at(10.0, 20.0), &at(5.0, 20.0)), Verdict::Slower);
        assert_eq!(judge(&at(10.0, 20.0), &at(10.0, 10.0)), Verdict::Same, "only the control has moved");
        let machine = |median: f64| figure(Unit::GigabytesPerSecond, &[median; 6]).of_machine(true);
        assert_eq!(judge(&machine(10.0), &machine(5.0)), Verdict::Machine);
    }

    #[test]
    fn what_two_runs_of_one_build_differ_by_is_noise() {
        let unit = Unit::Microseconds;
        let (first, again, after) = (figure(unit, &[100.0; 6]), figure(unit, &[130.0; 6]), figure(unit, &[128.0; 6]));
        assert_eq!(line(&first, Side::of(&first), &after, 0.05).verdict, Verdict::Slower);
        let side = Side::of(&first).or(Side::of(&again));
        assert_eq!(line(&first, side, &after, 0.05).verdict, Verdict::Same);
        assert_eq!(line(&first, side, &figure(unit, &[150.0; 6]), 0.05).verdict, Verdict::Slower);
    }
}
