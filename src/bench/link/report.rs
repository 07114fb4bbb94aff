//! What `bench link` found, in rows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bench::report::{Figure, Unit};
use crate::bench::stats::{Curve, Spread};
use crate::bench::table::{Table, size};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    pub path: String,
    /// `pull`, `push`, or `both` at the same time.
    pub direction: String,
    /// Transfers that are under way at once; with `both`, so many each way.
    pub at_once: usize,
    /// Of one transfer.
    pub bytes: u64,
    /// Of one run.
    pub run_bytes: u64,
    pub threads: usize,
    /// Of all transfers at once together.
    pub gigabytes_per_second: Spread,
    /// From submission to completion, of one transfer.
    pub microseconds: Spread,
    /// Of as many bytes, moved by the machine's own means.
    pub ceiling_gigabytes_per_second: Spread,
    /// Median over median.
    pub share_of_ceiling: f64,
}

/// One short run at a time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Latency {
    pub path: String,
    pub direction: String,
    pub run_bytes: u64,
    pub microseconds: Spread,
    pub curve: Curve,
}

/// All that was measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// The other host, where there was one.
    pub other_host: Option<String>,
    pub latency: Vec<Latency>,
    pub rows: Vec<Row>,
}

impl Report {
    /// What another run can be held against.
    pub fn figures(&self) -> Vec<Figure> {
        let latency = self.latency.iter().map(|Latency { path, direction, run_bytes, microseconds, .. }| {
            let name = format!("link {path} {direction}: one run of {}", size(*run_bytes));
            Figure::new(name, Unit::Microseconds, *microseconds)
        });
        let rates = self.rows.iter().map(|row| {
            let Row { path, direction, at_once, bytes, run_bytes, threads, .. } = row;
            let name = format!(
                "link {path} {direction}: {at_once} x {} in runs of {}, {threads} threads",
                size(*bytes),
                size(*run_bytes)
            );
            let ceiling = row.ceiling_gigabytes_per_second.median;
            Figure::new(name, Unit::GigabytesPerSecond, row.gigabytes_per_second).beside(Some(ceiling))
        });
        latency.chain(rates).collect()
    }
}

impl Report {
    /// As tables.
    pub fn tables(&self) -> Vec<Table> {
        let to = self.other_host.as_ref().map_or_else(String::new, |host| format!(", to {host}"));
        let columns = ["path", "direction", "one run", "median µs", "min µs", "p25", "p75", "p99 µs", "rounds"];
        let mut latency = Table::new(&columns, 2);
        for Latency { path, direction, run_bytes, microseconds: took, .. } in &self.latency {
            let mut cells = vec![path.clone(), direction.clone(), size(*run_bytes)];
            cells.extend([took.median, took.min, took.p25, took.p75, took.p99].map(|value| format!("{value:.1}")));
            cells.push(took.count.to_string());
            latency.row(cells);
        }
        let columns = [
            "path",
            "direction",
            "at once",
            "each",
            "runs of",
            "threads",
            "µs",
            "GB/s",
            "p25",
            "p75",
            "ceiling",
            "p25",
            "p75",
            "share",
            "rounds",
        ];
        let mut rates = Table::new(&columns, 2);
        for row in &self.rows {
            let mut cells = vec![row.path.clone(), row.direction.clone(), row.at_once.to_string()];
            cells.extend([size(row.bytes), size(row.run_bytes), row.threads.to_string()]);
            cells.push(format!("{:.1}", row.microseconds.median));
            for spread in [row.gigabytes_per_second, row.ceiling_gigabytes_per_second] {
                cells.extend([spread.median, spread.p25, spread.p75].map(|value| format!("{value:.2}")));
            }
            cells.push(format!("{:.0} %", row.share_of_ceiling * 100.0));
            cells.push(row.gigabytes_per_second.count.to_string());
            rates.row(cells);
        }
        vec![latency.titled(format!("one short run at a time{to}")), rates.titled(format!("whole transfers{to}"))]
    }
}
