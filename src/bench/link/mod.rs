//! How fast a path moves bytes between two processes, and what share that is of what the machine can do.
//!
//! The other process is this program again. Every measurement alternates with its ceiling: between GPUs the driver's own copy,
//! else for `shm` and `nixl` a parallel memcpy on as many threads, for `tcp` as many plain sockets with read and write loops,
//! each the faster of two ways to share the work. Both walk through memory larger than the caches, so that both find it equally
//! cold. Before a line is measured, one transfer of its kind is compared byte for byte.

pub mod canary;
mod ceiling;
mod peer;
mod workload;

use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

pub use peer::{Holding, Orders, Ready, hold, serve as serve_peer};

pub(super) use self::ceiling::{Ceiling, FILL_BYTES, fill};
use self::peer::Peer;
pub(super) use self::peer::memory;
use self::workload::Window;
pub(super) use self::workload::{is_noise, noise, scattered};
use super::environment::Environment;
use super::stats::{Samples, Spread};
use super::table::{Table, size};
use crate::config::{NcclConfig, NixlConfig, Path};
use crate::memory::{Region, to_usize};
use crate::security::Secret;
use crate::transport::{Direction, GrantToken, Link, RunList, TransferRequest, Transport};

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    pub paths: Vec<Path>,
    /// Sizes of whole transfers.
    pub bytes: Vec<u64>,
    /// Sizes of the scattered runs that they consist of.
    pub run_bytes: Vec<u64>,
    /// Threads that copy (`shm`), or sockets (`tcp`).
    pub threads: usize,
    /// Time per line of the table.
    pub seconds: f64,
    pub push: bool,
    /// GPU of this process and of the other. Without them `cuda-ipc` takes the first for both, `nccl` the first two, and
    /// `nixl` host memory.
    pub gpus: Option<[i32; 2]>,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub path: &'static str,
    pub bytes: u64,
    pub run_bytes: u64,
    pub threads: usize,
    pub gigabytes_per_second: Spread,
    pub ceiling_gigabytes_per_second: Spread,
    /// Median over median.
    pub share_of_ceiling: f64,
}

/// One short run at a time.
#[derive(Debug, Clone, Serialize)]
pub struct Latency {
    pub path: &'static str,
    pub run_bytes: u64,
    pub microseconds: Spread,
    pub p99_microseconds: f64,
}

/// All that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub environment: Environment,
    pub direction: &'static str,
    pub latency: Vec<Latency>,
    pub rows: Vec<Row>,
}

/// Longest wait for one transfer, and for the other process.
const PATIENCE: Duration = Duration::from_secs(60);
/// Memory walked through, so that nothing is met again while a cache still has it.
const SPAN_BYTES_MIN: u64 = 256 << 20;
const LATENCY_BYTES: u64 = 4096;
/// What our memory is filled with before a push is checked.
const OUR_SEED: u64 = 11;
const LATENCY_ROUNDS_MAX: usize = 20_000;

/// Measures, telling each line as it is known.
pub fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let environment = Environment::current();
    tell(&format!("{environment}\n"));
    let largest = options.bytes.iter().copied().max().context("no size to measure")?;
    let span = SPAN_BYTES_MIN.max(2 * largest);
    let direction = if options.push { Direction::Push } else { Direction::Pull };
    let mut report = Report { environment, direction: name(direction), latency: Vec::new(), rows: Vec::new() };
    for path in &options.paths {
        let rig = Rig::new(*path, options, direction, span)?;
        report.latency.push(rig.latency(options)?);
        for &bytes in &options.bytes {
            for &run_bytes in options.run_bytes.iter().filter(|run_bytes| **run_bytes <= bytes) {
                report.rows.push(rig.row(bytes, run_bytes, options)?);
            }
        }
        rig.close();
    }
    tell(&report.to_string());
    Ok(report)
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
        push: direction == Direction::Push,
        gpus: None,
    };
    let rig = Rig::new(path, &options, direction, SPAN_BYTES_MIN.max(2 * bytes))?;
    rig.check(bytes, run_bytes)?;
    let (mut window, mut took) = (Window::new(rig.span, bytes), Vec::new());
    let until = Instant::now() + Duration::from_secs_f64(seconds);
    while took.len() < 6 || Instant::now() < until {
        took.push(rig.transfer(workload::scattered(window.next(), bytes, run_bytes))?);
    }
    rig.close();
    // The first only warms up.
    Ok(took.split_off(1))
}

