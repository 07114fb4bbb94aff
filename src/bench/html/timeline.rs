//! What follows what in one request or one update: bars whose parts are as long as they took.

use maud::{Markup, html};

use super::chart::{number, place};

const WIDTH: f64 = 480.0;
const BAR: f64 = 20.0;
const ROW: f64 = 52.0;
/// A part that is narrower would not be seen.
const PART_MIN: f64 = 1.5;
/// Narrower parts have no room for their length in words.
const WORDS_MIN: f64 = 46.0;

/// A part of a bar.
#[derive(Debug, Clone)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) colour: usize,
    pub(super) ms: f64,
}

impl Part {
    pub(super) fn new(name: &str, colour: usize, ms: f64) -> Self {
        Self { name: name.to_owned(), colour, ms }
    }
}

/// One bar.
#[derive(Debug, Clone)]
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) parts: Vec<Part>,
}

/// Bars below each other, on one scale, or each as wide as the figure.
pub(super) fn draw(id: &str, title: &str, note: &str, bars: &[Bar], one_scale: bool) -> Markup {
    let whole = |bar: &Bar| bar.parts.iter().map(|part| part.ms).sum::<f64>();
    let longest = bars.iter().map(whole).fold(0.0, f64::max);
    let mut known: Vec<Part> = Vec::new();
    for part in bars.iter().flat_map(|bar| &bar.parts) {
        if !known.iter().any(|seen| seen.name == part.name) {
            known.push(part.clone());
        }
    }
    let height = ROW * bars.len() as f64;
    html! {
        figure {
            figcaption { h3 id=(id) { (title) } p { (note) } }
            svg viewBox={ "0 0 " (WIDTH) " " (height) } role="img" aria-labelledby=(id) {
                @for (number, bar) in bars.iter().enumerate() {
                    (row(bar, ROW * number as f64, if one_scale { longest } else { whole(bar) }))
                }
            }
            ul.legend {
                @for part in &known {
                    li {
                        svg viewBox="0 0 36 12" aria-hidden="true" {
                            rect x="6" y="0" width="24" height="12" style={ "fill:var(--c" (part.colour) ")" } {}
                        }
                        (part.name)
                    }
                }
            }
        }
    }
}

fn row(bar: &Bar, top: f64, longest: f64) -> Markup {
    let whole: f64 = bar.parts.iter().map(|part| part.ms).sum();
    let width = |ms: f64| if longest > 0.0 { ms / longest * WIDTH } else { 0.0 };
    let starts = bar.parts.iter().scan(0.0, |at, part| {
        let start = *at;
        *at += part.ms;
        Some(start)
    });
    html! {
        text x="0" y=(top + 13.0) { (bar.name) }
        text.soft x=(WIDTH) y=(top + 13.0) text-anchor="end" { (in_words(whole)) }
        @for (part, start) in bar.parts.iter().zip(starts) {
            rect x=(place(width(start))) y=(top + 19.0) width=(place(width(part.ms).max(PART_MIN))) height=(BAR)
                style={ "fill:var(--c" (part.colour) ")" } {
                title { (part.name) ": " (in_words(part.ms)) }
            }
            @if width(part.ms) >= WORDS_MIN {
                text x=(place(width(start) + 5.0)) y=(top + 33.5) style="fill:var(--page)" { (in_words(part.ms)) }
            }
        }
    }
}

/// Milliseconds in the unit that suits them.
pub(super) fn in_words(ms: f64) -> String {
    match ms {
        small if small < 1.0 => format!("{} µs", number(small * 1e3)),
        middle if middle < 10_000.0 => format!("{} ms", number(middle)),
        long => format!("{} s", number(long / 1e3)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_the_unit_that_suits_them() {
        assert_eq!([0.0421, 3.25, 812.0, 12_000.0].map(in_words), ["42 µs", "3.2 ms", "812 ms", "12 s"]);
    }

    #[test]
    fn the_shortest_part_is_still_seen() {
        let part = |name, ms| Part::new(name, 0, ms);
        let bar = Bar { name: "one".to_owned(), parts: vec![part("prefill", 100.0), part("copy", 0.001)] };
        let drawn = draw("t", "title", "note", &[bar], true).into_string();
        assert!(drawn.contains("width=\"1.5\"") && drawn.contains("copy: 1 µs"), "{drawn}");
    }
}
