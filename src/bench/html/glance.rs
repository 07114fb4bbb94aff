//! The few figures that a reader looks for first.

use maud::{Markup, html};

use super::chart::number;
use super::timeline::in_words;
use crate::bench::report::{Level, Report};
use crate::bench::table::{Table, size};
use crate::bench::{kv, link, proxy, raw, serve, weights};

/// Runs whose rates are shown, or the longest shorter ones: about what a block of a layer is.
const RUN_BYTES: u64 = 64 << 10;

pub(super) fn table(report: &Report) -> Markup {
    let mut table = Table::new(&["what", "where", "median", "beside"], 2);
    for level in &report.levels {
        let rows = match level {
            Level::Raw(report) => of_raw(report),
            Level::Link(report) => of_link(report),
            Level::Kv(report) => of_kv(report),
            Level::Serve(report) => of_serve(report),
            Level::Weights(report) => of_weights(report),
            Level::Proxy(report) => of_proxy(report),
            Level::Soak(_) => Vec::new(),
        };
        rows.into_iter().for_each(|row| table.row(row.to_vec()));
    }
    html! {
        @if !table.rows().is_empty() {
            section.glance { h2 { "At a glance" } (super::table(&table.titled("At a glance"))) }
        }
    }
}

type Row = [String; 4];

fn rate(value: f64) -> String {
    format!("{} GB/s", number(value))
}

/// Of rows with one name each, the one with the most bytes.
fn largest<T>(rows: &[T], name: impl Fn(&T) -> String, bytes: impl Fn(&T) -> u64) -> Vec<&T> {
    let mut found: Vec<(String, &T)> = Vec::new();
    for row in rows {
        let key = name(row);
        match found.iter_mut().find(|(known, _)| *known == key) {
            Some((_, best)) if bytes(best) < bytes(row) => *best = row,
            Some(_) => {}
            None => found.push((key, row)),
        }
    }
    found.into_iter().map(|(_, row)| row).collect()
}

fn of_raw(report: &raw::Report) -> Vec<Row> {
    let name = |row: &raw::Row| format!("{} {} {}", row.means, row.direction, row.threads);
    let rows = largest(&report.rows, name, |row| row.bytes);
    let most =
        |row: &&raw::Row| !report.rows.iter().any(|other| other.means == row.means && other.threads > row.threads);
    let ways = rows.into_iter().filter(|row| row.direction == "one-way").filter(most);
    ways.map(|row| {
        let place = format!("{}, {} threads", size(row.bytes), row.threads);
        [row.means.clone(), place, rate(row.gigabytes_per_second.median), String::new()]
    })
    .collect()
}

fn of_link(report: &link::Report) -> Vec<Row> {
    let latency = report.latency.iter().map(|row| {
        let what = format!("{} {}, one run", row.path, row.direction);
        let took = row.microseconds;
        let beside = format!("p99 {}", in_words(took.p99 / 1e3));
        [what, size(row.run_bytes), in_words(took.median / 1e3), beside]
    });
    let single: Vec<link::Row> = report.rows.iter().filter(|row| row.at_once == 1).cloned().collect();
    let name = |row: &link::Row| format!("{} {} {}", row.path, row.direction, row.run_bytes);
    let runs = single.iter().map(|row| row.run_bytes).filter(|run_bytes| *run_bytes <= RUN_BYTES).max().unwrap_or(0);
    let shown = |row: &&link::Row| row.run_bytes == runs && row.direction != "both";
    let rates = largest(&single, name, |row| row.bytes).into_iter().filter(shown).map(|row| {
        let what = format!("{} {}", row.path, row.direction);
        let place = format!("{} in runs of {}", size(row.bytes), size(row.run_bytes));
        let beside = format!("{:.0} % of its ceiling", row.share_of_ceiling * 100.0);
        [what, place, rate(row.gigabytes_per_second.median), beside]
    });
    latency.chain(rates).collect()
}

fn of_kv(report: &kv::Report) -> Vec<Row> {
    let alone = |row: &&kv::Row| row.blocks == "scattered" && row.at_once == 1;
    let scattered: Vec<kv::Row> = report.rows.iter().filter(alone).cloned().collect();
    let rows = largest(&scattered, |row| format!("{} {}", row.path, row.send_type), |row| row.bytes);
    rows.into_iter()
        .map(|row| {
            let what = format!("{} KV, {} {}", report.shape, row.path, row.send_type);
            let place = format!("{} tokens, {} runs", row.tokens, row.runs);
            let beside = format!("{:.0} % of its ceiling", row.share_of_ceiling * 100.0);
            [what, place, in_words(row.fetch_us.median / 1e3), beside]
        })
        .collect()
}

fn of_serve(report: &serve::Report) -> Vec<Row> {
    let first = |row: &serve::Row| {
        let ttft = row.ttft_ms?;
        let what = format!("first token, {}", row.server);
        let place = format!("{} tokens, {}", row.prompt_tokens, row.load);
        let beside = match &row.hand_off {
            Some(hand_off) => format!("hand-off {:.1} %", hand_off.share_of_ttft.median * 100.0),
            None => format!("p99 {}", in_words(ttft.p99)),
        };
        Some([what, place, in_words(ttft.median), beside])
    };
    report.rows.iter().filter_map(first).collect()
}

fn of_weights(report: &weights::Report) -> Vec<Row> {
    let row = |row: &weights::Row| {
        let place = format!("{} to {} workers", size(row.bytes), row.workers);
        let beside = format!("{:.0} % of memcpy", row.share_of_ceiling * 100.0);
        let pause = format!("at most {}", in_words(row.paused_ms.max));
        [
            ["new weights".to_owned(), place.clone(), rate(row.gigabytes_per_second.median), beside],
            ["pause for them".to_owned(), place, in_words(row.paused_ms.median), pause],
        ]
    };
    report.rows.iter().flat_map(row).collect()
}

fn of_proxy(report: &proxy::Report) -> Vec<Row> {
    let through = report.rows.iter().filter(|row| row.through == "proxy");
    through
        .filter_map(|row| {
            let place = format!("{} B, {} at once", row.prompt_bytes, row.connections);
            let cpu = row.cpu_ms_per_1000?;
            let what = "proxy, processor per 1,000 requests".to_owned();
            let beside = row.cpu_of_relay.map_or_else(String::new, |times| format!("{times:.1} x a bare relay"));
            Some([what, place, in_words(cpu.median), beside])
        })
        .collect()
}
