//! A report as one page: no script, nothing from elsewhere, plots drawn from the same data as the JSON. For a screen, a phone,
//! a dark room and paper.

mod chart;
mod glance;
mod plots;
mod timeline;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::environment::Environment;
use super::report::{Level, Report};
use super::table::Table;

const STYLE: &str = include_str!("style.css");

/// The whole page.
pub fn page(report: &Report) -> String {
    let environment = &report.environment;
    let sections: Vec<Section> = report.levels.iter().enumerate().map(|(at, level)| Section::of(at, level)).collect();
    let whole = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "pdlink bench, " (environment.at) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { "pdlink bench" }
                    (head(environment))
                }
                nav aria-label="Levels" {
                    ul { @for section in &sections { li { a href={ "#" (section.id) } { (section.title) } } } }
                }
                main {
                    (glance::table(report))
                    @for section in &sections { (section.draw()) }
                    (skipped(report))
                }
                footer {
                    h2 { "How to repeat it" }
                    p { "On the same machine, with nothing else running:" }
                    code.command { (environment.command) }
                    p {
                        "Form " (report.pdlink_bench) " of the report. Medians; bands and the columns p25 and p75 show where the middle half "
                        "of the measurements lies. Hold two runs against each other with "
                        code { "pdlink bench compare BEFORE.json AFTER.json" } "."
                    }
                }
            }
        }
    };
    whole.into_string()
}

/// The command and where it ran, before any figure.
fn head(environment: &Environment) -> Markup {
    let gpus = if environment.gpus.is_empty() { "none".to_owned() } else { environment.gpus.join(", ") };
    let memory = format!("{:.1} GiB", environment.memory_bytes as f64 / f64::from(1 << 30));
    let facts = [
        ("Measured", environment.at.clone()),
        ("Processor", format!("{}, {} cores", environment.cpu, environment.cores)),
        ("Memory", memory),
        ("GPUs", gpus),
        ("Kernel", format!("Linux {}", environment.kernel)),
        ("Load before", format!("{:.1} of {} cores", environment.load_average, environment.cores)),
        ("pdlink", format!("{} ({})", environment.version, environment.commit)),
    ];
    html! {
        code.command { (environment.command) }
        dl.facts {
            @for (name, value) in &facts { div { dt { (name) } dd { (value) } } }
            @if !environment.variables.is_empty() {
                div {
                    dt { "Variables" }
                    @for (name, value) in &environment.variables { dd { code { (name) "=" (value) } } }
                }
            }
        }
        @for warning in environment.warnings() { p.warn role="note" { (warning) } }
    }
}

fn skipped(report: &Report) -> Markup {
    html! {
        @if !report.skipped.is_empty() {
            section {
                h2 { "Not measured" }
                dl.facts {
                    @for skipped in &report.skipped { div { dt { (skipped.what) } dd { (skipped.why) } } }
                }
            }
        }
    }
}

/// One level of the page.
struct Section<'a> {
    id: String,
    title: String,
    level: &'a Level,
}

impl<'a> Section<'a> {
    fn of(at: usize, level: &'a Level) -> Self {
        let title = match level {
            Level::Raw(_) => "The machine alone".to_owned(),
            Level::Link(_) => "Paths".to_owned(),
            Level::Kv(report) => format!("KV of a request: {}", report.shape),
            Level::Serve(_) => "Requests".to_owned(),
            Level::Weights(_) => "New weights".to_owned(),
            Level::Proxy(_) => "Proxy".to_owned(),
            Level::Soak(_) => "Soak".to_owned(),
        };
        Self { id: format!("{}-{at}", level.name()), title, level }
    }

    fn meaning(&self) -> &'static str {
        match self.level {
            Level::Raw(_) => "What the machine does without pdlink: the ceilings that everything else is held against.",
            Level::Link(_) => {
                "Bytes between two processes over each path, in turns with the machine's own means. Solid: the path. Dashed: its ceiling."
            }
            Level::Kv(_) => {
                "The KV of one request from a prefill to a decode worker through the whole runtime: claim, run list, copy, validation."
            }
            Level::Serve(_) => {
                "What clients of a fleet wait for, and how much of it is the hand-off, from the workers' own records."
            }
            Level::Weights(_) => {
                "A checkpoint into every worker while clients stream, beside a plain copy of as many bytes."
            }
            Level::Proxy(_) => {
                "What the proxy costs between mock workers. The relay only moves the bytes: what is left to save."
            }
            Level::Soak(_) => "A fleet under streaming clients while its workers are killed.",
        }
    }

    fn draw(&self) -> Markup {
        html! {
            section aria-labelledby=(self.id) {
                h2 id=(self.id) { (self.title) }
                p { (self.meaning()) }
                (plots::of(self.level, &self.id))
                @for note in self.level.notes() { p.warn role="note" { (note) } }
                @for shown in self.level.tables() {
                    details open[matches!(self.level, Level::Soak(_))] {
                        summary { "Data: " (if shown.title().is_empty() { &self.title } else { shown.title() }) }
                        (table(&shown))
                    }
                }
            }
        }
    }
}

/// A table that scrolls by itself where the page is narrow.
fn table(shown: &Table) -> Markup {
    let class = |column: usize| shown.is_words(column).then_some("word");
    html! {
        div.scroll tabindex="0" role="region" aria-label=(shown.title()) {
            table {
                thead { tr { @for (at, name) in shown.head().iter().enumerate() { th scope="col" class=[class(at)] { (name) } } } }
                tbody {
                    @for row in shown.rows() { tr { @for (at, cell) in row.iter().enumerate() { td class=[class(at)] { (cell) } } } }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::stats::Samples;

    #[test]
    fn what_a_report_says_cannot_become_markup() {
        let mut environment = Environment::current();
        environment.command = "pdlink bench <script>alert(1)</script> &".to_owned();
        let page = page(&Report::new(environment));
        assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt; &amp;") && !page.contains("<script"), "{page}");
    }

    #[test]
    fn every_level_is_drawn_whatever_it_holds() {
        let mut report = Report::new(Environment::current());
        let spread = [1.0, 2.0, 3.0].into_iter().collect::<Samples>().spread().expect("samples");
        let row = |bytes| crate::bench::raw::Row {
            means: "memcpy".to_owned(),
            direction: "one-way".to_owned(),
            threads: 1,
            bytes,
            gigabytes_per_second: spread,
            microseconds: spread,
        };
        for count in [0, 1, 3] {
            let rows = (0..count).map(|power| row(4096 << power)).collect();
            report.levels.push(Level::Raw(crate::bench::raw::Report { other_host: None, rows }));
        }
        report.levels.push(Level::Link(Default::default()));
        report.levels.push(Level::Serve(Default::default()));
        report.levels.push(Level::Weights(Default::default()));
        report.levels.push(Level::Proxy(Default::default()));
        report.levels.push(Level::Soak(Default::default()));
        let page = page(&report);
        assert_eq!(page.matches("role=\"img\"").count(), 1, "one of the three has something to draw");
        assert!(!page.contains("NaN") && !page.contains("inf"), "{page}");
    }
}
