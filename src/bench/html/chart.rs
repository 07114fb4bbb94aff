//! Line plots as inline SVG: one panel, two axes, series with a band for their spread. Colours and fonts come from the page.

use maud::{Markup, html};

use crate::bench::table::size;

const WIDTH: f64 = 480.0;
const HEIGHT: f64 = 280.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 46.0;
/// Colours that the page has; further series begin again.
const COLOURS: usize = 8;
/// Labels that fit below a panel.
const LABELS_MAX: usize = 5;

/// What an axis counts, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    /// Sizes, by factors of two.
    Bytes,
    /// Counts, by factors.
    Counts,
    /// Quantities over several decades.
    Decades,
    /// Quantities from 0.
    Linear,
    /// Percent of all, 0 to 100.
    Percent,
}

/// One line.
#[derive(Debug, Clone)]
pub(super) struct Series {
    pub(super) name: String,
    /// Colour, by number; series of one thing share it.
    pub(super) colour: usize,
    /// What something is held against is dashed.
    pub(super) dashed: bool,
    /// From left to right.
    pub(super) points: Vec<Point>,
}

/// One measured place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Where the middle half of the measurements lies.
    pub(super) middle: Option<[f64; 2]>,
}

/// One panel.
#[derive(Debug, Clone)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) note: String,
    pub(super) x: (Scale, &'static str),
    pub(super) y: (Scale, &'static str),
    pub(super) series: Vec<Series>,
}

/// An axis with its range and where values lie on it.
struct Axis {
    scale: Scale,
    from: f64,
    to: f64,
    start: f64,
    end: f64,
}

impl Axis {
    fn of(scale: Scale, values: impl Iterator<Item = f64> + Clone, [start, end]: [f64; 2]) -> Self {
        let (low, high) = (values.clone().fold(f64::INFINITY, f64::min), values.fold(0.0, f64::max));
        let (from, to) = match scale {
            Scale::Linear => (0.0, nice_above(high)),
            Scale::Percent => (0.0, 100.0),
            Scale::Decades => (nice_log(low.max(1e-6), false), nice_log(high.max(1e-6), true)),
            Scale::Bytes | Scale::Counts => (low.max(1.0), high.max(low * 2.0).max(2.0)),
        };
        Self { scale, from, to, start, end }
    }

    fn at(&self, value: f64) -> f64 {
        let part = match self.scale {
            Scale::Linear | Scale::Percent => (value - self.from) / (self.to - self.from),
            Scale::Decades | Scale::Bytes | Scale::Counts => {
                (value.max(self.from) / self.from).ln() / (self.to / self.from).ln()
            }
        };
        self.start + part.clamp(0.0, 1.0) * (self.end - self.start)
    }

    /// Values with a label. `met` are those that were measured.
    fn ticks(&self, met: &[f64]) -> Vec<(f64, String)> {
        match self.scale {
            Scale::Percent => (0..=4).map(|step| (f64::from(step) * 25.0, format!("{}", step * 25))).collect(),
            Scale::Linear => (0..=4).map(|step| self.to / 4.0 * f64::from(step)).map(|at| (at, number(at))).collect(),
            Scale::Decades => self.decades(),
            Scale::Bytes | Scale::Counts => {
                let label = |value: f64| if self.scale == Scale::Bytes { size(whole(value)) } else { number(value) };
                // The first one met, and of the others as many as have room.
                let step = met.len().div_ceil(LABELS_MAX).max(1);
                met.iter().step_by(step).map(|&value| (value, label(value))).collect()
            }
        }
    }

    fn decades(&self) -> Vec<(f64, String)> {
        let wide = (self.to / self.from).log10() > 2.5;
        let factors: &[f64] = if wide { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let mut ticks = Vec::new();
        let mut decade = 10_f64.powf(self.from.log10().floor());
        while decade <= self.to * 1.001 {
            for factor in factors {
                let at = decade * factor;
                if at >= self.from * 0.999 && at <= self.to * 1.001 {
                    ticks.push((at, number(at)));
                }
            }
            decade *= 10.0;
        }
        ticks
    }
}

/// A round number not below `value` that four steps lead to.
fn nice_above(value: f64) -> f64 {
    let decade = 10_f64.powf(value.max(1e-9).log10().floor());
    let steps = [1.0, 1.2, 1.6, 2.0, 2.4, 3.2, 4.0, 5.0, 6.0, 8.0, 10.0];
    steps.iter().map(|step| step * decade).find(|bound| *bound >= value).unwrap_or(decade * 10.0)
}

/// The next of 1, 2, 5 times a power of ten, below or above.
fn nice_log(value: f64, above: bool) -> f64 {
    let decade = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * decade);
    let found =
        if above { steps.iter().find(|step| **step >= value) } else { steps.iter().rev().find(|step| **step <= value) };
    found.copied().unwrap_or(decade)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes are whole and positive")]
fn whole(value: f64) -> u64 {
    value.round() as u64
}

/// A number as short as it can be read.
pub(super) fn number(value: f64) -> String {
    if value >= 10_000.0 {
        return if value >= 1e6 { format!("{}M", number(value / 1e6)) } else { format!("{}k", number(value / 1e3)) };
    }
    let digits = match value.abs() {
        0.0 => 0,
        small if small < 0.095 => 3,
        small if small < 0.95 => 2,
        middle if middle < 9.5 => 1,
        _ => 0,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

impl Chart {
    /// Nothing to see with less than two places on every line.
    pub(super) fn is_worth_drawing(&self) -> bool {
        self.series.iter().any(|series| series.points.len() > 1)
    }

    /// The figure with its legend.
    pub(super) fn draw(&self, id: &str) -> Markup {
        html! {
            figure {
                figcaption { h3 id=(id) { (self.title) } p { (self.note) } }
                (self.panel(id))
                ul.legend {
                    @for series in &self.series {
                        li {
                            svg viewBox="0 0 36 12" aria-hidden="true" { (stroke(series, "M1 6H35")) @if is_marked(series) { (mark(series, 18.0, 6.0)) } }
                            (series.name)
                        }
                    }
                }
            }
        }
    }

    fn panel(&self, id: &str) -> Markup {
        let points = || self.series.iter().flat_map(|series| series.points.iter());
        let x = Axis::of(self.x.0, points().map(|point| point.x), [LEFT, WIDTH - RIGHT]);
        let highest = |point: &Point| point.middle.map_or(point.y, |[_, high]| high.max(point.y));
        let y = Axis::of(self.y.0, points().map(highest), [HEIGHT - BOTTOM, TOP]);
        let mut met: Vec<f64> = points().map(|point| point.x).collect();
        met.sort_by(f64::total_cmp);
        met.dedup();
        html! {
            svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-labelledby=(id) {
                @for (value, label) in y.ticks(&[]) {
                    path.grid d={ "M" (LEFT) " " (place(y.at(value))) "H" (WIDTH - RIGHT) } {}
                    text.soft x=(LEFT - 6.0) y=(place(y.at(value) + 4.0)) text-anchor="end" { (label) }
                }
                @for (value, label) in x.ticks(&met) {
                    path.axis d={ "M" (place(x.at(value))) " " (HEIGHT - BOTTOM) "v4" } {}
                    text.soft x=(place(x.at(value))) y=(HEIGHT - BOTTOM + 17.0) text-anchor="middle" { (label) }
                }
                path.axis d={ "M" (LEFT) " " (HEIGHT - BOTTOM) "H" (WIDTH - RIGHT) } {}
                text.soft x=(LEFT) y="15" { (self.y.1) }
                text.soft x=(WIDTH - RIGHT) y=(HEIGHT - 5.0) text-anchor="end" { (self.x.1) }
                @for series in &self.series { (line(series, &x, &y)) }
            }
        }
    }
}

fn line(series: &Series, x: &Axis, y: &Axis) -> Markup {
    let at = |px: f64, py: f64| format!("{} {}", place(x.at(px)), place(y.at(py)));
    let course: Vec<String> = series.points.iter().map(|point| at(point.x, point.y)).collect();
    let middle: Vec<(f64, [f64; 2])> =
        series.points.iter().filter_map(|point| Some((point.x, point.middle?))).collect();
    let above = middle.iter().map(|(px, [_, high])| at(*px, *high));
    let band: Vec<String> = above.chain(middle.iter().rev().map(|(px, [low, _])| at(*px, *low))).collect();
    html! {
        @if middle.len() > 1 {
            path.band d={ "M" (band.join("L")) "Z" } style={ "fill:" (colour(series)) } {}
        }
        (stroke(series, &format!("M{}", course.join("L"))))
        @if is_marked(series) {
            @for point in &series.points { (mark(series, x.at(point.x), y.at(point.y))) }
        }
    }
}

fn stroke(series: &Series, course: &str) -> Markup {
    let class = if series.dashed { "curve dashed" } else { "curve" };
    html! { path class=(class) d=(course) style={ "stroke:" (colour(series)) } {} }
}

/// Distributions have too many places for marks.
fn is_marked(series: &Series) -> bool {
    series.points.len() <= 16
}

/// Shapes tell series apart where colours do not, also where colours begin again.
fn mark(series: &Series, x: f64, y: f64) -> Markup {
    if series.dashed {
        return html! {};
    }
    let (x, y) = (place(x), place(y));
    let course = match (series.colour + series.colour / COLOURS) % 4 {
        0 => format!("M{x} {y}m-3.2 0a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0"),
        1 => format!("M{x} {y}m-3 -3h6v6h-6z"),
        2 => format!("M{x} {y}m0 -4l4 7h-8z"),
        _ => format!("M{x} {y}m0 -4.2l4.2 4.2l-4.2 4.2l-4.2 -4.2z"),
    };
    html! { path d=(course) style={ "fill:" (colour(series)) } {} }
}

fn colour(series: &Series) -> String {
    format!("var(--c{})", series.colour % COLOURS)
}

/// A place on the panel, in tenths.
pub(super) fn place(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        assert_eq!((nice_above(8.3), nice_above(0.21), nice_above(100.0)), (10.0, 0.24, 100.0));
        assert_eq!((nice_log(3.0, false), nice_log(3.0, true), nice_log(700.0, true)), (2.0, 5.0, 1000.0));
        let texts = [0.0, 0.05, 0.5, 2.5, 30.0, 1200.0, 50_000.0, 2e6].map(number);
        assert_eq!(texts, ["0", "0.05", "0.5", "2.5", "30", "1200", "50k", "2M"]);
    }

    #[test]
    fn what_lies_outside_is_drawn_at_the_edge() {
        let axis = Axis::of(Scale::Decades, [1.0, 900.0].into_iter(), [0.0, 100.0]);
        assert_eq!((axis.from, axis.to), (1.0, 1000.0));
        assert_eq!((axis.at(0.001), axis.at(1000.0), axis.at(1e9)), (0.0, 100.0, 100.0));
        assert_eq!(axis.ticks(&[]).len(), 4);
    }
}
