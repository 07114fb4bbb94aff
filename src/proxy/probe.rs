//! Asks every worker's `/health`, for as long as the proxy lives.

use std::sync::Arc;
use std::time::Duration;

use http::{Method, StatusCode};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::ask::{Question, ask};
use super::health::State;
use super::shared::Lane;
use super::upstream::Deadline;
use super::worker::Worker;

/// How soon a worker that does not serve is asked again: it should be used as soon as it can be.
const RETURN_INTERVAL_MAX: Duration = Duration::from_millis(500);

/// Never ends by itself; ends with its thread.
pub(crate) async fn watch_all(lane: Arc<Lane>) {
    let mut watches = JoinSet::new();
    for worker in &lane.shared.workers {
        watches.spawn(watch(Arc::clone(&lane), Arc::clone(worker)));
    }
    while watches.join_next().await.is_some() {}
}

async fn watch(lane: Arc<Lane>, worker: Arc<Worker>) {
    let interval = lane.shared.limits.health_interval;
    loop {
        let why = probe(&lane, &worker).await;
        match why {
            None if worker.health.probe_answered() => tracing::info!(worker = worker.name(), "worker serves"),
            Some(why) if worker.health.probe_failed() => {
                tracing::warn!(worker = worker.name(), %why, "worker is down: it does not answer /health");
            }
            _ => {}
        }
        let away = matches!(worker.health.state(), State::Starting | State::Down);
        sleep(if away { interval.min(RETURN_INTERVAL_MAX) } else { interval }).await;
    }
}

/// Why the worker is not well, if it is not. A server without the route is taken as well, as PRIME-RL does.
async fn probe(lane: &Lane, worker: &Worker) -> Option<String> {
    let deadline = Deadline::after(Instant::now(), lane.shared.limits.health);
    let question = Question { method: &Method::GET, path: "/health", headers: b"", body: b"" };
    match ask(lane, worker, question, deadline).await {
        Ok(reply) if reply.status.is_success() || reply.status == StatusCode::NOT_FOUND => None,
        Ok(reply) => Some(format!("it answered {}", reply.status)),
        Err(error) => Some(error.to_string()),
    }
}
