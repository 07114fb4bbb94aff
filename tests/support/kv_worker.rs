//! Workers for tests of the KV link: a runtime with a cache of its own, whose reports can be waited for.
#![allow(dead_code, unreachable_pub, reason = "shared by crates of which each uses its part")]

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use pdlink::config::{DigestPolicy, KvConfig, KvSendType, Path, Role};
use pdlink::kv::{
    BlockId, End, KvLink, KvMetrics, KvRuntime, Offer, Report, RuntimeConfig, TransferHandle, TransferId,
    TransferParams,
};
use pdlink::memory::Device;
use pdlink::security::Secret;
use pdlink::transport::Transport;

use super::kv_cache::{Arrangement, Cache, Shape};

/// No wait in a test is longer.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Makes the paths of a worker over its cache.
pub type MakeTransports = Box<dyn FnOnce(&Cache) -> Vec<Arc<dyn Transport>>>;

/// How a worker is made.
pub struct Plan {
    pub name: &'static str,
    pub role: Role,
    pub shape: Shape,
    pub arrangement: Arrangement,
    pub kv: KvConfig,
    pub send_type: KvSendType,
    pub secret: Secret,
    pub weight_version: u64,
    pub model: Option<String>,
    pub siblings: Vec<String>,
    /// The GPU that the cache lies on; in host memory, if none.
    pub gpu: Option<i32>,
    /// Built from the cache, so that they know its regions.
    pub transports: Option<MakeTransports>,
}

impl Plan {
    pub fn new(name: &'static str, role: Role) -> Self {
        Self {
            name,
            role,
            shape: Shape { num_blocks: 48, ..Shape::default() },
            arrangement: Arrangement::SplitKv,
            kv: KvConfig { digest: DigestPolicy::Every, ..KvConfig::default() },
            send_type: KvSendType::Get,
            secret: Secret::loopback(),
            weight_version: 1,
            model: None,
            siblings: Vec::new(),
            gpu: None,
            transports: None,
        }
    }

    pub fn path(mut self, path: Path) -> Self {
        self.kv.paths = Some(vec![path]);
        self
    }

    pub fn start(self) -> Worker {
        self.start_on(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    pub fn start_on(self, listener: TcpListener) -> Worker {
        let cache = match self.gpu {
            Some(gpu) => Cache::on(&Device::open(gpu).unwrap(), &self.shape, self.arrangement),
            None => Cache::new(&self.shape, self.arrangement),
        };
        cache.pattern(u64::from(self.role == Role::Prefill));
        let (sender, reports) = channel();
        let mut geometry = self.shape.geometry();
        geometry.model = self.model.unwrap_or(geometry.model);
        let config = RuntimeConfig {
            kv: &self.kv,
            engine_id: self.name.to_owned(),
            role: self.role,
            send_type: self.send_type,
            geometry,
            ranks: cache.rank_memory(),
            siblings: self.siblings,
            secret: self.secret,
            listener,
            advertise_host: "127.0.0.1".to_owned(),
            weight_version: self.weight_version,
            weights: None,
            transports: self.transports.map(|make| make(&cache)),
            metrics: KvMetrics::unregistered(),
        };
        let sink = Box::new(move |report| drop(sender.send(report)));
        let runtime = KvRuntime::start(config, sink).unwrap();
        Worker { runtime, cache, reports }
    }
}

pub struct Worker {
    pub runtime: KvRuntime,
    pub cache: Cache,
    pub reports: Receiver<Report>,
}

impl Worker {
    /// The next report, of whatever transfer.
    pub fn report(&self) -> Report {
        self.reports.recv_timeout(PATIENCE).expect("a report in time")
    }

    /// The next report, which must be of this transfer.
    pub fn end_of(&self, transfer_id: TransferId) -> End {
        let report = self.report();
        assert_eq!(report.transfer_id, transfer_id, "{report:?}");
        report.end
    }

    /// Offers the KV of `tokens` tokens, made from `seed`, in `blocks`.
    pub fn offer(&self, blocks: &[BlockId], tokens: u32, seed: u64) -> TransferParams {
        self.cache.put_tokens(blocks, 0, tokens, seed);
        let transfer_id = TransferId::random();
        let offer = Offer { transfer_id, request_id: "cmpl-test".to_owned(), blocks: vec![blocks.to_vec()], tokens };
        self.runtime.offer(offer).unwrap()
    }

    /// Fetches into the blocks of the cache's one group.
    pub fn fetch(&self, handle: TransferHandle, blocks: &[BlockId], first_token: u32) {
        self.runtime.fetch(handle, vec![blocks.to_vec()], first_token);
    }

    pub fn expect(&self, params: &TransferParams) -> TransferHandle {
        self.runtime.expect(params).unwrap()
    }

    /// KV-2 at rest: nothing is held, and no transfer is in progress.
    pub fn assert_at_rest(&self) {
        let status = self.runtime.status();
        assert_eq!((status.held_blocks, status.transfers_active), (0, 0), "{status:?}");
        assert!(self.reports.try_recv().is_err(), "KV-1: nothing else is reported");
    }
}

/// Waits until `what` holds.
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain until {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
