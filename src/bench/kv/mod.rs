//! The KV of whole requests between two real processes, through the runtime: claim, run list, copy, validation, reports.
//!
//! Every round alternates with a parallel memcpy of as many bytes on as many threads, or between GPUs with the driver's own
//! copy. Before a line is measured, one request of its kind is compared byte for byte. `fetch` is what a request waits for
//! once its blocks are there, from the call to the report on another thread; its claim was answered before. `whole` begins
//! with the claim. Neither holds the time of an engine.

mod peer;
mod python;
mod shape;

use std::net::TcpListener;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;

pub use peer::serve as serve_peer;
pub use shape::{Layout, Shape};

use self::peer::{Orders, Peer};
use super::environment::Environment;
use super::link::{self, Ceiling};
use super::stats::{Samples, Spread};
use super::table::{Table, size};
use crate::config::{DigestPolicy, KvConfig, KvSendType, Path, Role};
use crate::kv::{
    End, Geometry, KvLink, KvMetrics, KvRuntime, RankMemory, Report as TransferReport, RuntimeConfig, TransferId,
};
use crate::telemetry::TransferRecord;

/// Longest wait for one transfer, and for the other process.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time that a claim is given to be answered where it is not to be measured.
const CLAIM_PAUSE: Duration = Duration::from_millis(2);
/// Requests whose blocks are gone through in turn, so that no cache keeps them.
const REQUESTS: u32 = 3;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    pub paths: Vec<Path>,
    pub shape: Shape,
    pub layout: Layout,
    pub tokens: Vec<u32>,
    pub block_size: u32,
    pub send_types: Vec<KvSendType>,
    /// Threads that copy (`shm`), or sockets (`tcp`), on each side.
    pub threads: usize,
    /// Digest every transfer (KV-4).
    pub digest: bool,
    /// GPU of this process, which decodes, and of the other. Without them `cuda-ipc` takes the first for both, and `nixl`
    /// keeps its KV in host memory.
    pub gpus: Option<[i32; 2]>,
    /// Time per line of the table.
    pub seconds: f64,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub path: &'static str,
    pub send_type: &'static str,
    pub blocks: &'static str,
    pub tokens: u32,
    pub bytes: u64,
    pub runs: u64,
    pub posts: u64,
    /// From `fetch` to the report.
    pub fetch_us: Spread,
    pub fetch_p99_us: f64,
    /// From `expect` to the report.
    pub whole_us: Spread,
    /// Parts of `fetch`, as the records have them.
    pub copy_us: f64,
    pub validate_us: f64,
    pub gigabytes_per_second: Spread,
    pub ceiling_gigabytes_per_second: Spread,
    pub share_of_ceiling: f64,
}

/// All that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub environment: Environment,
    pub shape: &'static str,
    pub block_size: u32,
    pub threads: usize,
    pub digest: bool,
    pub rows: Vec<Row>,
    /// With `nixl` in host memory: the same runs by NIXL's own Python API, or why that was not measured.
    pub nixl_api: Option<Result<Vec<python::Row>, String>>,
}

/// Measures, telling each part as it is known.
pub fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let environment = Environment::current();
    tell(&format!("{environment}\n"));
    let Options { shape, block_size, threads, digest, .. } = *options;
    let mut report =
        Report { environment, shape: shape.name(), block_size, threads, digest, rows: Vec::new(), nixl_api: None };
    for path in &options.paths {
        for send_type in &options.send_types {
            let mut rig = Rig::new(options, *path, *send_type)?;
            for tokens in &options.tokens {
                for scattered in [false, true] {
                    report.rows.push(rig.row(options, *tokens, scattered)?);
                }
            }
            rig.close();
        }
    }
    if options.paths.contains(&Path::Nixl) && options.gpus.is_none() {
        let measure = |python: std::path::PathBuf| python::rows(&python, threads, options.seconds);
        report.nixl_api =
            Some(python::interpreter().map(measure).map_or_else(|why| Ok(Err(why)), |rows| rows.map(Ok))?);
    }
    tell(&report.to_string());
    Ok(report)
}

/// One worker's runtime.
struct Worker {
    runtime: KvRuntime,
    reports: Arc<Mutex<Option<Sender<TransferReport>>>>,
}

