//! Two workers, one request after the other between them or several at once, and the ceiling beside it.

use std::net::{IpAddr, TcpListener};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use super::peer::{Orders, Peer};
use super::report::Row;
use super::shape;
use super::{Options, PATIENCE};
use crate::bench::link::{self, Ceiling};
use crate::bench::partner::Place;
use crate::bench::stats::{Samples, Spread};
use crate::config::{DigestPolicy, KvConfig, KvSendType, Path, Role};
use crate::kv::{
    BlockId, End, Geometry, GroupGeometry, KvLink, KvMetrics, KvRuntime, RankMemory, Report as TransferReport,
    RuntimeConfig, TransferId,
};
use crate::security::Secret;
use crate::telemetry::TransferRecord;

/// Time that a claim is given to be answered where it is not to be measured; several at once have more.
const CLAIM_PAUSE: Duration = Duration::from_millis(2);
const CLAIM_PAUSES_MAX: u32 = 16;
/// Requests, or groups of them, whose blocks are gone through in turn, so that no cache keeps them.
const REQUESTS: u32 = 3;

/// One worker's runtime.
pub(super) struct Worker {
    pub(super) runtime: KvRuntime,
    reports: Arc<Mutex<Option<Sender<TransferReport>>>>,
}

impl Worker {
    /// One whose peers reach it under `host`.
    pub(super) fn start(
        orders: &Orders,
        geometry: Geometry,
        ranks: Vec<RankMemory>,
        role: Role,
        host: IpAddr,
        secret: &Secret,
    ) -> anyhow::Result<Self> {
        let reports: Arc<Mutex<Option<Sender<TransferReport>>>> = Arc::default();
        let to = Arc::clone(&reports);
        let config = RuntimeConfig {
            kv: &orders.kv,
            engine_id: role.name().to_owned(),
            role,
            send_type: orders.send_type,
            geometry,
            ranks,
            siblings: Vec::new(),
            secret: secret.clone(),
            listener: TcpListener::bind((host, 0)).with_context(|| format!("cannot listen on {host}"))?,
            advertise_host: host.to_string(),
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
    pub(super) fn tell(&self, sender: Sender<TransferReport>) {
        *self.reports.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
    }
}

/// Both workers, and the ceiling beside them.
pub(super) struct Rig {
    path: Path,
    orders: Orders,
    geometry: Geometry,
    ranks: Vec<RankMemory>,
    peer: Peer,
    decode: Worker,
    reports: Receiver<TransferReport>,
    ceiling: Ceiling,
    span: u64,
    turn: u32,
}

/// What became of one request.
struct Moved {
    fetch_s: f64,
    whole_s: f64,
    record: TransferRecord,
}

/// What one round came to.
struct Round {
    /// In the order in which they ended.
    requests: Vec<Moved>,
    /// From the first fetch to the last report.
    together_s: f64,
}

impl Round {
    fn bytes(&self) -> u64 {
        self.requests.iter().map(|moved| moved.record.bytes).sum()
    }
}

/// One line: so many prompts at once, each of so many tokens, whose blocks lie next to each other or apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    pub(super) tokens: u32,
    pub(super) scattered: bool,
    pub(super) at_once: u32,
}

impl Case {
    pub fn new(tokens: u32, scattered: bool, at_once: u32) -> Self {
        Self { tokens, scattered, at_once }
    }

    /// All prompts from either kind of blocks, so many at once.
    pub fn all(tokens: &[u32], at_once: &[u32]) -> Vec<Self> {
        let each = |at_once: u32| tokens.iter().flat_map(move |&tokens| [false, true].map(|it| (tokens, it, at_once)));
        at_once.iter().flat_map(|&at_once| each(at_once)).map(|(tokens, it, n)| Self::new(tokens, it, n)).collect()
    }

    pub(super) fn tokens_at_once(&self) -> u64 {
        u64::from(self.tokens) * u64::from(self.at_once)
    }
}

/// Blocks of the workers: what these lines need, and as much again as keeps caches from having them.
fn num_blocks(group: &GroupGeometry, cases: &[Case]) -> anyhow::Result<u32> {
    let of = |case: &Case| {
        let requests = u64::from(case.at_once.max(REQUESTS));
        u64::from(group.blocks_for(case.tokens).max(8)) * requests
    };
    let most = cases.iter().map(of).max().context("no number of tokens to measure")?;
    u32::try_from(most).with_context(|| format!("{most} blocks are more than can be numbered: fewer tokens at once"))
}

/// What one line has come to so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    fetch: Samples,
    whole: Samples,
    copy: Samples,
    validate: Samples,
    rate: Samples,
    ceiling: Samples,
    last: Option<TransferRecord>,
}

