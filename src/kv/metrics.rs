//! What `/metrics` shows of the KV link.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::memory::gpu_bytes_taken;
use crate::telemetry::{Side, TransferOutcome, TransferRecord, names};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TransferLabels {
    side: &'static str,
    path: &'static str,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PathLabels {
    side: &'static str,
    path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SideLabel {
    side: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartLabels {
    side: &'static str,
    part: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The link's counters and gauges. Clones share their values.
#[derive(Debug, Clone)]
pub struct KvMetrics {
    transfers: Family<TransferLabels, Counter>,
    bytes: Family<PathLabels, Counter>,
    posts: Family<PathLabels, Counter>,
    leases: Counter,
    digests: Family<SideLabel, Counter>,
    seconds: Family<PartLabels, Histogram, fn() -> Histogram>,
    held: Gauge,
    active: Gauge,
    gpu_bytes: Gauge,
    peers: Family<SideLabel, Gauge>,
    peer_failures: Family<ReasonLabel, Counter>,
    /// The same once more: a family does not tell which labels it has.
    failures: Arc<Mutex<BTreeMap<&'static str, u64>>>,
}

/// What the reports of transfers do not say, for whoever shows it on a page of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KvFigures {
    pub leases_renewed: u64,
    pub gpu_bytes: u64,
    /// Connected workers, by this process's own side.
    pub peers: BTreeMap<&'static str, u64>,
    /// Workers lost or not reached so far, by reason.
    pub peer_failures: BTreeMap<&'static str, u64>,
}

impl KvMetrics {
    /// Registers the link's metrics.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self::unregistered();
        registry.register(names::KV_TRANSFERS, "Transfers that ended", metrics.transfers.clone());
        registry.register(names::KV_TRANSFER_BYTES, "Bytes of KV moved", metrics.bytes.clone());
        registry.register(names::KV_TRANSFER_POSTS, "Requests posted to a path", metrics.posts.clone());
        registry.register(names::KV_LEASES_RENEWED, "Leases that decode renewed", metrics.leases.clone());
        registry.register(names::KV_DIGESTS_CHECKED, "Transfers whose digest was compared", metrics.digests.clone());
        registry.register(names::KV_TRANSFER_SECONDS, "Time of transfers that ended well", metrics.seconds.clone());
        registry.register(names::KV_BLOCKS_HELD, "Blocks held for decode", metrics.held.clone());
        registry.register(names::KV_TRANSFERS_ACTIVE, "Transfers that have not ended", metrics.active.clone());
        let help = "GPU memory that pdlink has taken for staging and lists";
        registry.register(names::GPU_MEMORY_BYTES, help, metrics.gpu_bytes.clone());
        registry.register(names::KV_PEERS, "Connected workers of the other role", metrics.peers.clone());
        registry.register(names::KV_PEER_FAILURES, "Workers lost or not reached", metrics.peer_failures.clone());
        metrics
    }

    /// For a runtime whose numbers nobody asks for.
    pub fn unregistered() -> Self {
        // 10 µs to some 20 s.
        let histogram: fn() -> Histogram = || Histogram::new(exponential_buckets(10e-6, 2.0, 22));
        Self {
            transfers: Family::default(),
            bytes: Family::default(),
            posts: Family::default(),
            leases: Counter::default(),
            digests: Family::default(),
            seconds: Family::new_with_constructor(histogram),
            held: Gauge::default(),
            active: Gauge::default(),
            gpu_bytes: Gauge::default(),
            peers: Family::default(),
            peer_failures: Family::default(),
            failures: Arc::default(),
        }
    }

    /// Counts a transfer that ended; `outcome` names how.
    pub(super) fn ended(&self, record: &TransferRecord, outcome: &'static str) {
        let side = record.side.name();
        let path = record.path.map_or("none", |path| path.name());
        self.transfers.get_or_create(&TransferLabels { side, path, outcome }).inc();
        if record.digest_checked {
            self.digests.get_or_create(&SideLabel { side }).inc();
        }
        if record.outcome == TransferOutcome::Done {
            self.bytes.get_or_create(&PathLabels { side, path }).inc_by(record.bytes);
            self.posts.get_or_create(&PathLabels { side, path }).inc_by(record.posts);
            for (part, micros) in [("wait", record.wait_us), ("copy", record.copy_us), ("validate", record.validate_us)]
            {
                let seconds = std::time::Duration::from_micros(micros).as_secs_f64();
                self.seconds.get_or_create(&PartLabels { side, part }).observe(seconds);
            }
        }
    }

    /// Leases on KV that waits at prefill for a request that waits at decode (KV-2).
    pub(super) fn leases_renewed(&self, leases: u64) {
        self.leases.inc_by(leases);
    }

    /// As they are now.
    pub fn figures(&self) -> KvFigures {
        let peers = [Side::Prefill, Side::Decode].into_iter().filter_map(|side| {
            let count = self.peers.get(&SideLabel { side: side.name() })?.get();
            Some((side.name(), u64::try_from(count).unwrap_or(0)))
        });
        KvFigures {
            leases_renewed: self.leases.get(),
            gpu_bytes: gpu_bytes_taken(),
            peers: peers.collect(),
            peer_failures: self.failures.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    pub(super) fn gauge(&self, held_blocks: u64, active: u64) {
        self.held.set(i64::try_from(held_blocks).unwrap_or(i64::MAX));
        self.active.set(i64::try_from(active).unwrap_or(i64::MAX));
        self.gpu_bytes.set(i64::try_from(gpu_bytes_taken()).unwrap_or(i64::MAX));
    }

    /// `side` is this process's own: decode workers connect to prefill.
    pub(super) fn peers(&self, side: Side, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.peers.get_or_create(&SideLabel { side: side.name() }).set(count);
    }

    pub(super) fn peer_failed(&self, reason: &'static str) {
        self.peer_failures.get_or_create(&ReasonLabel { reason }).inc();
        *self.failures.lock().unwrap_or_else(PoisonError::into_inner).entry(reason).or_default() += 1;
    }
}
