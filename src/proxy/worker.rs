//! One worker as the proxy knows it: where it is, how it stands, how much it carries.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use super::ProxyError;
use super::handover::Handovers;
use super::health::{Health, Rules};
use super::rendezvous::Rendezvous;
use super::upstream::Origin;
use crate::control::Role;

/// Where a worker is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerAddress {
    /// `http://host:port`, with a base path if it has one. A `/v1` at its end is left out.
    pub url: String,
    /// `host:port` of its KV runtime. Without one, aborts go to the address that its own transfer parameters name.
    pub kv_addr: Option<String>,
    /// `host:port` at which its first rank takes orders about weights, where that is not the KV runtime.
    pub weights_addr: Option<String>,
    /// Tensor-parallel ranks: how many places it takes in a weight broadcast.
    pub tp: u32,
    /// What people call it, `prefill_0`; its URL where nobody does.
    pub name: Option<String>,
    /// The GPUs it has, where they are known.
    pub gpus: Vec<u32>,
}

impl WorkerAddress {
    /// A worker of one rank, without a known KV address.
    pub fn new(url: impl Into<String>) -> Self {
        Self { url: url.into(), kv_addr: None, weights_addr: None, tp: 1, name: None, gpus: Vec::new() }
    }
}

/// A worker, shared by all threads.
#[derive(Debug)]
pub(crate) struct Worker {
    /// Its number among all workers: prefill first, then decode. Idle connections are kept by it.
    pub(crate) number: usize,
    pub(crate) role: Role,
    pub(crate) address: WorkerAddress,
    pub(crate) origin: Origin,
    pub(crate) health: Health,
    /// Where its runtimes listen, once it has said so.
    pub(crate) rendezvous: Rendezvous,
    /// Hand-overs of KV that failed in a row.
    pub(crate) handovers: Handovers,
    inflight: AtomicUsize,
    pub(crate) served: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) quarantines: AtomicU64,
    /// Whether the last of them came of KV that decode workers could not use.
    pub(crate) is_blamed_for_kv: AtomicBool,
}

impl Worker {
    pub(crate) fn new(number: usize, role: Role, address: WorkerAddress, rules: Rules) -> Result<Self, ProxyError> {
        let origin = origin_of(&address.url)?;
        let address = WorkerAddress { url: base_url(&address.url).to_owned(), ..address };
        Ok(Self {
            number,
            role,
            address,
            origin,
            health: Health::new(rules),
            rendezvous: Rendezvous::default(),
            handovers: Handovers::default(),
            inflight: AtomicUsize::new(0),
            served: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            quarantines: AtomicU64::new(0),
            is_blamed_for_kv: AtomicBool::new(false),
        })
    }

    pub(crate) fn inflight(&self) -> usize {
        self.inflight.load(Ordering::Relaxed)
    }

    /// A decode worker, one of so many, failed with KV that this one had. It answers its own leg all the same, so its answers
    /// do not count here.
    pub(crate) fn handover_failed(&self, decode: usize, decodes: usize, now: Instant) {
        let is_new = self.handovers.failed(decode, decodes) > 0;
        if is_new && self.health.distrusted(self.handovers.counted(), now) {
            self.failed.fetch_add(1, Ordering::Relaxed);
            self.quarantines.fetch_add(1, Ordering::Relaxed);
            self.is_blamed_for_kv.store(true, Ordering::Relaxed);
            tracing::warn!(worker = self.name(), "worker quarantined: decode workers cannot use the KV that it has");
        }
    }

    /// The name in logs, metrics and answers.
    pub(crate) fn name(&self) -> &str {
        &self.address.url
    }
}

/// A worker's URL as the routes are put behind it: ready lines and clients' settings have a `/v1` at the end.
pub(crate) fn base_url(url: &str) -> &str {
    let url = url.trim_end_matches('/');
    url.strip_suffix("/v1").unwrap_or(url).trim_end_matches('/')
}

/// `http://host:port[/base]`, and nothing else: a worker is on a private network, without TLS.
fn origin_of(url: &str) -> Result<Origin, ProxyError> {
    let bad = |why| ProxyError::WorkerUrl { url: url.to_owned(), why };
    let rest = base_url(url).strip_prefix("http://").ok_or_else(|| bad("it must begin with http://"))?;
    let (authority, base) = rest.split_once('/').map_or((rest, ""), |(authority, base)| (authority, base));
    let (host, port) = authority.rsplit_once(':').ok_or_else(|| bad("it must name a port"))?;
    if host.is_empty() || host.contains(|c: char| c.is_whitespace() || c.is_control() || c == '@') {
        return Err(bad("its host cannot be used"));
    }
    if port.parse::<u16>().map_or(true, |port| port == 0) {
        return Err(bad("its port must be 1 to 65535"));
    }
    if base.contains(|c: char| c.is_whitespace() || c.is_control() || c == '?' || c == '#') {
        return Err(bad("its path cannot be used"));
    }
    Ok(Origin {
        authority: authority.to_owned(),
        address: authority.parse::<SocketAddr>().ok(),
        base: if base.is_empty() { String::new() } else { format!("/{base}") },
    })
}

/// One request on one worker. Counts as load until dropped, and ends with a verdict or none.
#[derive(Debug)]
pub(crate) struct Load {
    worker: Arc<Worker>,
    trial: bool,
}

impl Load {
    /// Takes `worker` for one request, unless it went out meanwhile.
    pub(crate) fn take(worker: &Arc<Worker>, now: Instant) -> Option<Self> {
        let trial = worker.health.admit(now)?;
        worker.inflight.fetch_add(1, Ordering::Relaxed);
        Some(Self { worker: Arc::clone(worker), trial })
    }

    pub(crate) fn worker(&self) -> &Arc<Worker> {
        &self.worker
    }

    /// The worker answered as it should.
    pub(crate) fn succeeded(&mut self) {
        self.trial = false;
        self.worker.served.fetch_add(1, Ordering::Relaxed);
        self.worker.health.succeeded();
    }

    /// The worker failed.
    pub(crate) fn failed(&mut self, now: Instant) {
        self.trial = false;
        self.worker.failed.fetch_add(1, Ordering::Relaxed);
        if self.worker.health.failed(now) {
            self.worker.quarantines.fetch_add(1, Ordering::Relaxed);
            self.worker.is_blamed_for_kv.store(false, Ordering::Relaxed);
            tracing::warn!(worker = self.worker.name(), "worker quarantined after repeated failures");
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.worker.inflight.fetch_sub(1, Ordering::Relaxed);
        if self.trial {
            self.worker.health.undecided(Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_or_refused() {
        let origin = origin_of("http://10.0.0.1:8100/base/").expect("valid");
        assert_eq!((origin.authority.as_str(), origin.base.as_str()), ("10.0.0.1:8100", "/base"));
        assert!(origin.address.is_some());
        for url in ["http://a:1/v1", "http://a:1/v1/", "http://a:1/", "http://a:1"] {
            assert_eq!(
                (base_url(url), origin_of(url).expect("valid").base.as_str()),
                ("http://a:1", ""),
                "case: {url}"
            );
        }
        assert_eq!(origin_of("http://a:1/base/v1").expect("valid").base, "/base");
        assert!(origin_of("http://worker-0:8100").expect("valid").address.is_none());
        assert!(origin_of("http://[::1]:8100").expect("valid").address.is_some());
        for url in ["https://a:1", "http://a", "http://:80", "http://a:0", "http://a:99999", "a:80", "http://a:1/x y"] {
            assert!(origin_of(url).is_err(), "case: {url}");
        }
    }
}
