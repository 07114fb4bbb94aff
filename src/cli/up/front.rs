//! The proxy before the workers of a run.

use std::net::TcpListener;
use std::time::Duration;

use prometheus_client::registry::Registry;

use crate::config::{Config, ConnectorImpl, KvConnector, Role};
use crate::proxy::{Connector, Drained, Mode, ProxyError, ProxyHandle, ProxySetup, WorkerAddress, serve};
use crate::security::Secret;
use crate::topology::{Plan, WorkerPlan};

/// Health questions that may fail in a row before a worker counts as down; PRIME-RL's default. The launcher tells of
/// deaths at once, so this is for workers that hang.
const HEALTH_FAILURES_MAX: u32 = 2;

/// The running proxy.
pub(super) struct Front {
    handle: ProxyHandle,
}

/// Where the proxy listens: for clients, and for admin calls if those come elsewhere.
pub(super) struct Listeners {
    pub(super) clients: TcpListener,
    pub(super) admin: Option<TcpListener>,
}

impl Front {
    /// Starts the proxy before workers that all serve.
    pub(super) fn start(
        config: &Config,
        plan: &Plan,
        secret: &Secret,
        listeners: Listeners,
        registry: Registry,
    ) -> Result<Self, ProxyError> {
        let of = |role| plan.of_role(role).map(address).collect::<Vec<_>>();
        let (mode, prefill, decode) = match plan.link {
            Some(_) => (Mode::Disaggregated, of(Role::Prefill), of(Role::Decode)),
            None => (Mode::Plain, Vec::new(), of(Role::Both)),
        };
        let handle = serve(ProxySetup {
            listener: listeners.clients,
            admin_listener: listeners.admin,
            config: config.proxy.clone(),
            telemetry: config.telemetry.clone(),
            weights: config.weights.clone(),
            prefill,
            decode,
            connector: connector(plan),
            mode,
            secret: secret.clone(),
            registry,
            health_failures_max: HEALTH_FAILURES_MAX,
        })?;
        let front = Self { handle };
        plan.workers.iter().for_each(|worker| front.tell(worker, true));
        Ok(front)
    }

    /// The proxy hears from the launcher what it would notice later by itself.
    pub(super) fn tell(&self, worker: &WorkerPlan, serves: bool) {
        let url = worker.url();
        let known = if serves { self.handle.worker_came_up(&url) } else { self.handle.worker_went_down(&url) };
        debug_assert!(known, "the proxy was started with every worker of the plan");
    }

    /// A worker finishes what it has and takes nothing more.
    pub(super) fn let_leave(&self, worker: &WorkerPlan) {
        self.handle.worker_leaves(&worker.url());
    }

    /// Requests that a worker has.
    pub(super) fn inflight(&self, worker: &WorkerPlan) -> usize {
        self.handle.worker_inflight(&worker.url())
    }

    /// Why a worker ended, for the page that shows the last failures.
    pub(super) fn tell_why(&self, worker: &WorkerPlan, why: &str) {
        self.handle.worker_failed(&worker.url(), why);
    }

    /// Takes no more requests and lets those in flight finish within `grace`. The answer says what was cut off.
    pub(super) async fn drain(self, grace: Duration) -> Option<String> {
        let drained = tokio::task::spawn_blocking(move || self.handle.shutdown(grace)).await;
        match drained {
            Ok(Drained::Cut { requests }) => Some(format!(
                "{requests} request(s) were still in flight after {} s (launcher.drain_s)",
                grace.as_secs_f64()
            )),
            Ok(Drained::Clean) | Err(_) => None,
        }
    }
}

fn address(worker: &WorkerPlan) -> WorkerAddress {
    let tp = u32::try_from(worker.gpus.len()).unwrap_or(u32::MAX);
    WorkerAddress {
        url: worker.url(),
        kv_addr: worker.kv_address(),
        weights_addr: worker.weights_address(),
        tp,
        name: Some(worker.name()),
        gpus: worker.gpus.clone(),
    }
}

fn connector(plan: &Plan) -> Connector {
    match plan.link.as_ref().map(|link| (link.connector_impl, link.connector)) {
        None | Some((ConnectorImpl::Native, _)) => Connector::Native,
        Some((ConnectorImpl::Vllm, KvConnector::NixlConnector)) => Connector::VllmNixl,
        Some((ConnectorImpl::Vllm, KvConnector::P2pNcclConnector)) => Connector::P2pNccl,
    }
}