impl Worker {
    fn start(
        orders: &Orders,
        geometry: Geometry,
        memory: RankMemory,
        role: Role,
        listener: TcpListener,
    ) -> anyhow::Result<Self> {
        let reports: Arc<Mutex<Option<Sender<TransferReport>>>> = Arc::default();
        let to = Arc::clone(&reports);
        let config = RuntimeConfig {
            kv: &orders.kv,
            engine_id: role.name().to_owned(),
            role,
            send_type: orders.send_type,
            geometry,
            ranks: vec![memory],
            siblings: Vec::new(),
            secret: peer::secret(),
            listener,
            advertise_host: "127.0.0.1".to_owned(),
            weight_version: 0,
            weights: None,
            transports: None,
            metrics: KvMetrics::unregistered(),
        };
        let sink = move |report| {
            if let Some(sender) = &*to.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = sender.send(report);
            }
        };
        Ok(Self { runtime: KvRuntime::start(config, Box::new(sink))?, reports })
    }

    /// Where reports go from now on.
    fn tell(&self, sender: Sender<TransferReport>) {
        *self.reports.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
    }
}

/// Both workers, and the memcpy beside them.
struct Rig {
    path: Path,
    orders: Orders,
    geometry: Geometry,
    memory: RankMemory,
    peer: Peer,
    decode: Worker,
    reports: Receiver<TransferReport>,
    ceiling: Ceiling,
    span: u64,
    turn: u32,
}

/// What one round came to.
struct Round {
    fetch_s: f64,
    whole_s: f64,
    record: TransferRecord,
}

impl Rig {
    fn new(options: &Options, path: Path, send_type: KvSendType) -> anyhow::Result<Self> {
        let geometry = options.shape.geometry(options.block_size);
        let most = options.tokens.iter().copied().max().context("no number of tokens to measure")?;
        ensure!(most > 0 && options.block_size > 0, "tokens and block size must be at least 1");
        let kv = KvConfig {
            paths: Some(vec![path]),
            digest: if options.digest { DigestPolicy::Every } else { DigestPolicy::Off },
            copy_threads: Some(options.threads),
            tcp_streams: options.threads,
            ..KvConfig::default()
        };
        let num_blocks = geometry.groups[0].blocks_for(most).max(8) * REQUESTS;
        let (shape, layout, block_size) = (options.shape, options.layout, options.block_size);
        let span = (geometry.token_bytes() * u64::from(num_blocks * block_size)).min(1 << 30);
        let [our_gpu, gpu] = link::gpus(path, options.gpus);
        let orders = Orders { kv, shape, layout, block_size, num_blocks, send_type, gpu, span };
        let peer = Peer::start(&orders)?;
        let memory = shape::memory(&geometry, layout, num_blocks, our_gpu)?;
        let decode =
            Worker::start(&orders, geometry.clone(), memory.clone(), Role::Decode, TcpListener::bind("127.0.0.1:0")?)?;
        let (sender, reports) = channel();
        decode.tell(sender);
        let dst = link::memory(span, our_gpu)?;
        let ceiling = match our_gpu {
            Some(_) => Ceiling::gpu(peer.gpu_memory.as_ref(), &dst)?,
            None => Ceiling::memcpy(options.threads, dst)?,
        };
        Ok(Self { path, orders, geometry, memory, peer, decode, reports, ceiling, span, turn: 0 })
    }

    fn row(&mut self, options: &Options, tokens: u32, scattered: bool) -> anyhow::Result<Row> {
        let (mut fetch, mut whole, mut copy, mut validate) =
            (Samples::default(), Samples::default(), Samples::default(), Samples::default());
        let (mut rate, mut ceiling) = (Samples::default(), Samples::default());
        // Connects, and meets every page once.
        for _ in 0..REQUESTS {
            self.check(tokens, scattered)?;
        }
        let mut last = self.round(tokens, scattered, true)?.record;
        let until = Instant::now() + Duration::from_secs_f64(options.seconds);
        while fetch.len() < 5 || Instant::now() < until {
            let claimed = self.round(tokens, scattered, true)?;
            whole.push(self.round(tokens, scattered, false)?.whole_s * 1e6);
            fetch.push(claimed.fetch_s * 1e6);
            copy.push(claimed.record.copy_us as f64);
            validate.push(claimed.record.validate_us as f64);
            rate.push(claimed.record.bytes as f64 / claimed.fetch_s / 1e9);
            let bytes = claimed.record.bytes.min(self.span);
            let at = u64::from(self.turn) * bytes % (self.span - bytes + 1);
            ceiling.push(bytes as f64 / self.ceiling.run(at, bytes)? / 1e9);
            last = claimed.record;
        }
        let spread = |samples: &Samples| samples.spread().context("no sample");
        let (gigabytes_per_second, ceiling_gigabytes_per_second) = (spread(&rate)?, spread(&ceiling)?);
        Ok(Row {
            path: self.path.name(),
            send_type: self.orders.send_type.name(),
            blocks: if scattered { "scattered" } else { "adjacent" },
            tokens,
            bytes: last.bytes,
            runs: last.runs,
            posts: last.posts,
            fetch_us: spread(&fetch)?,
            fetch_p99_us: fetch.quantile(0.99).context("no sample")?,
            whole_us: spread(&whole)?,
            copy_us: spread(&copy)?.median,
            validate_us: spread(&validate)?.median,
            gigabytes_per_second,
            ceiling_gigabytes_per_second,
            share_of_ceiling: gigabytes_per_second.median / ceiling_gigabytes_per_second.median,
        })
    }

