//! NIXL's own Python API beside ours: two processes of the wheel's interpreter move the same runs, then two of this program.
//!
//! The interpreters run only while they are measured: an agent of theirs keeps a thread that polls.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path as FilePath, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::bench::link::{self, Case};
use crate::bench::stats::{Samples, Spread};
use crate::bench::table::{Table, size};
use crate::config::Path;
use crate::transport::Direction;

const PROGRAM: &str = include_str!("nixl_api.py");
/// Memory of each side, through which the runs wander.
const SPAN_BYTES: u64 = 256 << 20;
/// Runs of a transfer, and their length.
const CASES: [(u64, u64); 3] = [(2048, 16 << 10), (1, 32 << 20), (1, 4 << 10)];
const OUR_SEED: u64 = 1;
const PEER_SEED: u64 = 2;

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    pub operation: String,
    pub runs: u64,
    pub run_bytes: u64,
    /// One transfer, by NIXL's own Python API and by ours.
    pub api_us: Spread,
    pub ours_us: Spread,
    /// Median over median.
    pub times_as_fast: f64,
}

/// The interpreter of the environment that our own agents take their library from.
pub(super) fn interpreter() -> Result<PathBuf, String> {
    let environment = std::env::var_os("VIRTUAL_ENV").ok_or("no Python environment is active (VIRTUAL_ENV)")?;
    let python = FilePath::new(&environment).join("bin/python");
    let import = Command::new(&python).args(["-c", "import numpy, nixl._api"]).output();
    match import {
        Ok(output) if output.status.success() => Ok(python),
        Ok(_) => Err(format!("{} has no nixl and numpy", python.display())),
        Err(error) => Err(format!("{} cannot be run: {error}", python.display())),
    }
}

/// Measures all cases, each by NIXL's API and then by ours.
pub(super) fn rows(python: &FilePath, threads: usize, seconds: f64) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (direction, operation) in [(Direction::Pull, "READ"), (Direction::Push, "WRITE")] {
        for (runs, run_bytes) in CASES {
            let api = by_python(python, operation, runs, run_bytes, seconds)?;
            let case = Case::single(runs * run_bytes, run_bytes);
            let ours = link::timings(Path::Nixl, direction, &[case], threads, seconds)?;
            let spread = |samples: &Samples| {
                let micros: Samples = samples.iter().map(|took| took * 1e6).collect();
                micros.spread().context("no sample")
            };
            let ours = ours.first().context("no line")?;
            let (api_us, ours_us) = (spread(&api.into_iter().collect())?, spread(ours)?);
            let times_as_fast = api_us.median / ours_us.median;
            rows.push(Row { operation: operation.to_owned(), runs, run_bytes, api_us, ours_us, times_as_fast });
        }
    }
    Ok(rows)
}

fn by_python(python: &FilePath, operation: &str, runs: u64, run_bytes: u64, seconds: f64) -> anyhow::Result<Vec<f64>> {
    let open = |seed: u64| {
        let mut side = Side::start(python)?;
        let opened = side.ask(&json!({"verb": "open", "span": SPAN_BYTES, "seed": seed, "progress_thread": true}))?;
        Ok::<_, anyhow::Error>((side, opened))
    };
    let ((mut ours, our_memory), (mut peer, peer_memory)) = (open(OUR_SEED)?, open(PEER_SEED)?);
    ours.connect(peer_memory)?;
    peer.connect(our_memory)?;
    let (reads, list) = (operation == "READ", link::scattered(0, runs * run_bytes, run_bytes));
    let places = |end: fn(&crate::transport::Run) -> u64| {
        list.segments[0].runs.iter().map(|run| end(run) / run_bytes).collect::<Vec<u64>>()
    };
    let (source, target) = (places(|run| run.src), places(|run| run.dst));
    let windows: Vec<u64> = (0..SPAN_BYTES / (runs * run_bytes)).take(8).map(|window| window * runs).collect();
    let (receiver, seed) = if reads { (&mut ours, PEER_SEED) } else { (&mut peer, OUR_SEED) };
    receiver.ask(&json!({"verb": "clear"}))?;
    let measure = json!({
        "verb": "measure", "operation": operation, "run_bytes": run_bytes, "source": source, "target": target,
        "windows": windows, "seconds": seconds,
    });
    let took = serde_json::from_value(ours.ask(&measure)?)?;
    let check = json!({
        "verb": "wrong", "run_bytes": run_bytes, "source": source, "target": target,
        // Those that were certainly moved.
        "windows": windows[..windows.len().min(5)], "seed": seed,
    });
    let receiver = if reads { &mut ours } else { &mut peer };
    let wrong = receiver.ask(&check)?;
    ensure!(wrong == json!(0), "NIXL's own API brought {wrong} wrong runs");
    Ok(took)
}

/// One of the two interpreters. Ended when dropped.
struct Side {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Side {
    fn start(python: &FilePath) -> anyhow::Result<Self> {
        let mut child = Command::new(python)
            .args(["-c", PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting the wheel's interpreter")?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(input), Some(output)) = (input, output) else { anyhow::bail!("the interpreter has no pipes") };
        Ok(Self { child, input, output: BufReader::new(output) })
    }

    fn connect(&mut self, mut memory: Value) -> anyhow::Result<()> {
        memory["verb"] = json!("connect");
        self.ask(&memory).map(drop)
    }

    fn ask(&mut self, order: &Value) -> anyhow::Result<Value> {
        writeln!(self.input, "{order}")?;
        loop {
            let mut line = String::new();
            ensure!(self.output.read_line(&mut line)? > 0, "the interpreter ended over {}", order["verb"]);
            // The library talks, too.
            if let Some(answer) = line.strip_prefix('@') {
                return Ok(serde_json::from_str(answer)?);
            }
        }
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The rows as a table.
pub(super) fn table(rows: &[Row]) -> Table {
    let columns = ["NIXL", "runs", "of", "its Python API µs", "GB/s", "pdlink µs", "GB/s", "times", "rounds"];
    let mut table = Table::new(&columns, 1);
    for row in rows {
        let bytes = row.runs * row.run_bytes;
        let rate = |us: f64| format!("{:.2}", bytes as f64 / us / 1e3);
        table.row(vec![
            row.operation.clone(),
            row.runs.to_string(),
            size(row.run_bytes),
            format!("{:.1}", row.api_us.median),
            rate(row.api_us.median),
            format!("{:.1}", row.ours_us.median),
            rate(row.ours_us.median),
            format!("{:.1}", row.times_as_fast),
            format!("{}, {}", row.api_us.count, row.ours_us.count),
        ]);
    }
    table
}
