//! What the proxy counts, and the page that shows it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::fleet_metrics::FleetMetrics;
use super::plan::Alone;
use super::shared::Shared;
use crate::config::Dispatch;
use crate::telemetry::names;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    code: u16,
}

/// A leg of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub(crate) enum Leg {
    #[expect(non_camel_case_types, reason = "label values are lower case")]
    prefill,
    #[expect(non_camel_case_types, reason = "label values are lower case")]
    decode,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LegLabels {
    leg: Leg,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DispatchLabels {
    dispatch: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabels {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PartLabels {
    part: &'static str,
}

/// 1 ms to about 17 minutes.
fn weights_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 4.0, 11))
}

/// All counters of the proxy.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    inflight: Gauge,
    pub(crate) request_seconds: Histogram,
    pub(crate) prefill_seconds: Histogram,
    pub(crate) first_byte_seconds: Histogram,
    retries: Family<LegLabels, Counter>,
    alone: Family<ReasonLabels, Counter>,
    dispatches: Family<DispatchLabels, Counter>,
    pub(crate) prefill_without_params: Counter,
    aborts: Family<OutcomeLabels, Counter>,
    pub(crate) streams_broken: Counter,
    pub(crate) clients_left: Counter,
    pub(crate) refused_full: Counter,
    weights_updates: Family<OutcomeLabels, Counter>,
    weights_seconds: Family<PartLabels, Histogram, fn() -> Histogram>,
    fleet: FleetMetrics,
}

impl Metrics {
    pub(crate) fn new(registry: Registry) -> Self {
        // 250 µs to about 16 minutes.
        let seconds = || Histogram::new(exponential_buckets(0.000_25, 4.0, 12));
        let mut metrics = Self {
            registry,
            requests: Family::default(),
            inflight: Gauge::default(),
            request_seconds: seconds(),
            prefill_seconds: seconds(),
            first_byte_seconds: seconds(),
            retries: Family::default(),
            alone: Family::default(),
            dispatches: Family::default(),
            prefill_without_params: Counter::default(),
            aborts: Family::default(),
            streams_broken: Counter::default(),
            clients_left: Counter::default(),
            refused_full: Counter::default(),
            weights_updates: Family::default(),
            weights_seconds: Family::new_with_constructor(weights_histogram),
            fleet: FleetMetrics::default(),
        };
        metrics.register();
        // What has not happened yet is 0 and not unknown, or its first time would be no rise.
        for leg in [Leg::prefill, Leg::decode] {
            drop(metrics.retries.get_or_create(&LegLabels { leg }));
        }
        drop(metrics.weights_updates.get_or_create(&OutcomeLabels { outcome: "committed" }));
        for part in ["staging", "paused"] {
            drop(metrics.weights_seconds.get_or_create(&PartLabels { part }));
        }
        metrics
    }

    /// An update of the fleet's weights ended.
    pub(crate) fn weights_updated(&self, outcome: &'static str) {
        self.weights_updates.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// How long the parts of an update that was committed took.
    pub(crate) fn weights_seconds(&self, staging: Duration, paused: Duration) {
        for (part, time) in [("staging", staging), ("paused", paused)] {
            self.weights_seconds.get_or_create(&PartLabels { part }).observe(time.as_secs_f64());
        }
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        self.fleet.register(registry);
        let updates = self.weights_updates.clone();
        registry.register(names::PROXY_WEIGHTS_UPDATES, "Updates of the fleet's weights", updates);
        let seconds = self.weights_seconds.clone();
        registry.register(names::PROXY_WEIGHTS_SECONDS, "Parts of updates of the fleet's weights", seconds);
        registry.register(names::PROXY_REQUESTS, "Requests answered", self.requests.clone());
        registry.register(names::PROXY_REQUESTS_INFLIGHT, "Requests being served", self.inflight.clone());
        registry.register(names::PROXY_REQUEST_SECONDS, "Whole requests", self.request_seconds.clone());
        registry.register(names::PROXY_PREFILL_SECONDS, "Prefill legs", self.prefill_seconds.clone());
        registry.register(names::PROXY_FIRST_BYTE_SECONDS, "Decode to first byte", self.first_byte_seconds.clone());
        registry.register(names::PROXY_RETRIES, "Legs tried on another pair", self.retries.clone());
        registry.register(names::PROXY_ALONE, "Requests one worker served alone", self.alone.clone());
        registry.register(names::PROXY_DISPATCHES, "Pairs of legs sent out", self.dispatches.clone());
        let without = self.prefill_without_params.clone();
        registry.register(names::PROXY_PREFILL_WITHOUT_PARAMS, "Prefill answers that held no KV", without);
        registry.register(names::PROXY_ABORTS, "Transfers given up", self.aborts.clone());
        registry.register(names::PROXY_STREAMS_BROKEN, "Answers that broke off", self.streams_broken.clone());
        registry.register(names::PROXY_CLIENTS_LEFT, "Clients that left early", self.clients_left.clone());
        registry.register(names::PROXY_REFUSED_FULL, "Requests refused at the bound", self.refused_full.clone());
    }

    pub(crate) fn answered(&self, route: &'static str, code: u16) {
        self.requests.get_or_create(&RequestLabels { route, code }).inc();
    }

    pub(crate) fn retried(&self, leg: Leg) {
        self.retries.get_or_create(&LegLabels { leg }).inc();
    }

    pub(crate) fn dispatched(&self, dispatch: Dispatch) {
        self.dispatches.get_or_create(&DispatchLabels { dispatch: dispatch.name() }).inc();
    }

    pub(crate) fn alone(&self, reason: Alone) {
        self.alone.get_or_create(&ReasonLabels { reason: reason.name() }).inc();
    }

    pub(crate) fn aborted(&self, outcome: &'static str) {
        self.aborts.get_or_create(&OutcomeLabels { outcome }).inc();
    }

    /// The page in OpenMetrics text.
    pub(crate) fn page(&self, shared: &Shared) -> String {
        self.inflight.set(signed(shared.inflight.load(Ordering::Relaxed) as u64));
        self.fleet.look(shared);
        let mut page = String::new();
        // Writing into a String cannot fail.
        let _ = encode(&mut page, &self.registry);
        page
    }
}

pub(super) fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