fn name(direction: Direction) -> &'static str {
    match direction {
        Direction::Pull => "pull",
        Direction::Push => "push",
    }
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

/// Both processes, connected over one path, and the ceiling beside it.
struct Rig {
    path: Path,
    direction: Direction,
    region: Arc<Region>,
    transport: Arc<dyn Transport>,
    link: Arc<dyn Link>,
    ceiling: Ceiling,
    grant: GrantToken,
    span: u64,
    /// The other process, where it is ours.
    _peer: Option<Peer>,
}

impl Rig {
    fn new(path: Path, options: &Options, direction: Direction, span: u64) -> anyhow::Result<Self> {
        let secret = SecretFile::new()?;
        let [our_gpu, peer_gpu] = gpus(path, options.gpus);
        let orders = |gpu| Orders {
            path,
            span,
            threads: options.threads,
            gpu,
            secret_file: secret.path.clone(),
            nixl: NixlConfig::default(),
            nccl: NcclConfig::default(),
        };
        let (peer, ready) = Peer::start(&orders(peer_gpu))?;
        Ok(Self { _peer: Some(peer), ..Self::joined(&orders(our_gpu), &ready, direction, |ours| ours)? })
    }

    /// Connects to an end that stands elsewhere, over what `around` makes of our transport.
    fn joined(
        orders: &Orders,
        ready: &Ready,
        direction: Direction,
        around: impl FnOnce(Arc<dyn Transport>) -> Arc<dyn Transport>,
    ) -> anyhow::Result<Self> {
        let &Orders { path, span, threads, gpu, .. } = orders;
        let region = memory(span, gpu)?;
        let secret = Secret::read_file(&orders.secret_file)?;
        let transport = around(peer::open(orders, &region, &secret)?);
        let link =
            transport.connect(&ready.export, Instant::now() + PATIENCE).context("connecting to the other process")?;
        let ceiling = match path {
            Path::Tcp => Ceiling::sockets(ready.plain_port, threads, region.clone())?,
            _ if gpu.is_some() => Ceiling::gpu(ready.gpu_memory.as_ref(), &region)?,
            _ => Ceiling::memcpy(threads, region.clone())?,
        };
        Ok(Self { path, direction, region, transport, link, ceiling, grant: ready.grant, span, _peer: None })
    }

    /// Holds every byte of one transfer against what it must be: a fast copy of wrong bytes is worth nothing. What was pushed
    /// is pulled back in one run.
    fn check(&self, bytes: u64, run_bytes: u64) -> anyhow::Result<()> {
        let runs = workload::scattered(0, bytes, run_bytes);
        let seed = match self.direction {
            Direction::Pull => {
                self.region.fill(0, bytes, 0)?;
                self.transfer(runs.clone())?;
                peer::SEED
            }
            Direction::Push => {
                fill(&self.region, OUR_SEED)?;
                self.transfer(runs.clone())?;
                self.region.fill(0, bytes, 0)?;
                self.move_by(Direction::Pull, workload::scattered(0, bytes, bytes))?;
                OUR_SEED
            }
        };
        let block = noise(to_usize(FILL_BYTES), seed);
        let got = self.region.to_vec(0, bytes)?;
        for run in runs.segments.iter().flat_map(|segment| &segment.runs) {
            let got = &got[to_usize(run.dst)..to_usize(run.dst + run.len)];
            ensure!(is_noise(got, run.src, &block), "{} brought wrong bytes: {run:?}", self.path.name());
        }
        Ok(())
    }

    /// Seconds that one transfer took.
    fn transfer(&self, runs: RunList) -> anyhow::Result<f64> {
        self.move_by(self.direction, runs)
    }