impl Rig {
    pub(super) fn new(options: &Options, path: Path, send_type: KvSendType) -> anyhow::Result<Self> {
        let geometry = options.shape.geometry(options.block_size, options.decode_tp);
        let kv = KvConfig {
            paths: Some(vec![path]),
            digest: if options.digest { DigestPolicy::Every } else { DigestPolicy::Off },
            copy_threads: Some(options.threads),
            tcp_streams: options.threads,
            ..KvConfig::default()
        };
        let num_blocks = num_blocks(&geometry.groups[0], &options.cases)?;
        let bytes = geometry.token_bytes() * u64::from(num_blocks) * u64::from(options.block_size);
        let span = bytes.min(1 << 30);
        let [our_gpu, gpu] = link::gpus(path, options.gpus);
        let &Options { shape, layout, block_size, prefill_tp, threads, .. } = options;
        let orders =
            Orders { kv, shape, layout, block_size, tp: prefill_tp, num_blocks, send_type, gpu, span, threads };
        let peer = Peer::start(&options.place, &orders)?;
        let ranks = shape::ranks(&geometry, layout, num_blocks, our_gpu)?;
        let secret = match &options.place {
            Place::Here => Secret::loopback(),
            Place::There { secret, .. } => secret.clone(),
        };
        let decode = Worker::start(&orders, geometry.clone(), ranks.clone(), Role::Decode, peer.our_host(), &secret)?;
        let (sender, reports) = channel();
        decode.tell(sender);
        let elsewhere = options.place.other_host().is_some();
        let ceiling = match our_gpu {
            _ if path == Path::Tcp || elsewhere => Ceiling::sockets(&peer.ready.plain, threads, span, false)?,
            Some(_) => Ceiling::gpu(peer.ready.gpu_memory.as_ref(), &link::memory(span, our_gpu)?, false)?,
            None => Ceiling::memcpy(threads, link::memory(span, None)?)?,
        };
        Ok(Self { path, orders, geometry, ranks, peer, decode, reports, ceiling, span, turn: 0 })
    }

    /// Connects, meets every page once, and compares every byte.
    pub(super) fn check_all(&mut self, cases: &[Case]) -> anyhow::Result<()> {
        for case in cases {
            for _ in 0..self.places(*case).div_ceil(case.at_once) {
                self.check(*case)?;
            }
        }
        Ok(())
    }

    /// One round of a line.
    pub(super) fn measure(&mut self, case: Case, tally: &mut Tally, counts: bool) -> anyhow::Result<()> {
        let first_blocks = self.turn(case);
        let claimed = self.round(case, &first_blocks, true)?;
        if !counts {
            return Ok(());
        }
        let first_blocks = self.turn(case);
        let unclaimed = self.round(case, &first_blocks, false)?;
        tally.whole.extend(unclaimed.requests.iter().map(|moved| moved.whole_s * 1e6));
        tally.fetch.extend(claimed.requests.iter().map(|moved| moved.fetch_s * 1e6));
        tally.copy.extend(claimed.requests.iter().map(|moved| moved.record.copy_us as f64));
        tally.validate.extend(claimed.requests.iter().map(|moved| moved.record.validate_us as f64));
        tally.rate.push(claimed.bytes() as f64 / claimed.together_s / 1e9);
        let bytes = claimed.bytes().min(self.span);
        let at = u64::from(self.turn) * bytes % (self.span - bytes + 1);
        tally.ceiling.push(bytes as f64 / self.ceiling.run(at, bytes)? / 1e9);
        tally.last = claimed.requests.into_iter().next_back().map(|moved| moved.record);
        Ok(())
    }

