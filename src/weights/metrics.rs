//! What `/metrics` shows of a worker's weights.

use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use crate::telemetry::names;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// A worker's counters of updates. Clones share their values.
#[derive(Debug, Clone)]
pub struct WeightsMetrics {
    version: Gauge,
    updates: Family<OutcomeLabel, Counter>,
    pause_seconds: Histogram,
}

impl WeightsMetrics {
    pub fn new(registry: &mut Registry) -> Self {
        // 1 ms to about 16 s.
        let metrics = Self {
            version: Gauge::default(),
            updates: Family::default(),
            pause_seconds: Histogram::new(exponential_buckets(0.001, 4.0, 8)),
        };
        registry.register(names::WEIGHTS_VERSION, "Version of the weights that serve", metrics.version.clone());
        registry.register(names::WEIGHTS_UPDATES, "Updates of the weights that ended", metrics.updates.clone());
        registry.register(names::WEIGHTS_PAUSE_SECONDS, "From pause to resumption", metrics.pause_seconds.clone());
        metrics
    }

    /// For a process whose page shows none of it.
    pub fn unregistered() -> Self {
        Self::new(&mut Registry::default())
    }

    pub(super) fn version(&self, version: u64) {
        self.version.set(i64::try_from(version).unwrap_or(i64::MAX));
    }

    pub(super) fn ended(&self, outcome: &'static str) {
        self.updates.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    pub(super) fn paused(&self, pause: Duration) {
        self.pause_seconds.observe(pause.as_secs_f64());
    }
}