    fn move_by(&self, direction: Direction, runs: RunList) -> anyhow::Result<f64> {
        let bytes = runs.bytes();
        let (tell, told) = mpsc::channel();
        let grant = (direction == Direction::Push).then_some(self.grant);
        let request = TransferRequest { direction, runs, grant, deadline: Instant::now() + PATIENCE };
        let started = Instant::now();
        self.link.submit(request, Box::new(move |outcome| drop(tell.send((outcome, Instant::now())))));
        let (outcome, ended) = told.recv().context("the link dropped a completion")?;
        if outcome.context("transfer")?.bytes != bytes {
            bail!("a transfer of {bytes} bytes ended with another number");
        }
        Ok((ended - started).as_secs_f64())
    }

    fn row(&self, bytes: u64, run_bytes: u64, options: &Options) -> anyhow::Result<Row> {
        self.check(bytes, run_bytes)?;
        let mut window = Window::new(self.span, bytes);
        let (mut ours, mut theirs) = (Samples::default(), Samples::default());
        let until = Instant::now() + Duration::from_secs_f64(options.seconds);
        // In turns, so that whatever else the machine does meets both alike; the first round only warms up.
        while ours.len() < 5 || Instant::now() < until {
            let at = window.next();
            let moved = self.transfer(workload::scattered(at, bytes, run_bytes))?;
            let ceiling = self.ceiling.run_at([window.next(), window.next()], bytes)?;
            ours.push(rate(bytes, moved));
            theirs.push(rate(bytes, ceiling));
        }
        let (ours, theirs) = (ours.spread().context("no sample")?, theirs.spread().context("no sample")?);
        Ok(Row {
            path: self.path.name(),
            bytes,
            run_bytes,
            threads: options.threads,
            gigabytes_per_second: ours,
            ceiling_gigabytes_per_second: theirs,
            share_of_ceiling: ours.median / theirs.median,
        })
    }

    fn latency(&self, options: &Options) -> anyhow::Result<Latency> {
        let mut window = Window::new(self.span, LATENCY_BYTES);
        let mut took = Samples::default();
        let until = Instant::now() + Duration::from_secs_f64(options.seconds);
        while took.len() < 100 || (Instant::now() < until && took.len() < LATENCY_ROUNDS_MAX) {
            let runs = workload::scattered(window.next(), LATENCY_BYTES, LATENCY_BYTES);
            took.push(self.transfer(runs)? * 1e6);
        }
        let p99_microseconds = took.quantile(0.99).context("no sample")?;
        let microseconds = took.spread().context("no sample")?;
        Ok(Latency { path: self.path.name(), run_bytes: LATENCY_BYTES, microseconds, p99_microseconds })
    }

    fn close(self) {
        self.link.close();
        self.transport.close();
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

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut latency = Table::new(&["path", "one run", "median µs", "min µs", "p99 µs", "rounds"], 1);
        for Latency { path, run_bytes, microseconds: took, p99_microseconds } in &self.latency {
            let micros = |value: f64| format!("{value:.1}");
            let (median, min, p99) = (micros(took.median), micros(took.min), micros(*p99_microseconds));
            latency.row(vec![(*path).to_owned(), size(*run_bytes), median, min, p99, took.count.to_string()]);
        }
        let columns =
            ["path", "total", "runs of", "threads", "GB/s", "min", "max", "ceiling", "min", "max", "share", "rounds"];
        let mut rates = Table::new(&columns, 1);
        for row in &self.rows {
            let mut cells = vec![row.path.to_owned(), size(row.bytes), size(row.run_bytes), row.threads.to_string()];
            for spread in [row.gigabytes_per_second, row.ceiling_gigabytes_per_second] {
                cells.extend([spread.median, spread.min, spread.max].map(|value| format!("{value:.2}")));
            }
            cells.push(format!("{:.0} %", row.share_of_ceiling * 100.0));
            cells.push(row.gigabytes_per_second.count.to_string());
            rates.row(cells);
        }
        write!(f, "\n{latency}\n{rates}")
    }
}
