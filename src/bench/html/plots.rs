//! Which plots a level has, and from which of its rows.

use maud::{Markup, html};

use super::chart::{Chart, Point, Scale, Series};
use super::timeline::{self, Bar, Part};
use crate::bench::report::Level;
use crate::bench::stats::{Curve, Spread};
use crate::bench::table::size;
use crate::bench::{kv, link, proxy, raw, serve, weights};

/// Every plot of a level.
pub(super) fn of(level: &Level, id: &str) -> Markup {
    let charts = match level {
        Level::Raw(report) => of_raw(report),
        Level::Link(report) => of_link(report),
        Level::Kv(report) => of_kv(report),
        Level::Serve(report) => of_serve(report),
        Level::Weights(_) | Level::Proxy(_) | Level::Soak(_) => Vec::new(),
    };
    let bars = match level {
        Level::Serve(report) => hand_offs(report, id),
        Level::Weights(report) => updates(report, id),
        Level::Proxy(report) => processor(report, id),
        _ => html! {},
    };
    html! {
        div.plots {
            @for (at, chart) in charts.iter().filter(|chart| chart.is_worth_drawing()).enumerate() {
                (chart.draw(&format!("{id}-plot-{at}")))
            }
            (bars)
        }
    }
}

fn point(x: f64, spread: Spread) -> Point {
    Point { x, y: spread.median, middle: Some([spread.p25, spread.p75]) }
}

