//! What the launcher counts: processes that started and ended. Shown on the page of its proxy.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

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

    /// Counts what happened to a worker.
    pub fn happened(&self, worker: &str, happening: &Happening) {
        let labels = WorkerLabels { worker: worker.to_owned() };
        match happening {
            Happening::Started { .. } => {
                self.starts.get_or_create(&labels).inc();
                // No death is 0 deaths, and not an unknown number.
                for cause in ["exited", "late"] {
                    drop(self.deaths.get_or_create(&DeathLabels { worker: labels.worker.clone(), cause }));
                }
                self.ready.get_or_create(&labels).set(0);
            }
            Happening::Ready { took, .. } => {
                self.ready.get_or_create(&labels).set(1);
                self.ready_seconds.get_or_create(&labels).set(took.as_secs_f64());
            }
            Happening::Restarts { failure, .. } | Happening::GivenUp { failure } => {
                let cause = match failure.cause {
                    Cause::Exited { .. } => "exited",
                    Cause::NotReadyInTime { .. } => "late",
                };
                self.deaths.get_or_create(&DeathLabels { worker: labels.worker.clone(), cause }).inc();
                self.ready.get_or_create(&labels).set(0);
            }
            Happening::Ended { .. } => {
                self.ready.get_or_create(&labels).set(0);
            }
            Happening::Progress(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
        let started = Happening::Started { pid: 1 };
        metrics.happened("prefill_0", &started);
        metrics.happened("prefill_0", &Happening::Ready { took: Duration::from_millis(1500), kv_tokens: None });
        metrics.happened("prefill_0", &Happening::Restarts { failure, pause: Duration::ZERO });
        metrics.happened("prefill_0", &started);
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
