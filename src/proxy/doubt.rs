//! Whether a worker looks like one that cannot read request ids with addresses in them, which are how vLLM's P2pNcclConnector
//! is told of its peer. A worker that takes them for mere names serves all the same, and computes every prefill twice.

use std::sync::Arc;
use std::time::Duration;

use http::Method;
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::ask::{Question, ask};
use super::dialect::REQUEST_IDS_LAST;
use super::health::State;
use super::shared::Lane;
use super::upstream::Deadline;
use super::worker::Worker;
use crate::control::{AdminClient, ControlError};
use crate::security::Secret;

/// What `/version` answers.
#[derive(Debug, Deserialize)]
struct Version {
    version: String,
}

/// How often a worker that does not serve yet is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Asks a worker once, when it serves, and warns.
pub(crate) async fn tell(lane: Arc<Lane>, worker: Arc<Worker>, secret: Secret) {
    while matches!(worker.health.state(), State::Starting | State::Down) {
        sleep(LOOK_INTERVAL).await;
    }
    let Some(why) = of_request_ids(&lane, &worker, &secret).await else { return };
    let (major, minor) = REQUEST_IDS_LAST;
    tracing::warn!(
        worker = worker.name(),
        "requests name their KV peers by request ids, which vLLM up to {major}.{minor} reads, but {why};          if its connector is pdlink's, give --connector-impl native"
    );
}

/// What speaks against the worker reading request ids, if anything does. Silence speaks for nothing.
async fn of_request_ids(lane: &Lane, worker: &Worker, secret: &Secret) -> Option<String> {
    let limit = lane.shared.limits.health;
    let question = Question { method: &Method::GET, path: "/version", headers: b"", body: b"" };
    if let Ok(reply) = ask(lane, worker, question, Deadline::after(Instant::now(), limit)).await
        && let Ok(Version { version }) = serde_json::from_slice(&reply.body)
        && number(&version).is_some_and(|number| number > REQUEST_IDS_LAST)
    {
        return Some(format!("it is vLLM {version}"));
    }
    let address = worker.address.kv_addr.as_ref()?;
    match AdminClient::new(address.clone(), secret.clone(), limit).status().await {
        Ok(_) | Err(ControlError::Refused { .. } | ControlError::WrongSecret { .. } | ControlError::Version { .. }) => {
            Some(format!("pdlink's own runtime listens at its KV address {address}"))
        }
        Err(_) => None,
    }
}

/// The first two parts of a version.
fn number(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
