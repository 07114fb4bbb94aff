//! The KV of whole requests between two real processes, through the runtime: claim, run list, copy, validation, reports.
//!
//! Every round alternates with a parallel memcpy of as many bytes on as many threads, for `tcp` and between hosts with as many
//! plain sockets, between GPUs with the driver's own copy. Before a line is measured, requests of its kind are compared byte for
//! byte. `fetch` is what a request waits for once its blocks are there, from the call to the report on another thread; its claim
//! was answered before. `whole` begins with the claim. Neither holds the time of an engine. Several requests at once go through
//! the same two runtimes, each into blocks of its own.

mod peer;
mod python;
mod report;
mod rig;
mod shape;

use std::time::Duration;

use anyhow::{Context, ensure};

pub use peer::serve as serve_peer;
pub use report::{Report, Row};
pub use rig::Case;
pub use shape::{Layout, Shape};

use self::rig::{Rig, Tally};
use super::partner::Place;
use super::turns::in_turns;
use crate::config::{KvSendType, Path};

/// Longest wait for one transfer, and for the other process.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    pub paths: Vec<Path>,
    pub shape: Shape,
    pub layout: Layout,
    /// Lines of the table, for each path and send type.
    pub cases: Vec<Case>,
    pub block_size: u32,
    pub send_types: Vec<KvSendType>,
    /// Threads that copy (`shm`), or sockets (`tcp`), on each side.
    pub threads: usize,
    /// Digest every transfer (KV-4).
    pub digest: bool,
    /// GPU of this process, which decodes, and of the other. Without them `cuda-ipc` takes the first for both, and `nixl`
    /// keeps its KV in host memory.
    pub gpus: Option<[i32; 2]>,
    /// Tensor-parallel ranks of the two workers, each with memory of its own.
    pub prefill_tp: u32,
    pub decode_tp: u32,
    /// The prefill worker.
    pub place: Place,
    /// Time per line of the table; lines that are slower have it from the others.
    pub seconds: f64,
}

/// Measures every path, whoever drives it.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let Options { shape, layout, block_size, threads, digest, prefill_tp, decode_tp, .. } = *options;
    ensure!(
        options.cases.iter().all(|case| case.tokens > 0 && case.at_once > 0) && block_size > 0,
        "tokens, requests at once and block size must be at least 1"
    );
    shape.check_tp(prefill_tp)?;
    shape.check_tp(decode_tp)?;
    let mut report = Report {
        shape: shape.name().to_owned(),
        layout: layout.name().to_owned(),
        prefill_tp,
        decode_tp,
        other_host: options.place.other_host(),
        block_size,
        threads,
        digest,
        rows: Vec::new(),
        nixl_api: None,
        nixl_api_skipped: None,
    };
    for path in &options.paths {
        for send_type in &options.send_types {
            let rows = rows(options, *path, *send_type);
            report.rows.extend(rows.with_context(|| format!("{} ({})", path.name(), send_type.name()))?);
        }
    }
    if options.paths.contains(&Path::Nixl) && options.gpus.is_none() && options.place.other_host().is_none() {
        match python::interpreter() {
            Ok(python) => report.nixl_api = Some(python::rows(&python, threads, options.seconds)?),
            Err(why) => report.nixl_api_skipped = Some(why),
        }
    }
    Ok(report)
}

fn rows(options: &Options, path: Path, send_type: KvSendType) -> anyhow::Result<Vec<Row>> {
    let mut rig = Rig::new(options, path, send_type)?;
    let mut cases = options.cases.clone();
    cases.sort_by_key(Case::tokens_at_once);
    rig.check_all(&cases)?;
    let mut tallies: Vec<Tally> = cases.iter().map(|_| Tally::default()).collect();
    in_turns(cases.len(), options.seconds, |line, counts| rig.measure(cases[line], &mut tallies[line], counts))?;
    // In the order in which they were asked for.
    let row = |case: &Case| {
        let line = cases.iter().position(|sorted| sorted == case).context("a line was not measured")?;
        rig.row(*case, &tallies[line])
    };
    let rows = options.cases.iter().map(row).collect();
    rig.close();
    rows
}
