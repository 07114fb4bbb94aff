//! Two workers, one request after the other between them, and the ceiling beside it.

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
    End, Geometry, KvLink, KvMetrics, KvRuntime, RankMemory, Report as TransferReport, RuntimeConfig, TransferId,
};
use crate::security::Secret;
use crate::telemetry::TransferRecord;

/// Time that a claim is given to be answered where it is not to be measured.
const CLAIM_PAUSE: Duration = Duration::from_millis(2);
/// Requests whose blocks are gone through in turn, so that no cache keeps them.
const REQUESTS: u32 = 3;
/// Every line is measured in so many parts, with all other lines between them: what drifts, drifts into its spread.
pub(super) const PASSES: usize = 3;
/// Rounds of each part, at the least.
const ROUNDS_MIN: usize = 3;

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

/// What one round came to.
struct Round {
    fetch_s: f64,
    whole_s: f64,
    record: TransferRecord,
}

/// One line: a prompt of so many tokens, whose blocks lie next to each other or apart.
#[derive(Debug, Clone, Copy)]
pub(super) struct Case {
    pub(super) tokens: u32,
    pub(super) scattered: bool,
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
        let most = options.tokens.iter().copied().max().context("no number of tokens to measure")?;
        let kv = KvConfig {
            paths: Some(vec![path]),
            digest: if options.digest { DigestPolicy::Every } else { DigestPolicy::Off },
            copy_threads: Some(options.threads),
            tcp_streams: options.threads,
            ..KvConfig::default()
        };
        let num_blocks = geometry.groups[0].blocks_for(most).max(8) * REQUESTS;
        let span = (geometry.token_bytes() * u64::from(num_blocks * options.block_size)).min(1 << 30);
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
        cases.iter().try_for_each(|case| (0..REQUESTS).try_for_each(|_| self.check(*case)))
    }

    /// One part of a line's measurement.
    pub(super) fn measure(&mut self, case: Case, seconds: f64, tally: &mut Tally) -> anyhow::Result<()> {
        self.round(case, true)?;
        let until = Instant::now() + Duration::from_secs_f64(seconds);
        let mut counted = 0;
        while counted < ROUNDS_MIN || Instant::now() < until {
            let claimed = self.round(case, true)?;
            tally.whole.push(self.round(case, false)?.whole_s * 1e6);
            tally.fetch.push(claimed.fetch_s * 1e6);
            tally.copy.push(claimed.record.copy_us as f64);
            tally.validate.push(claimed.record.validate_us as f64);
            tally.rate.push(claimed.record.bytes as f64 / claimed.fetch_s / 1e9);
            let bytes = claimed.record.bytes.min(self.span);
            let at = u64::from(self.turn) * bytes % (self.span - bytes + 1);
            tally.ceiling.push(bytes as f64 / self.ceiling.run(at, bytes)? / 1e9);
            tally.last = Some(claimed.record);
            counted += 1;
        }
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

    /// Moves one request. With `claim_first` its claim is answered before the clock of `fetch` starts.
    fn round(&mut self, case: Case, claim_first: bool) -> anyhow::Result<Round> {
        let Case { tokens, scattered } = case;
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
    fn check(&mut self, case: Case) -> anyhow::Result<()> {
        shape::clear(&self.ranks)?;
        self.round(case, true)?;
        let first = self.turn * (self.orders.num_blocks / REQUESTS);
        let whole = case.tokens / self.orders.block_size;
        let blocks = shape::blocks(first, whole, self.orders.num_blocks, case.scattered);
        shape::check(&self.geometry, &self.ranks, &blocks)
    }

    fn record(&self, transfer_id: TransferId) -> anyhow::Result<TransferRecord> {
        self.decode.runtime.record(transfer_id).context("no record of a transfer")
    }

    pub(super) fn close(self) {
        self.decode.runtime.shutdown();
    }
}
