//! How fast a path moves bytes between two processes, and what share that is of what the machine can do.
//!
//! The other process is this program again. Every measurement alternates with its ceiling: between GPUs the driver's own copy,
//! else for `shm` and `nixl` a parallel memcpy on as many threads, for `tcp` as many plain sockets with read and write loops,
//! each the faster of two ways to share the work. Both walk through memory larger than the caches, so that both find it equally
//! cold. Before a line is measured, one transfer of its kind is compared byte for byte.

pub mod canary;
mod ceiling;
mod peer;
mod plain;
mod report;
mod rig;
mod workload;

use std::time::Duration;

use anyhow::Context;

pub use peer::{Holding, Orders, Ready, hold, serve as serve_peer};

pub use report::{Latency, Report, Row};
pub use rig::Case;

pub(super) use self::ceiling::{Ceiling, FILL_BYTES};
use self::peer::Peer;
pub(super) use self::peer::{Held, fits, loopback, memory};
pub(super) use self::plain::Plain;
use self::rig::{Rig, Tally};
use self::workload::Window;
pub(super) use self::workload::{noise, scattered};
use super::partner::Place;
use super::stats::Samples;
use super::turns::in_turns;
use crate::config::{NcclConfig, NixlConfig, Path};
use crate::memory::to_u64;
use crate::security::Secret;
use crate::transport::Direction;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    pub paths: Vec<Path>,
    /// Lines of the table, for each path and way.
    pub cases: Vec<Case>,
    /// Threads that copy (`shm`), or sockets (`tcp`).
    pub threads: usize,
    /// Time per line of the table; lines that are slower have it from the others.
    pub seconds: f64,
    pub ways: Vec<Way>,
    /// The other end.
    pub place: Place,
    /// GPU of this process and of the other. Without them `cuda-ipc` takes the first for both, `nccl` the first two, and
    /// `nixl` host memory.
    pub gpus: Option<[i32; 2]>,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Pull,
    Push,
    Both,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Pull => "pull",
            Self::Push => "push",
            Self::Both => "both",
        }
    }

    fn directions(self) -> &'static [Direction] {
        match self {
            Self::Pull => &[Direction::Pull],
            Self::Push => &[Direction::Push],
            Self::Both => &[Direction::Pull, Direction::Push],
        }
    }
}

impl From<Direction> for Way {
    fn from(direction: Direction) -> Self {
        match direction {
            Direction::Pull => Self::Pull,
            Direction::Push => Self::Push,
        }
    }
}

/// Longest wait for one transfer, and for the other process.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory walked through, so that nothing is met again while a cache still has it.
const SPAN_BYTES_MIN: u64 = 256 << 20;
/// No more of it is needed, but by transfers that are larger themselves.
const SPAN_BYTES_MAX: u64 = 1 << 30;

/// Memory to walk through with transfers of so many bytes.
pub(super) fn span(largest: u64) -> u64 {
    (2 * largest).clamp(SPAN_BYTES_MIN, SPAN_BYTES_MAX.max(largest))
}

/// Measures every path, every way.
pub fn run(options: &Options) -> anyhow::Result<Report> {
    let mut report = Report { other_host: options.place.other_host(), ..Report::default() };
    for path in &options.paths {
        for way in &options.ways {
            one_way(options, *path, *way, &mut report).with_context(|| format!("{} ({})", path.name(), way.name()))?;
        }
    }
    Ok(report)
}

fn one_way(options: &Options, path: Path, way: Way, report: &mut Report) -> anyhow::Result<()> {
    let mut cases = options.cases.clone();
    cases.sort_by_key(Case::bytes_at_once);
    let largest = cases.last().context("no size to measure")?.bytes_at_once() * to_u64(way.directions().len());
    let rig = rig(options, path, way, span(largest))?;
    rig.check_all(&cases)?;
    if way != Way::Both {
        report.latency.push(rig.latency(options.seconds)?);
    }
    let mut tallies: Vec<Tally> = cases.iter().map(|case| rig.tally(*case)).collect();
    in_turns(cases.len(), options.seconds, |line, counts| rig.round(&mut tallies[line], counts))?;
    // In the order in which they were asked for.
    for case in &options.cases {
        let tally = tallies.iter().find(|tally| tally.case == *case).context("a line was not measured")?;
        report.rows.push(rig.row(tally)?);
    }
    rig.close();
    Ok(())
}

