//! What the launcher counts: processes that started and ended. Shown on the page of its proxy.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};

use super::fleet::Happening;
use super::life::Cause;
use crate::telemetry::names;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WorkerLabels {
    worker: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeathLabels {
    worker: String,
    cause: &'static str,
}

/// What is counted of a worker's life, on whatever node it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Life {
    Started,
    Ready {
        took: Duration,
    },
    /// By itself; `exited` or `late`.
    Died {
        was_late: bool,
    },
    /// Because it was asked to.
    Ended,
}

impl Life {
    /// What counts of something that happened, if anything does.
    pub fn of(happening: &Happening) -> Option<Self> {
        match happening {
            Happening::Started { .. } => Some(Self::Started),
            Happening::Ready { took, .. } => Some(Self::Ready { took: *took }),
            Happening::Restarts { failure, .. } | Happening::GivenUp { failure } => {
                Some(Self::Died { was_late: matches!(failure.cause, Cause::NotReadyInTime { .. }) })
            }
            Happening::Ended { .. } => Some(Self::Ended),
            Happening::Progress(_) => None,
        }
    }
}

/// Counters by the worker's name in the plan, of which there are as many as workers.
#[derive(Debug, Clone, Default)]
pub struct LauncherMetrics {
    starts: Family<WorkerLabels, Counter>,
    deaths: Family<DeathLabels, Counter>,
    ready: Family<WorkerLabels, Gauge>,
    ready_seconds: Family<WorkerLabels, Gauge<f64, AtomicU64>>,
}

impl LauncherMetrics {
    /// A registry with these metrics in it.
    pub fn registry(&self) -> Registry {
        let mut registry = Registry::default();
        registry.register(names::LAUNCHER_WORKER_STARTS, "Processes started", self.starts.clone());
        registry.register(names::LAUNCHER_WORKER_DEATHS, "Workers that ended by themselves", self.deaths.clone());
        registry.register(names::LAUNCHER_WORKER_READY, "Whether a worker serves", self.ready.clone());
        registry.register(names::LAUNCHER_WORKER_READY_SECONDS, "From start to serving", self.ready_seconds.clone());
        registry
    }

    /// Whether a worker of another node serves, as that node tells: it may have begun before this launcher did.
    pub fn serves(&self, worker: &str, serves: bool) {
        self.ready.get_or_create(&WorkerLabels { worker: worker.to_owned() }).set(i64::from(serves));
    }

    /// Counts what happened to a worker.
    pub fn happened(&self, worker: &str, life: &Life) {
        let labels = WorkerLabels { worker: worker.to_owned() };
        let death = |cause| DeathLabels { worker: worker.to_owned(), cause };
        match life {
            Life::Started => {
                self.starts.get_or_create(&labels).inc();
                // No death is 0 deaths, and not an unknown number.
                for cause in ["exited", "late"] {
                    drop(self.deaths.get_or_create(&death(cause)));
                }
            }
            Life::Ready { took } => _ = self.ready_seconds.get_or_create(&labels).set(took.as_secs_f64()),
            Life::Died { was_late } => {
                _ = self.deaths.get_or_create(&death(if *was_late { "late" } else { "exited" })).inc();
            }
            Life::Ended => {}
        }
        self.ready.get_or_create(&labels).set(i64::from(matches!(life, Life::Ready { .. })));
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;

    use super::super::exit::Exit;
    use super::super::fleet::Failure;
    use super::*;

    #[test]
    fn a_workers_life_is_counted() {
        let metrics = LauncherMetrics::default();
        let registry = metrics.registry();
        let cause = Cause::Exited { exit: Exit::Signal(9), was_ready: true };
        let failure = Failure { cause, diagnosis: None, tail: Vec::new(), log: "log".into() };
        for happening in [
            Happening::Started { pid: 1 },
            Happening::Ready { took: Duration::from_millis(1500), kv_tokens: None },
            Happening::Restarts { failure, pause: Duration::ZERO },
            Happening::Started { pid: 1 },
        ] {
            metrics.happened("prefill_0", &Life::of(&happening).expect("it counts"));
        }
        let mut page = String::new();
        encode(&mut page, &registry).expect("a string takes all");
        for line in [
            "pdlink_launcher_worker_starts_total{worker=\"prefill_0\"} 2",
            "pdlink_launcher_worker_deaths_total{worker=\"prefill_0\",cause=\"exited\"} 1",
            "pdlink_launcher_worker_ready{worker=\"prefill_0\"} 0",
            "pdlink_launcher_worker_ready_seconds{worker=\"prefill_0\"} 1.5",
        ] {
            assert!(page.contains(line), "{line} is not in\n{page}");
        }
    }
}
