//! What the metrics page shows of workers and pools: read off them when it is asked for.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{self, Gauge};
use prometheus_client::registry::Registry;

use super::health::Standing;
use super::metrics::signed;
use super::shared::Shared;
use super::watch::{Hint, PoolLoad};
use super::worker::Worker;
use crate::control::WeightsPhase;
use crate::telemetry::names;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabels {
    worker: String,
    role: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerQueueLabels {
    worker: String,
    role: &'static str,
    queue: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerPhaseLabels {
    worker: String,
    role: &'static str,
    phase: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleLabels {
    role: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RoleQueueLabels {
    role: &'static str,
    queue: &'static str,
}

/// A number with a fraction.
type Fraction = Gauge<f64, AtomicU64>;

const PHASES: [WeightsPhase; 7] = [
    WeightsPhase::Serving,
    WeightsPhase::Staging,
    WeightsPhase::Staged,
    WeightsPhase::Pausing,
    WeightsPhase::Paused,
    WeightsPhase::Committing,
    WeightsPhase::Committed,
];

#[derive(Debug, Default)]
pub(crate) struct FleetMetrics {
    up: Family<WorkerLabels, Gauge>,
    inflight: Family<WorkerLabels, Gauge>,
    served: Family<WorkerLabels, Gauge>,
    failed: Family<WorkerLabels, Gauge>,
    quarantines: Family<WorkerLabels, Gauge>,
    queue: Family<WorkerQueueLabels, Fraction>,
    kv_usage: Family<WorkerLabels, Fraction>,
    clock_ahead: Family<WorkerLabels, Fraction>,
    weight_version: Family<WorkerLabels, Gauge>,
    weights_phase: Family<WorkerPhaseLabels, Gauge>,
    pool_queue: Family<RoleQueueLabels, Fraction>,
    pool_utilisation: Family<RoleLabels, Fraction>,
    pool_shortfall: Family<RoleLabels, Gauge>,
    viewers: Gauge,
}

impl FleetMetrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(names::PROXY_WORKER_UP, "Whether a worker serves", self.up.clone());
        registry.register(names::PROXY_WORKER_INFLIGHT, "Requests on a worker", self.inflight.clone());
        registry.register(names::PROXY_WORKER_SERVED, "Requests a worker answered", self.served.clone());
        registry.register(names::PROXY_WORKER_FAILED, "Requests a worker failed", self.failed.clone());
        registry.register(names::PROXY_WORKER_QUARANTINES, "Quarantines", self.quarantines.clone());
        registry.register(names::PROXY_WORKER_QUEUE, "Requests in a worker's own queues", self.queue.clone());
        registry.register(names::PROXY_WORKER_KV_USAGE, "Part of the KV blocks in use", self.kv_usage.clone());
        registry.register(names::PROXY_WORKER_CLOCK_AHEAD, "How far a clock is ahead", self.clock_ahead.clone());
        registry.register(names::PROXY_WORKER_WEIGHT_VERSION, "Weights a worker serves", self.weight_version.clone());
        registry.register(
            names::PROXY_WORKER_WEIGHTS_PHASE,
            "Where a worker is in an update",
            self.weights_phase.clone(),
        );
        registry.register(names::PROXY_POOL_QUEUE, "Requests in a pool's queues", self.pool_queue.clone());
        registry.register(names::PROXY_POOL_UTILISATION, "How busy a pool is", self.pool_utilisation.clone());
        registry.register(names::PROXY_POOL_SHORTFALL, "Workers a pool is short of", self.pool_shortfall.clone());
        registry.register(names::PROXY_VIEWERS, "Viewers of the page", self.viewers.clone());
    }

    /// Brings all of it up to date.
    pub(crate) fn look(&self, shared: &Shared) {
        let now = Instant::now();
        for worker in &shared.workers {
            self.look_at(worker, shared, now);
        }
        let (prefill, decode, hint) = shared.watch.balance.get();
        for (role, load) in [("prefill", prefill), ("decode", decode)] {
            self.look_at_pool(role, load, hint);
        }
        self.viewers.set(signed(shared.watch.viewers() as u64));
    }

    fn look_at(&self, worker: &Worker, shared: &Shared, now: Instant) {
        let (name, role) = (worker.name(), worker.role.name());
        let labels = WorkerLabels { worker: name.to_owned(), role };
        let count = |counter: &AtomicU64| signed(counter.load(Relaxed));
        let up = worker.health.standing(now) >= Standing::OnTrial;
        self.up.get_or_create(&labels).set(i64::from(up));
        self.inflight.get_or_create(&labels).set(signed(worker.inflight() as u64));
        self.served.get_or_create(&labels).set(count(&worker.served));
        self.failed.get_or_create(&labels).set(count(&worker.failed));
        self.quarantines.get_or_create(&labels).set(count(&worker.quarantines));
        let seen = &shared.watch.seen[worker.number];
        let queues = seen.queues();
        for (queue, value) in
            [("running", queues.map(|queues| queues.running)), ("waiting", queues.map(|queues| queues.waiting))]
        {
            let labels = WorkerQueueLabels { worker: name.to_owned(), role, queue };
            show(&self.queue, &labels, value);
        }
        let (version, phase) = seen.weights();
        for one in PHASES {
            let labels = WorkerPhaseLabels { worker: name.to_owned(), role, phase: one.name() };
            let is_in = phase.map(|phase| i64::from(one == phase));
            show(&self.weights_phase, &labels, is_in);
        }
        show(&self.weight_version, &labels, version.map(signed));
        show(&self.kv_usage, &labels, queues.and_then(|queues| queues.kv_usage));
        show(&self.clock_ahead, &labels, seen.clock().map(|clock| clock.ahead_s));
    }

    fn look_at_pool(&self, role: &'static str, load: PoolLoad, hint: Hint) {
        for (queue, value) in [("running", load.running), ("waiting", load.waiting)] {
            self.pool_queue.get_or_create(&RoleQueueLabels { role, queue }).set(value);
        }
        let labels = RoleLabels { role };
        show(&self.pool_utilisation, &labels, load.utilisation);
        self.pool_shortfall.get_or_create(&labels).set(i64::from(hint.short_of(role)));
    }
}

/// Shows what is known, and nothing where nothing is: the last word of a worker that is gone is not how it is.
fn show<L, N, A>(family: &Family<L, Gauge<N, A>>, labels: &L, value: Option<N>)
where
    L: Clone + std::hash::Hash + Eq,
    A: gauge::Atomic<N> + Default,
{
    match value {
        Some(value) => _ = family.get_or_create(labels).set(value),
        None => _ = family.remove(labels),
    }
}
