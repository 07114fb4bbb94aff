//! What `bench weights` found.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bench::report::{Figure, Unit};
use crate::bench::stats::Spread;
use crate::bench::table::{Table, size};

/// One size of checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    pub bytes: u64,
    pub tensors: usize,
    /// Workers that each took all of it.
    pub workers: usize,
    /// Clients that streamed answers meanwhile.
    pub clients: usize,
    /// To all workers together, while they serve: from the order until the last has all of it, checked.
    pub gigabytes_per_second: Spread,
    pub staging_ms: Spread,
    /// A plain parallel memcpy of as many bytes, as often as there are workers.
    pub ceiling_gigabytes_per_second: Spread,
    /// Median over median.
    pub share_of_ceiling: f64,
    /// How long no worker made a token.
    pub paused_ms: Spread,
    /// From the push to its end, as the one who pushes sees it.
    pub whole_ms: Spread,
    /// The longest silence within one stream of a client, of each push.
    pub longest_gap_ms: Option<Spread>,
    /// Answers that clients lost.
    pub lost: usize,
}

/// All that was measured.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// Threads of the plain copy.
    pub threads: usize,
    pub rows: Vec<Row>,
}

impl Report {
    /// What another run can be held against.
    pub fn figures(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for row in &self.rows {
            let Row { bytes, tensors, workers, clients, .. } = row;
            let name =
                format!("weights: {} in {tensors} tensors to {workers} workers, {clients} clients", size(*bytes));
            let ceiling = row.ceiling_gigabytes_per_second.median;
            let rate = Figure::new(name.clone(), Unit::GigabytesPerSecond, row.gigabytes_per_second);
            figures.push(rate.beside(Some(ceiling)));
            figures.push(Figure::new(format!("{name}, pause"), Unit::Milliseconds, row.paused_ms));
        }
        figures
    }
}

impl Report {
    /// As tables.
    pub fn tables(&self) -> Vec<Table> {
        let columns = [
            "checkpoint",
            "tensors",
            "workers",
            "clients",
            "staging ms",
            "GB/s to all",
            "p25",
            "p75",
            "memcpy",
            "share",
            "paused ms",
            "max",
            "whole ms",
            "longest gap ms",
            "lost",
            "pushes",
        ];
        let mut table = Table::new(&columns, 0);
        for row in &self.rows {
            let mut cells = vec![size(row.bytes), row.tensors.to_string()];
            cells.extend([row.workers.to_string(), row.clients.to_string(), format!("{:.1}", row.staging_ms.median)]);
            let rate = row.gigabytes_per_second;
            cells.extend([rate.median, rate.p25, rate.p75].map(|value| format!("{value:.2}")));
            cells.push(format!("{:.2}", row.ceiling_gigabytes_per_second.median));
            cells.push(format!("{:.0} %", row.share_of_ceiling * 100.0));
            cells.extend([row.paused_ms.median, row.paused_ms.max, row.whole_ms.median].map(|ms| format!("{ms:.1}")));
            cells.push(row.longest_gap_ms.map_or_else(|| "-".to_owned(), |gap| format!("{:.1}", gap.median)));
            cells.extend([row.lost.to_string(), rate.count.to_string()]);
            table.row(cells);
        }
        vec![table.titled("new weights into a fleet that serves")]
    }
}
