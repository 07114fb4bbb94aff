//! Transfers that nobody will fetch: prefill's runtime is told, so that the blocks are free within a second (KV-9).
//!
//! A [`Transfer`] is open from the moment prefill is asked until decode's first byte shows that decode has taken the KV
//! over. Dropped while open, for whatever reason, it is handed to the keeper's thread, which tells the runtime.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::dialect::Connector;
use super::shared::Shared;
use super::worker::Worker;
use crate::control::{AbortAnswer, AdminClient, TransferId};
use crate::security::Secret;

/// Aborts waiting to be sent, and being sent at once. Past the first, the lease frees the blocks.
pub(crate) const QUEUE_MAX: usize = 65_536;
const AT_ONCE_MAX: usize = 256;
/// Runtimes remembered that no flag named, by the address in their own parameters.
const LEARNED_MAX: usize = 256;
/// How long telling a runtime may take.
pub(crate) const TELL_TIMEOUT: Duration = Duration::from_secs(2);

/// The KV that one prefill worker holds, or may hold, for this request.
#[derive(Debug)]
pub(crate) struct Transfer {
    shared: Arc<Shared>,
    pub(crate) id: TransferId,
    prefill: Arc<Worker>,
    /// What prefill answered.
    pub(crate) params: Option<Bytes>,
    /// Where its runtime listens, if that was known before.
    runtime: Option<String>,
    open: bool,
}

impl Transfer {
    pub(crate) fn open(shared: &Arc<Shared>, id: TransferId, prefill: &Arc<Worker>, runtime: Option<String>) -> Self {
        Self { shared: Arc::clone(shared), id, prefill: Arc::clone(prefill), params: None, runtime, open: true }
    }

    /// Nothing is held any more, or decode looks after it.
    pub(crate) fn close(&mut self) {
        self.open = false;
        self.params = None;
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        // Workers of vLLM's own connectors have no runtime of ours; a dropped leg is all they understand.
        if !self.open || self.shared.connector != Connector::Native {
            return;
        }
        let abandoned = Abandoned {
            id: self.id,
            prefill: self.prefill.number,
            params: self.params.take(),
            runtime: self.runtime.take(),
        };
        if self.shared.abandoned.try_send(abandoned).is_err() {
            self.shared.metrics.aborted("dropped");
        }
    }
}

/// A transfer to be given up.
#[derive(Debug)]
pub(crate) struct Abandoned {
    id: TransferId,
    prefill: usize,
    params: Option<Bytes>,
    runtime: Option<String>,
}

impl Abandoned {
    /// Where the parameters say that prefill's runtime listens.
    fn address(&self) -> Option<String> {
        let params: serde_json::Value = serde_json::from_slice(self.params.as_ref()?).ok()?;
        let port = u16::try_from(params.get("remote_port")?.as_u64()?).ok()?;
        let host = params.get("remote_host")?.as_str()?;
        Some(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
    }
}

/// Tells runtimes of abandoned transfers until the proxy ends.
pub(crate) async fn tell(shared: Arc<Shared>, secret: Secret, mut queue: mpsc::Receiver<Abandoned>) {
    let mut telling = JoinSet::new();
    let mut learned: HashMap<String, AdminClient> = HashMap::new();
    loop {
        tokio::select! {
            Some(_) = telling.join_next() => {}
            abandoned = queue.recv(), if telling.len() < AT_ONCE_MAX => {
                let Some(abandoned) = abandoned else { break };
                let known = shared.runtimes.get(abandoned.prefill).cloned().flatten();
                // What the worker itself said of its runtime is better than what was derived.
                let told = abandoned.runtime.clone().and_then(|runtime| learn(&mut learned, &secret, runtime));
                let client = told.or(known).or_else(|| learn(&mut learned, &secret, abandoned.address()?));
                let Some(client) = client else {
                    shared.metrics.aborted("unreachable");
                    continue;
                };
                telling.spawn(tell_one(Arc::clone(&shared), client, abandoned.id));
            }
        }
    }
    while telling.join_next().await.is_some() {}
}

fn learn(learned: &mut HashMap<String, AdminClient>, secret: &Secret, address: String) -> Option<AdminClient> {
    if learned.len() >= LEARNED_MAX && !learned.contains_key(&address) {
        learned.clear();
    }
    let client = learned
        .entry(address)
        .or_insert_with_key(|address| AdminClient::new(address.clone(), secret.clone(), TELL_TIMEOUT));
    Some(client.clone())
}

async fn tell_one(shared: Arc<Shared>, client: AdminClient, id: TransferId) {
    let outcome = match client.abort(id).await {
        Ok(AbortAnswer::Aborted) => "freed",
        Ok(AbortAnswer::Ended) => "ended",
        Ok(AbortAnswer::Unknown) => "unknown",
        Err(error) => {
            tracing::warn!(transfer = %id, runtime = client.addr(), %error, "cannot abort a transfer; its lease will end it");
            "failed"
        }
    };
    shared.metrics.aborted(outcome);
}
