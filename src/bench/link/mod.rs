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

use std::time::{Duration, Instant};

use anyhow::Context;

pub use peer::{Holding, Orders, Ready, hold, serve as serve_peer};

pub use report::{Latency, Report, Row};

pub(super) use self::ceiling::{Ceiling, FILL_BYTES};
use self::peer::Peer;
pub(super) use self::peer::{Held, fits, loopback, memory};
pub(super) use self::plain::Plain;
use self::rig::{Case, PASSES, Rig, Tally};
use self::workload::Window;
pub(super) use self::workload::{noise, scattered};
use super::partner::Place;
use crate::config::{NcclConfig, NixlConfig, Path};
use crate::security::Secret;
use crate::transport::Direction;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    pub paths: Vec<Path>,
    /// Sizes of whole transfers.
    pub bytes: Vec<u64>,
    /// Sizes of the scattered runs that they consist of; a smaller transfer is one run.
    pub run_bytes: Vec<u64>,
    /// Threads that copy (`shm`), or sockets (`tcp`).
    pub threads: usize,
    /// Time per line of the table.
    pub seconds: f64,
    pub ways: Vec<Way>,
    /// Numbers of transfers under way at once.
    pub at_once: Vec<usize>,
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
    let cases = cases(options);
    let whole = |case: &Case| case.bytes * case.at_once as u64 * way.directions().len() as u64;
    let largest = cases.iter().map(whole).max().context("no size to measure")?;
    let rig = rig(options, path, way, SPAN_BYTES_MIN.max(2 * largest))?;
    rig.check_all(&cases)?;
    if way != Way::Both {
        report.latency.push(rig.latency(options.seconds)?);
    }
    let mut tallies: Vec<Tally> = cases.iter().map(|_| Tally::default()).collect();
    for _ in 0..PASSES {
        for (case, tally) in cases.iter().zip(&mut tallies) {
            rig.measure(*case, options.seconds / PASSES as f64, tally)?;
        }
    }
    for (case, tally) in cases.iter().zip(&tallies) {
        report.rows.push(rig.row(*case, tally)?);
    }
    rig.close();
    Ok(())
}

/// Every line of the table, each once.
fn cases(options: &Options) -> Vec<Case> {
    let mut cases = Vec::new();
    for &at_once in &options.at_once {
        for &bytes in &options.bytes {
            for &run_bytes in &options.run_bytes {
                let case = Case { bytes, run_bytes: run_bytes.min(bytes), at_once };
                if !cases.contains(&case) {
                    cases.push(case);
                }
            }
        }
    }
    cases
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

/// Seconds of each of many transfers over a path between two processes, once one has been compared byte for byte.
pub(super) fn timings(
    path: Path,
    direction: Direction,
    [bytes, run_bytes]: [u64; 2],
    threads: usize,
    seconds: f64,
) -> anyhow::Result<Vec<f64>> {
    let options = Options {
        paths: vec![path],
        bytes: vec![bytes],
        run_bytes: vec![run_bytes],
        threads,
        seconds,
        ways: vec![direction.into()],
        at_once: vec![1],
        place: Place::Here,
        gpus: None,
    };
    let rig = rig(&options, path, direction.into(), SPAN_BYTES_MIN.max(2 * bytes))?;
    rig.check(direction, bytes, run_bytes)?;
    let (mut window, mut took) = (Window::new(rig.span, bytes), Vec::new());
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    while took.len() < 6 || Instant::now() < until {
        took.push(rig.transfer(direction, scattered(window.next(), bytes, run_bytes))?);
    }
    rig.close();
    // The first only warms up.
    Ok(took.split_off(1))
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