    /// Moves one request. With `claim_first` its claim is answered before the clock of `fetch` starts.
    fn round(&mut self, tokens: u32, scattered: bool, claim_first: bool) -> anyhow::Result<Round> {
        self.turn = (self.turn + 1) % REQUESTS;
        let count = self.geometry.groups[0].blocks_for(tokens);
        let first = self.turn * (self.orders.num_blocks / REQUESTS);
        let params = self.peer.offer(first, scattered, tokens)?;
        let blocks = shape::blocks(first, count, self.orders.num_blocks, scattered);
        let expected = Instant::now();
        let handle = self.decode.runtime.expect(&params)?;
        if claim_first {
            std::thread::sleep(CLAIM_PAUSE);
        }
        let fetched = Instant::now();
        self.decode.runtime.fetch(handle, vec![blocks], 0);
        let report = self.reports.recv_timeout(PATIENCE).context("no end of a transfer")?;
        let ended = Instant::now();
        ensure!(report.end == End::Received, "transfer {} failed: {:?}", report.transfer_id, report.end);
        let record = self.record(report.transfer_id)?;
        Ok(Round { fetch_s: (ended - fetched).as_secs_f64(), whole_s: (ended - expected).as_secs_f64(), record })
    }

    /// Moves one request, and holds every byte of its whole blocks against what the prefill worker has.
    fn check(&mut self, tokens: u32, scattered: bool) -> anyhow::Result<()> {
        shape::clear(&self.memory)?;
        self.round(tokens, scattered, true)?;
        let first = self.turn * (self.orders.num_blocks / REQUESTS);
        let whole = tokens / self.orders.block_size;
        shape::check(&self.memory, &shape::blocks(first, whole, self.orders.num_blocks, scattered))
    }

    fn record(&self, transfer_id: TransferId) -> anyhow::Result<TransferRecord> {
        self.decode.runtime.record(transfer_id).context("no record of a transfer")
    }

    fn close(self) {
        self.decode.runtime.shutdown();
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { shape, block_size, threads, digest, .. } = self;
        let digest = if *digest { ", every transfer digested" } else { "" };
        writeln!(f, "\n{shape}, blocks of {block_size} tokens, {threads} threads{digest}\n")?;
        let columns = [
            "path",
            "send type",
            "blocks",
            "tokens",
            "total",
            "runs",
            "fetch µs",
            "min",
            "p99",
            "copy",
            "validate",
            "whole µs",
            "GB/s",
            "memcpy",
            "share",
            "rounds",
        ];
        let mut table = Table::new(&columns, 3);
        for row in &self.rows {
            let micros = |value: f64| format!("{value:.1}");
            table.row(vec![
                row.path.to_owned(),
                row.send_type.to_owned(),
                row.blocks.to_owned(),
                row.tokens.to_string(),
                size(row.bytes),
                row.runs.to_string(),
                micros(row.fetch_us.median),
                micros(row.fetch_us.min),
                micros(row.fetch_p99_us),
                micros(row.copy_us),
                micros(row.validate_us),
                micros(row.whole_us.median),
                format!("{:.2}", row.gigabytes_per_second.median),
                format!("{:.2}", row.ceiling_gigabytes_per_second.median),
                format!("{:.0} %", row.share_of_ceiling * 100.0),
                row.fetch_us.count.to_string(),
            ]);
        }
        write!(f, "{table}")?;
        match &self.nixl_api {
            None => Ok(()),
            Some(Ok(rows)) => {
                write!(f, "\nthe same runs by NIXL's own Python API and by pdlink's path\n\n{}", python::table(rows))
            }
            Some(Err(why)) => writeln!(f, "\nNIXL's own Python API: skipped, {why}"),
        }
    }
}
