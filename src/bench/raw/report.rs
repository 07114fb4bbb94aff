//! What `bench raw` found, in rows.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bench::report::{Figure, Unit};
use crate::bench::stats::Spread;
use crate::bench::table::{Table, size};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// `memcpy`, `sockets`, `gpu-copy`, `ncclSend`, `nixl`.
    pub means: String,
    /// `one-way` or `both`.
    pub direction: String,
    /// Threads, or sockets each way; of the driver, NCCL and NIXL one.
    pub threads: usize,
    pub bytes: u64,
    pub gigabytes_per_second: Spread,
    pub microseconds: Spread,
}

/// All that was measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// The other host, where there was one.
    pub other_host: Option<String>,
    pub rows: Vec<Row>,
}

impl Report {
    /// What another run can be held against.
    pub fn figures(&self) -> Vec<Figure> {
        let figure = |row: &Row| {
            let Row { means, direction, threads, bytes, .. } = row;
            let name = format!("raw {means} {direction}: {}, {threads} threads", size(*bytes));
            Figure::new(name, Unit::GigabytesPerSecond, row.gigabytes_per_second).of_machine(true)
        };
        self.rows.iter().map(figure).collect()
    }
}

impl Report {
    /// As tables.
    pub fn tables(&self) -> Vec<Table> {
        let columns = ["means", "direction", "threads", "bytes", "µs", "min", "p99", "GB/s", "p25", "p75", "rounds"];
        let mut table = Table::new(&columns, 2);
        for row in &self.rows {
            let mut cells = vec![row.means.clone(), row.direction.clone(), row.threads.to_string(), size(row.bytes)];
            let (took, rate) = (row.microseconds, row.gigabytes_per_second);
            cells.extend([took.median, took.min, took.p99].map(|value| format!("{value:.1}")));
            cells.extend([rate.median, rate.p25, rate.p75].map(|value| format!("{value:.2}")));
            cells.push(rate.count.to_string());
            table.row(cells);
        }
        let to = self.other_host.as_ref().map_or_else(String::new, |host| format!(", to {host}"));
        vec![table.titled(format!("copies without pdlink{to}"))]
    }
}