/// Both ends of a path.
fn rig(options: &Options, path: Path, way: Way, span: u64) -> anyhow::Result<Rig> {
    let file = SecretFile::new()?;
    let [our_gpu, peer_gpu] = gpus(path, options.gpus);
    let orders = Orders {
        path,
        span,
        threads: options.threads,
        gpu: peer_gpu,
        secret_file: file.path.clone(),
        host: loopback(),
        nixl: NixlConfig::default(),
        nccl: NcclConfig::default(),
    };
    let (peer, ours, ready) = Peer::start(&options.place, &orders, our_gpu)?;
    let secret = match &options.place {
        Place::Here => Secret::read_file(&file.path)?,
        Place::There { secret, .. } => secret.clone(),
    };
    Ok(Rig::joined(&ours, &ready, way, &secret, |ours| ours)?.with(peer))
}

/// Seconds of each of many transfers of each kind over a path between two processes, once one of the kind has been compared byte
/// for byte. From the shortest to the longest.
pub(super) fn timings(
    path: Path,
    direction: Direction,
    cases: &[Case],
    threads: usize,
    seconds: f64,
) -> anyhow::Result<Vec<Samples>> {
    let ways = vec![direction.into()];
    let options =
        Options { paths: vec![path], cases: cases.to_vec(), threads, seconds, ways, place: Place::Here, gpus: None };
    let largest = cases.iter().map(|case| case.bytes).max().context("no size to measure")?;
    let rig = rig(&options, path, direction.into(), span(largest))?;
    rig.check_all(cases)?;
    let mut windows: Vec<Window> = cases.iter().map(|case| Window::new(rig.span, case.bytes)).collect();
    let mut took: Vec<Samples> = cases.iter().map(|_| Samples::default()).collect();
    in_turns(cases.len(), seconds, |line, counts| {
        let Case { bytes, run_bytes, .. } = cases[line];
        let seconds = rig.transfer(direction, scattered(windows[line].next(), bytes, run_bytes))?;
        if counts {
            took[line].push(seconds);
        }
        Ok(())
    })?;
    rig.close();
    Ok(took)
}

/// The GPU of this process and of the other, where the path is to move GPU memory.
pub(super) fn gpus(path: Path, named: Option<[i32; 2]>) -> [Option<i32>; 2] {
    match (path, named) {
        (Path::CudaIpc, None) => [Some(0); 2],
        (Path::Nccl, None) => [Some(0), Some(1)],
        (Path::CudaIpc | Path::Nccl | Path::Nixl, Some([ours, theirs])) => [Some(ours), Some(theirs)],
        _ => [None; 2],
    }
}

/// The secret that both ends read, for as long as they start.
pub struct SecretFile {
    pub path: std::path::PathBuf,
}

impl SecretFile {
    pub fn new() -> anyhow::Result<Self> {
        let name = format!("pdlink-bench-{}-{:08x}", std::process::id(), rand::random::<u32>());
        let path = std::env::temp_dir().join(name);
        Secret::generate()?.write_file(&path)?;
        Ok(Self { path })
    }
}

impl Drop for SecretFile {
    fn drop(&mut self) {
        // One that is gone already is as it should be.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// 10^9 bytes a second.
fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / seconds / 1e9
}

/// The Python environment that is active, whose wheels may have libraries.
pub(super) fn python_environment() -> Vec<std::path::PathBuf> {
    std::env::var_os("VIRTUAL_ENV").map(Into::into).into_iter().collect()
}
