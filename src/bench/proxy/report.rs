//! What `bench proxy` found, in rows.

use std::time::Duration;

use anyhow::Context;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::bench::load::Seen;
use crate::bench::report::{Figure, Unit};
use crate::bench::stats::{Samples, Spread};
use crate::bench::table::{Table, size};

/// One line of the table. Every spread is that over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    pub prompt_bytes: usize,
    pub connections: usize,
    /// What the requests go through: nothing (`direct`), the bare relay, the proxy, or another router, by its name.
    pub through: String,
    pub requests: u64,
    pub requests_per_second: Spread,
    pub p50_us: Spread,
    pub p90_us: Spread,
    pub p99_us: Spread,
    /// Processor time of what they go through per 1,000 requests, in milliseconds.
    pub cpu_ms_per_1000: Option<Spread>,
    /// The same as a multiple of the relay's.
    pub cpu_of_relay: Option<f64>,
    /// Its p50 above that of a client that does both legs itself.
    pub added_p50_us: Option<f64>,
}

/// Memory of the proxy, in bytes, around waves of requests held in flight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Memory {
    pub inflight: usize,
    pub before_bytes: u64,
    pub waves: Vec<Wave>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Wave {
    pub errors: u64,
    pub first_error: Option<String>,
    pub peak_bytes: u64,
    pub after_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    pub rows: Vec<Row>,
    pub memory: Option<Memory>,
}

/// What one row has come to so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) prompt_bytes: usize,
    pub(super) connections: usize,
    pub(super) through: String,
    requests: u64,
    rate: Samples,
    p50: Samples,
    p90: Samples,
    p99: Samples,
    cpu: Samples,
}

impl Tally {
    pub(super) fn new(prompt_bytes: usize, connections: usize, through: &str) -> Self {
        Self { prompt_bytes, connections, through: through.to_owned(), ..Self::default() }
    }

    pub(super) fn is_new(&self) -> bool {
        self.requests == 0
    }

    /// One round, and the processor time that it took of what is between load and workers.
    pub(super) fn take(&mut self, seen: &Seen, spent: Option<Duration>) {
        self.requests += seen.requests;
        self.rate.push(seen.requests as f64 / seen.seconds);
        self.p50.push(seen.p50_us as f64);
        self.p90.push(seen.p90_us as f64);
        self.p99.push(seen.p99_us as f64);
        if let Some(spent) = spent {
            // Milliseconds per 1,000 requests are microseconds per request.
            self.cpu.push(spent.as_secs_f64() * 1e6 / seen.requests as f64);
        }
    }
}

impl Row {
    /// Rows of one load: the first went through nothing, the second through the relay.
    pub(super) fn of(tallies: impl Iterator<Item = Tally>) -> anyhow::Result<Vec<Self>> {
        let mut rows = tallies.map(Self::alone).collect::<anyhow::Result<Vec<_>>>()?;
        let direct = rows.first().map(|row| row.p50_us.median);
        let relay = rows.get(1).and_then(|row| row.cpu_ms_per_1000).map(|cpu| cpu.median);
        for row in rows.iter_mut().skip(1) {
            row.added_p50_us = direct.map(|direct| row.p50_us.median - direct);
        }
        for row in rows.iter_mut().skip(2) {
            row.cpu_of_relay = row.cpu_ms_per_1000.zip(relay).map(|(through, relay)| through.median / relay);
        }
        Ok(rows)
    }

    fn alone(tally: Tally) -> anyhow::Result<Self> {
        let spread = |samples: &Samples| samples.spread().context("no round was measured");
        Ok(Self {
            requests_per_second: spread(&tally.rate)?,
            p50_us: spread(&tally.p50)?,
            p90_us: spread(&tally.p90)?,
            p99_us: spread(&tally.p99)?,
            cpu_ms_per_1000: tally.cpu.spread(),
            cpu_of_relay: None,
            added_p50_us: None,
            prompt_bytes: tally.prompt_bytes,
            connections: tally.connections,
            through: tally.through,
            requests: tally.requests,
        })
    }
}

impl Report {
    /// What another run can be held against.
    pub fn figures(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for row in &self.rows {
            let Row { prompt_bytes, connections, through, .. } = row;
            let name = format!("proxy, through {through}: {prompt_bytes} B, {connections} connections");
            let is_machine = through == "direct" || through == "relay";
            // The relay moves the same bytes over the same sockets.
            let same = |other: &&Row| {
                (other.prompt_bytes, other.connections) == (*prompt_bytes, *connections) && other.through == "relay"
            };
            let relay = self.rows.iter().find(same).filter(|_| !is_machine);
            let p50 = Figure::new(format!("{name}, p50"), Unit::Microseconds, row.p50_us);
            figures.push(p50.beside(relay.map(|relay| relay.p50_us.median)).of_machine(is_machine));
            if let Some(cpu) = row.cpu_ms_per_1000 {
                let spent = Figure::new(format!("{name}, processor"), Unit::CpuPerThousand, cpu);
                let control = relay.and_then(|relay| relay.cpu_ms_per_1000).map(|cpu| cpu.median);
                figures.push(spent.beside(control).of_machine(is_machine));
            }
        }
        figures
    }
}

impl Report {
    /// As tables.
    pub fn tables(&self) -> Vec<Table> {
        let columns = [
            "through",
            "prompt bytes",
            "connections",
            "req/s",
            "p50 µs",
            "p25",
            "p75",
            "p90 µs",
            "p99 µs",
            "added p50 µs",
            "CPU ms/1000",
            "p25",
            "p75",
            "of relay",
            "requests",
        ];
        let mut table = Table::new(&columns, 1);
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        for row in &self.rows {
            let mut cells = vec![row.through.clone(), row.prompt_bytes.to_string(), row.connections.to_string()];
            let Spread { median, p25, p75, .. } = row.p50_us;
            cells.push(format!("{:.0}", row.requests_per_second.median));
            cells.extend([median, p25, p75, row.p90_us.median, row.p99_us.median].map(|value| format!("{value:.0}")));
            cells.push(or_dash(row.added_p50_us.map(|added| format!("{added:.0}"))));
            let cpu = row.cpu_ms_per_1000;
            for part in [cpu.map(|cpu| cpu.median), cpu.map(|cpu| cpu.p25), cpu.map(|cpu| cpu.p75)] {
                cells.push(or_dash(part.map(|value| format!("{value:.1}"))));
            }
            cells.push(or_dash(row.cpu_of_relay.map(|times| format!("{times:.2}"))));
            cells.push(row.requests.to_string());
            table.row(cells);
        }
        let mut tables = vec![table.titled("requests between mock workers")];
        if let Some(memory) = &self.memory {
            let title =
                format!("memory with {} requests in flight, {} before", memory.inflight, mib(memory.before_bytes));
            let mut table = Table::new(&["wave", "at most", "after", "errors"], 0);
            for (number, wave) in memory.waves.iter().enumerate() {
                let Wave { errors, peak_bytes, after_bytes, .. } = wave;
                let cells = [(number + 1).to_string(), mib(*peak_bytes), mib(*after_bytes), errors.to_string()];
                table.row(cells.to_vec());
            }
            tables.push(table.titled(title));
        }
        tables
    }

    /// What else is to be said.
    pub fn notes(&self) -> Vec<String> {
        let waves = self.memory.iter().flat_map(|memory| &memory.waves);
        let errors = waves.filter_map(|wave| wave.first_error.as_ref());
        errors.map(|error| format!("a request in flight failed: {error}")).collect()
    }
}

fn mib(bytes: u64) -> String {
    size(bytes >> 20 << 20)
}
