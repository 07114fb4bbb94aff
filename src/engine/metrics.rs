//! What `/metrics` shows of the engine.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::telemetry::names;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct SourceLabel {
    source: &'static str,
}

/// The engine's counters and gauges. The scheduler writes them, `/metrics` and `/load` read them.
#[derive(Debug)]
pub(super) struct EngineMetrics {
    pub prompt_computed: Counter,
    pub prompt_loaded: Counter,
    pub prompt_cached: Counter,
    pub generated: Counter,
    pub preempted: Counter,
    pub aborted: Counter,
    pub load_failed: Counter,
    pub recomputed: Counter,
    running: Gauge,
    waiting: Gauge,
    loading: Gauge,
    blocks: Gauge,
    blocks_free: Gauge,
    blocks_cached: Gauge,
    blocks_held: Gauge,
    blocks_quarantined: Gauge,
}

/// A moment's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Gauges {
    pub running: usize,
    pub waiting: usize,
    pub loading: usize,
    pub blocks_total: usize,
    pub blocks_free: usize,
    pub blocks_cached: usize,
    pub blocks_held: usize,
    pub blocks_quarantined: usize,
}

impl EngineMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let prompt = Family::<SourceLabel, Counter>::default();
        let source = |source| prompt.get_or_create_owned(&SourceLabel { source });
        let metrics = Self {
            prompt_computed: source("computed"),
            prompt_loaded: source("loaded"),
            prompt_cached: source("cached"),
            generated: counter(registry, names::ENGINE_GENERATED_TOKENS, "Tokens generated"),
            preempted: counter(
                registry,
                names::ENGINE_PREEMPTIONS,
                "Answers that gave their blocks up and began again",
            ),
            aborted: counter(
                registry,
                names::ENGINE_REQUESTS_ABORTED,
                "Answers ended because nobody wanted them any more",
            ),
            load_failed: counter(
                registry,
                names::ENGINE_LOAD_FAILURES,
                "Answers failed because KV could not be loaded",
            ),
            recomputed: counter(registry, names::ENGINE_LOAD_RECOMPUTES, "Prompts computed here instead of loaded"),
            running: gauge(registry, names::ENGINE_REQUESTS_RUNNING, "Answers being computed"),
            waiting: gauge(registry, names::ENGINE_REQUESTS_WAITING, "Answers waiting for blocks or their turn"),
            loading: gauge(registry, names::ENGINE_REQUESTS_LOADING, "Answers whose KV is being loaded"),
            blocks: gauge(registry, names::ENGINE_BLOCKS, "KV blocks"),
            blocks_free: gauge(registry, names::ENGINE_BLOCKS_FREE, "KV blocks that can be taken now"),
            blocks_cached: gauge(
                registry,
                names::ENGINE_BLOCKS_CACHED,
                "Free KV blocks that the prefix cache still finds",
            ),
            blocks_held: gauge(registry, names::ENGINE_BLOCKS_HELD, "KV blocks held for decode under a lease"),
            blocks_quarantined: gauge(
                registry,
                names::ENGINE_BLOCKS_QUARANTINED,
                "KV blocks out of use because a lost peer may still write into them",
            ),
        };
        registry.register(names::ENGINE_PROMPT_TOKENS, "Prompt tokens by where their KV came from", prompt);
        metrics
    }

    /// Puts a moment's state into the gauges.
    pub(super) fn show(&self, now: Gauges) {
        let pairs = [
            (&self.running, now.running),
            (&self.waiting, now.waiting),
            (&self.loading, now.loading),
            (&self.blocks, now.blocks_total),
            (&self.blocks_free, now.blocks_free),
            (&self.blocks_cached, now.blocks_cached),
            (&self.blocks_held, now.blocks_held),
            (&self.blocks_quarantined, now.blocks_quarantined),
        ];
        for (gauge, value) in pairs {
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        }
    }

    /// Nothing runs, waits, loads or is held.
    pub(super) fn at_rest(&self) -> bool {
        [&self.running, &self.waiting, &self.loading, &self.blocks_held].iter().all(|gauge| gauge.get() == 0)
    }
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let counter = Counter::default();
    registry.register(name, help, counter.clone());
    counter
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let gauge = Gauge::default();
    registry.register(name, help, gauge.clone());
    gauge
}