    pub(super) fn row(&self, case: Case, tally: &Tally) -> anyhow::Result<Row> {
        let spread = |samples: &Samples| -> anyhow::Result<Spread> { samples.spread().context("no sample") };
        let last = tally.last.as_ref().context("no sample")?;
        let (gigabytes_per_second, ceiling) = (spread(&tally.rate)?, spread(&tally.ceiling)?);
        Ok(Row {
            path: self.path.name().to_owned(),
            send_type: self.orders.send_type.name().to_owned(),
            blocks: if case.scattered { "scattered" } else { "adjacent" }.to_owned(),
            at_once: case.at_once,
            tokens: case.tokens,
            bytes: last.bytes,
            runs: last.runs,
            posts: last.posts,
            fetch_us: spread(&tally.fetch)?,
            fetch_curve: tally.fetch.curve().context("no sample")?,
            whole_us: spread(&tally.whole)?,
            copy_us: spread(&tally.copy)?.median,
            validate_us: spread(&tally.validate)?.median,
            gigabytes_per_second,
            ceiling_gigabytes_per_second: ceiling,
            share_of_ceiling: gigabytes_per_second.median / ceiling.median,
        })
    }

    /// Places for the blocks of such a request, none of which overlap.
    fn places(&self, case: Case) -> u32 {
        let count = self.geometry.groups[0].blocks_for(case.tokens);
        (self.orders.num_blocks / count).min(REQUESTS * case.at_once)
    }

    /// Where the blocks of the next requests begin.
    fn turn(&mut self, case: Case) -> Vec<u32> {
        let places = self.places(case);
        self.turn = (self.turn + 1) % places.div_ceil(case.at_once);
        let place = |index| (self.turn * case.at_once + index) % places * (self.orders.num_blocks / places);
        (0..case.at_once).map(place).collect()
    }

    /// Moves requests, all at once. With `claim_first` their claims are answered before the clock of `fetch` starts.
    fn round(&mut self, case: Case, first_blocks: &[u32], claim_first: bool) -> anyhow::Result<Round> {
        let Case { tokens, scattered, at_once } = case;
        let count = self.geometry.groups[0].blocks_for(tokens);
        let params = self.peer.offer(first_blocks, scattered, tokens)?;
        let taken = first_blocks.iter().map(|&first| shape::blocks(first, count, self.orders.num_blocks, scattered));
        let taken: Vec<_> = taken.collect();
        let mut handles = Vec::with_capacity(params.len());
        for params in &params {
            handles.push((Instant::now(), self.decode.runtime.expect(params)?));
        }
        if claim_first {
            std::thread::sleep(CLAIM_PAUSE * at_once.min(CLAIM_PAUSES_MAX));
        }
        let mut started = Vec::with_capacity(params.len());
        for ((expected, handle), blocks) in handles.into_iter().zip(taken) {
            started.push((expected, Instant::now()));
            self.decode.runtime.fetch(handle, vec![blocks], 0);
        }
        let mut reports = Vec::with_capacity(params.len());
        for _ in &params {
            let report = self.reports.recv_timeout(PATIENCE).context("no end of a transfer")?;
            reports.push((report, Instant::now()));
        }
        let (first, last) = started.first().zip(reports.last()).context("no request")?;
        let together_s = (last.1 - first.1).as_secs_f64();
        let mut requests = Vec::with_capacity(params.len());
        for (report, ended) in reports {
            ensure!(report.end == End::Received, "transfer {} failed: {:?}", report.transfer_id, report.end);
            let asked = params.iter().position(|params| params.pdlink.transfer_id == report.transfer_id);
            let (expected, fetched) = started[asked.context("a report of another transfer")?];
            let (fetch_s, whole_s) = ((ended - fetched).as_secs_f64(), (ended - expected).as_secs_f64());
            requests.push(Moved { fetch_s, whole_s, record: self.record(report.transfer_id)? });
        }
        Ok(Round { requests, together_s })
    }

    /// Moves requests, and holds every byte of their whole blocks against what the prefill worker has.
    fn check(&mut self, case: Case) -> anyhow::Result<()> {
        let (num_blocks, first_blocks) = (self.orders.num_blocks, self.turn(case));
        let count = self.geometry.groups[0].blocks_for(case.tokens);
        let of = |count: u32| -> Vec<BlockId> {
            first_blocks.iter().flat_map(|&first| shape::blocks(first, count, num_blocks, case.scattered)).collect()
        };
        shape::clear(&self.ranks, &of(count))?;
        self.round(case, &first_blocks, true)?;
        shape::check(&self.geometry, &self.ranks, &of(case.tokens / self.orders.block_size))
    }

    fn record(&self, transfer_id: TransferId) -> anyhow::Result<TransferRecord> {
        self.decode.runtime.record(transfer_id).context("no record of a transfer")
    }

    pub(super) fn close(self) {
        self.decode.runtime.shutdown();
    }
}