/// Names in the order in which they come, each once.
fn names(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut names = Vec::new();
    for name in all {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn of_raw(report: &raw::Report) -> Vec<Chart> {
    let name = |row: &raw::Row| {
        let threads = if row.threads > 1 { format!(" x {}", row.threads) } else { String::new() };
        let both = if row.direction == "both" { ", both ways" } else { "" };
        format!("{}{threads}{both}", row.means)
    };
    let series = names(report.rows.iter().map(name)).into_iter().enumerate().map(|(colour, wanted)| {
        let rows = report.rows.iter().filter(|row| name(row) == wanted);
        let points = rows.map(|row| point(row.bytes as f64, row.gigabytes_per_second)).collect();
        Series { name: wanted, colour, dashed: false, points }
    });
    let series: Vec<Series> = series.collect();
    vec![Chart {
        title: "Bandwidth over size".to_owned(),
        note: "The better of large shares and small chunks per thread.".to_owned(),
        x: (Scale::Bytes, "bytes moved"),
        y: (bandwidths(&series), "GB/s"),
        series,
    }]
}

fn of_link(report: &link::Report) -> Vec<Chart> {
    let single = || report.rows.iter().filter(|row| row.at_once == 1);
    let mut runs: Vec<u64> = single().filter(|row| row.run_bytes < row.bytes).map(|row| row.run_bytes).collect();
    runs.sort_unstable();
    runs.dedup();
    let mut charts = Vec::new();
    for direction in names(single().map(|row| row.direction.clone())) {
        for &run_bytes in &runs {
            let rows = single().filter(|row| row.direction == direction && row.run_bytes == run_bytes.min(row.bytes));
            let rows: Vec<&link::Row> = rows.collect();
            let title = format!("Bandwidth over size: {direction}, runs of {}", size(run_bytes));
            let series = with_ceilings(&rows);
            charts.push(Chart {
                title,
                note: "Solid the path, dashed its ceiling from the same run.".to_owned(),
                x: (Scale::Bytes, "bytes of one transfer"),
                y: (bandwidths(&series), "GB/s"),
                series,
            });
        }
    }
    let curves = report.latency.iter().enumerate().map(|(colour, latency)| {
        let name = format!("{} {}", latency.path, latency.direction);
        distribution(name, colour, false, &latency.curve)
    });
    let run = report.latency.first().map_or_else(String::new, |latency| format!(" of {}", size(latency.run_bytes)));
    charts.push(distributions(&format!("Latency of one run{run}"), "µs", curves.collect()));
    charts
}

/// From 0, unless the best of one line is so far below another's that it would lie on the axis: a GPU beside a socket.
fn bandwidths(series: &[Series]) -> Scale {
    let best = |series: &Series| series.points.iter().map(|point| point.y).fold(0.0, f64::max);
    let (low, high) =
        series.iter().map(best).fold((f64::INFINITY, 0.0_f64), |(low, high), y| (low.min(y), high.max(y)));
    if high > 20.0 * low { Scale::Decades } else { Scale::Linear }
}

fn with_ceilings(rows: &[&link::Row]) -> Vec<Series> {
    let mut series = Vec::new();
    for (colour, path) in names(rows.iter().map(|row| row.path.clone())).into_iter().enumerate() {
        let of_path = || rows.iter().filter(|row| row.path == path);
        let points = of_path().map(|row| point(row.bytes as f64, row.gigabytes_per_second)).collect();
        let bare =
            |row: &&&link::Row| Point { x: row.bytes as f64, y: row.ceiling_gigabytes_per_second.median, middle: None };
        let ceiling = of_path().map(|row| bare(&row)).collect();
        series.push(Series { name: path.clone(), colour, dashed: false, points });
        series.push(Series { name: format!("ceiling of {path}"), colour, dashed: true, points: ceiling });
    }
    series
}

/// How many percent of the measurements took at most so long.
fn distribution(name: String, colour: usize, dashed: bool, Curve(values): &Curve) -> Series {
    let step = 100.0 / values.len().saturating_sub(1).max(1) as f64;
    let points = values.iter().enumerate().map(|(at, value)| Point { x: *value, y: at as f64 * step, middle: None });
    Series { name, colour, dashed, points: points.collect() }
}

fn distributions(title: &str, unit: &'static str, series: Vec<Series>) -> Chart {
    Chart {
        title: title.to_owned(),
        note: "How many percent of the measurements took at most so long. Steep is steady.".to_owned(),
        x: (Scale::Decades, unit),
        y: (Scale::Percent, "%"),
        series,
    }
}

fn of_kv(report: &kv::Report) -> Vec<Chart> {
    let scattered = || report.rows.iter().filter(|row| row.blocks == "scattered" && row.at_once == 1);
    let name = |row: &kv::Row| format!("{} {}", row.path, row.send_type);
    let wanted = names(scattered().map(name));
    let of_name = |wanted: &str| scattered().filter(|row| name(row) == wanted).collect::<Vec<_>>();
    let lines = wanted.iter().enumerate();
    let times = lines.clone().map(|(colour, wanted)| {
        let points = of_name(wanted).iter().map(|row| point(f64::from(row.tokens), row.fetch_us)).collect();
        Series { name: wanted.clone(), colour, dashed: false, points }
    });
    let times = Chart {
        title: "Time of a fetch over the prompt's length".to_owned(),
        note: "From scattered blocks; what a request waits for once its blocks are there.".to_owned(),
        x: (Scale::Counts, "tokens"),
        y: (Scale::Decades, "µs"),
        series: times.collect(),
    };
    let longest = scattered().map(|row| row.tokens).max().unwrap_or(0);
    let curves = lines.filter_map(|(colour, wanted)| {
        let row = *of_name(wanted).iter().find(|row| row.tokens == longest)?;
        Some(distribution(wanted.clone(), colour, false, &row.fetch_curve))
    });
    let curves = distributions(&format!("Times of a fetch of {longest} tokens"), "µs", curves.collect());
    let [rates, each] = at_once(report);
    vec![times, curves, rates, each]
}

/// Lines over the number of requests at once: of what each line measured, alone and together.
fn at_once(report: &kv::Report) -> [Chart; 2] {
    let name = |row: &kv::Row| format!("{} {}, {} tokens", row.path, row.send_type, row.tokens);
    let scattered = || report.rows.iter().filter(|row| row.blocks == "scattered");
    let wanted = names(scattered().filter(|row| row.at_once > 1).map(name));
    let lines = |y: fn(&kv::Row) -> Spread| -> Vec<Series> {
        let line = |(colour, wanted): (usize, &String)| {
            let mut rows: Vec<&kv::Row> = scattered().filter(|row| name(row) == *wanted).collect();
            rows.sort_by_key(|row| row.at_once);
            let points = rows.iter().map(|row| point(f64::from(row.at_once), y(row))).collect();
            Series { name: wanted.clone(), colour, dashed: false, points }
        };
        wanted.iter().enumerate().map(line).collect()
    };
    let (rates, x) = (lines(|row| row.gigabytes_per_second), (Scale::Counts, "requests at once"));
    [
        Chart {
            title: "Bandwidth of requests at once".to_owned(),
            note: "From scattered blocks; all together, through the same two runtimes.".to_owned(),
            x,
            y: (bandwidths(&rates), "GB/s"),
            series: rates,
        },
        Chart {
            title: "Time of each fetch of requests at once".to_owned(),
            note: "What one of them waits for while the others move.".to_owned(),
            x,
            y: (Scale::Decades, "µs"),
            series: lines(|row| row.fetch_us),
        },
    ]
}

fn of_serve(report: &serve::Report) -> Vec<Chart> {
    let mut charts = Vec::new();
    for load in names(report.rows.iter().map(|row| row.load.clone())) {
        let rows: Vec<&serve::Row> = report.rows.iter().filter(|row| row.load == load).collect();
        let lengths = names(rows.iter().map(|row| row.prompt_tokens.to_string()));
        let series = rows.iter().filter_map(|row| {
            let colour = lengths.iter().position(|length| *length == row.prompt_tokens.to_string())?;
            let name = match row.server.as_str() {
                "baseline" => format!("{} tokens, without PD", row.prompt_tokens),
                _ => format!("{} tokens", row.prompt_tokens),
            };
            Some(distribution(name, colour, row.server == "baseline", row.ttft_curve.as_ref()?))
        });
        charts.push(distributions(&format!("Time to the first token, {load}"), "ms", series.collect()));
    }
    charts
}

/// The middle request of each row up to its first token, and its hand-off alone.
fn hand_offs(report: &serve::Report, id: &str) -> Markup {
    let (mut whole, mut alone) = (Vec::new(), Vec::new());
    for row in &report.rows {
        let Some(middle) = row.hand_off.as_ref().map(|hand_off| &hand_off.middle) else { continue };
        let name = format!("{} tokens, {}, {}", row.prompt_tokens, row.load, middle.path);
        let hand_off = [("wait", 1, middle.wait_ms), ("copy", 2, middle.copy_ms), ("validate", 3, middle.validate_ms)]
            .map(|(name, colour, ms)| Part::new(name, colour, ms));
        let rest = middle.ttft_ms - hand_off.iter().map(|part| part.ms).sum::<f64>();
        // The proxy tells the row's mean, which may be longer than this request's.
        let before = row.prefill_leg_ms_mean.unwrap_or(0.0).min(rest).max(0.0);
        let mut parts = Vec::new();
        if before > 0.0 {
            parts.push(Part::new("prefill leg (mean of the row)", 0, before));
        }
        parts.extend(hand_off.clone());
        let after =
            if before > 0.0 { "decode's first token and the way" } else { "prefill, decode's first token, the way" };
        parts.push(Part::new(after, 4, (rest - before).max(0.0)));
        whole.push(Bar { name: name.clone(), parts });
        alone.push(Bar { name: format!("{name}, {}", size(middle.bytes)), parts: hand_off.to_vec() });
    }
    html! {
        @if !whole.is_empty() {
            (timeline::draw(&format!("{id}-first"), "One request up to its first token",
                "The request in the middle of each row, by the time to its first token; all on one scale.", &whole, true))
            (timeline::draw(&format!("{id}-hand-off"), "Its hand-off alone",
                "From decode's claim until prefill has confirmed; each bar as wide as the figure.", &alone, false))
        }
    }
}

fn updates(report: &weights::Report, id: &str) -> Markup {
    let bar = |row: &weights::Row| {
        let (staging, paused) = (row.staging_ms.median, row.paused_ms.median);
        let parts = vec![
            Part::new("staging, while it serves", 2, staging),
            Part::new("the rest: drain, sender's start", 4, (row.whole_ms.median - staging - paused).max(0.0)),
            Part::new("paused", 1, paused),
        ];
        Bar { name: format!("{} to {} workers", size(row.bytes), row.workers), parts }
    };
    let bars: Vec<Bar> = report.rows.iter().map(bar).collect();
    html! {
        @if !bars.is_empty() {
            (timeline::draw(&format!("{id}-update"), "One update",
                "Medians of its parts. Clients wait during the pause alone.", &bars, true))
        }
    }
}

/// Processor time of the relay, the proxy and other routers, for each load.
fn processor(report: &proxy::Report, id: &str) -> Markup {
    let fronts = names(report.rows.iter().map(|row| row.through.clone()));
    let bar = |row: &proxy::Row| {
        let colour = fronts.iter().position(|front| *front == row.through)?;
        let name = format!("{}, {} B, {} at once", row.through, row.prompt_bytes, row.connections);
        let parts = vec![Part::new(&row.through, colour, row.cpu_ms_per_1000?.median)];
        Some(Bar { name, parts })
    };
    let bars: Vec<Bar> = report.rows.iter().filter_map(bar).collect();
    let added = |row: &proxy::Row| {
        let colour = fronts.iter().position(|front| *front == row.through)?;
        let alone = row.connections == 1;
        let parts = vec![Part::new(&row.through, colour, row.added_p50_us?.max(0.0) / 1e3)];
        alone.then(|| Bar { name: format!("{}: {} B", row.through, row.prompt_bytes), parts })
    };
    let added: Vec<Bar> = report.rows.iter().filter_map(added).collect();
    html! {
        @if !bars.is_empty() {
            (timeline::draw(&format!("{id}-processor"), "Processor time of 1,000 requests",
                "Of what stands between load and workers.", &bars, true))
        }
        @if !added.is_empty() {
            (timeline::draw(&format!("{id}-added"), "Added latency at one connection",
                "Its p50 above that of a client that does both legs itself.", &added, true))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_of_one_order_start_at_0_and_others_go_by_decades() {
        let line = |best: f64| {
            let points = [0.1, best].map(|y| Point { x: y, y, middle: None });
            Series { name: String::new(), colour: 0, dashed: false, points: points.to_vec() }
        };
        assert_eq!(bandwidths(&[line(40.0), line(6.0)]), Scale::Linear);
        assert_eq!(bandwidths(&[line(1800.0), line(6.0)]), Scale::Decades);
    }
}
