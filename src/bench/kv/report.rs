//! What `bench kv` found, in rows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::python;
use crate::bench::report::{Figure, Unit};
use crate::bench::stats::{Curve, Spread};
use crate::bench::table::{Table, size};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    pub path: String,
    pub send_type: String,
    pub blocks: String,
    /// Requests whose KV is handed over at once, through the same two runtimes. What follows is of one of them, but for rates.
    #[serde(default = "alone")]
    pub at_once: u32,
    pub tokens: u32,
    pub bytes: u64,
    pub runs: u64,
    pub posts: u64,
    /// From `fetch` to the report; of several at once each counts.
    pub fetch_us: Spread,
    /// How `fetch` is distributed.
    pub fetch_curve: Curve,
    /// From `expect` to the report.
    pub whole_us: Spread,
    /// Parts of `fetch`, as the records have them.
    pub copy_us: f64,
    pub validate_us: f64,
    /// Of all requests at once together, from the first `fetch` to the last report.
    pub gigabytes_per_second: Spread,
    /// Of as many bytes, moved by the machine's own means.
    pub ceiling_gigabytes_per_second: Spread,
    pub share_of_ceiling: f64,
}

/// Reports from before several could be measured do not say it.
fn alone() -> u32 {
    1
}

/// All that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    pub shape: String,
    pub layout: String,
    /// Tensor-parallel ranks of the prefill worker, and of the decode worker.
    pub prefill_tp: u32,
    pub decode_tp: u32,
    /// The host of the prefill worker, where it is another.
    pub other_host: Option<String>,
    pub block_size: u32,
    pub threads: usize,
    pub digest: bool,
    pub rows: Vec<Row>,
    /// With `nixl` in host memory: the same runs by NIXL's own Python API.
    pub nixl_api: Option<Vec<python::Row>>,
    /// Why they were not measured.
    pub nixl_api_skipped: Option<String>,
}

impl Report {
    /// What another run can be held against.
    pub fn figures(&self) -> Vec<Figure> {
        let Self { shape, layout, block_size, prefill_tp, decode_tp, digest, threads, .. } = self;
        let digest = if *digest { ", digested" } else { "" };
        let mut figures = Vec::new();
        for row in &self.rows {
            let Row { path, send_type, blocks, at_once, tokens, .. } = row;
            let name = format!(
                "kv {shape} {layout}, blocks of {block_size}, TP {prefill_tp} to {decode_tp}, {threads} threads{digest}, {path} \
                 {send_type}: {at_once} x {tokens} tokens from {blocks} blocks"
            );
            // What the ceiling takes for as many bytes.
            let ceiling = row.ceiling_gigabytes_per_second.median;
            let plain_us = (row.bytes * u64::from(*at_once)) as f64 / ceiling / 1e3;
            for (what, took) in [("fetch", row.fetch_us), ("whole", row.whole_us)] {
                figures.push(Figure::new(format!("{name}, {what}"), Unit::Microseconds, took).beside(Some(plain_us)));
            }
            // Of one alone it is what `fetch` says.
            if *at_once > 1 {
                let together =
                    Figure::new(format!("{name}, together"), Unit::GigabytesPerSecond, row.gigabytes_per_second);
                figures.push(together.beside(Some(ceiling)));
            }
        }
        figures
    }
}

impl Report {
    /// As tables.
    pub fn tables(&self) -> Vec<Table> {
        let Self { shape, layout, block_size, threads, digest, prefill_tp, decode_tp, .. } = self;
        let digest = if *digest { ", every transfer digested" } else { "" };
        let from = self.other_host.as_ref().map_or_else(String::new, |host| format!(", prefill on {host}"));
        let title = format!(
            "{shape} ({layout}), blocks of {block_size} tokens, TP {prefill_tp} to {decode_tp}, {threads} \
             threads{digest}{from}"
        );
        let columns = [
            "path",
            "send type",
            "blocks",
            "at once",
            "tokens",
            "each",
            "runs",
            "fetch µs",
            "min",
            "p99",
            "copy",
            "validate",
            "whole µs",
            "GB/s",
            "ceiling",
            "share",
            "rounds",
        ];
        let mut table = Table::new(&columns, 3);
        for row in &self.rows {
            let micros = |value: f64| format!("{value:.1}");
            table.row(vec![
                row.path.clone(),
                row.send_type.clone(),
                row.blocks.clone(),
                row.at_once.to_string(),
                row.tokens.to_string(),
                size(row.bytes),
                row.runs.to_string(),
                micros(row.fetch_us.median),
                micros(row.fetch_us.min),
                micros(row.fetch_us.p99),
                micros(row.copy_us),
                micros(row.validate_us),
                micros(row.whole_us.median),
                format!("{:.2}", row.gigabytes_per_second.median),
                format!("{:.2}", row.ceiling_gigabytes_per_second.median),
                format!("{:.0} %", row.share_of_ceiling * 100.0),
                row.gigabytes_per_second.count.to_string(),
            ]);
        }
        let mut tables = vec![table.titled(title)];
        if let Some(rows) = &self.nixl_api {
            tables.push(python::table(rows).titled("the same runs by NIXL's own Python API and by pdlink's path"));
        }
        tables
    }

    /// What else is to be said.
    pub fn notes(&self) -> Vec<String> {
        self.nixl_api_skipped.iter().map(|why| format!("NIXL's own Python API: skipped, {why}")).collect()
    }
}
