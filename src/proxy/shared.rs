//! What every thread of the proxy shares, and what each has of its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;

use super::abort::Abandoned;
use super::access::AccessQueue;
use super::dialect::Connector;
use super::metrics::Metrics;
use super::pool::Pool;
use super::trace::Tracing;
use super::upstream::Sockets;
use super::watch::Watch;
use super::weights::Desk;
use super::worker::Worker;
use super::{Mode, ProxyError};
use crate::config::{Dispatch, Policy, ProxyConfig};
use crate::control::{AdminClient, Role};
use crate::security::Secret;

/// The times and bounds of `[proxy]`, ready for use.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    pub(crate) connect: Duration,
    pub(crate) dead_after: Duration,
    pub(crate) prefill: Duration,
    pub(crate) first_byte: Duration,
    pub(crate) idle: Duration,
    pub(crate) request: Duration,
    pub(crate) body: Duration,
    pub(crate) health_interval: Duration,
    pub(crate) health: Duration,
    pub(crate) body_bytes_max: usize,
    pub(crate) inflight_max: usize,
    pub(crate) attempts_max: u32,
    pub(crate) local_prefill: bool,
    pub(crate) short_below_bytes: u64,
    pub(crate) access_log: bool,
    pub(crate) dispatch: Dispatch,
}

impl Limits {
    pub(crate) fn of(config: &ProxyConfig) -> Result<Self, ProxyError> {
        let time = |key: &'static str, seconds: f64| {
            let given = Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero());
            given.ok_or_else(|| ProxyError::Setting { key, why: format!("must be a time above 0 s, got {seconds}") })
        };
        // Bodies are addressed with 32 bits.
        let body_bytes_max = config.body_bytes_max.min(u64::from(u32::MAX));
        Ok(Self {
            connect: time("connect_timeout_s", config.connect_timeout_s)?,
            dead_after: time("dead_after_s", config.dead_after_s)?,
            prefill: time("prefill_timeout_s", config.prefill_timeout_s)?,
            first_byte: time("first_byte_timeout_s", config.first_byte_timeout_s)?,
            idle: time("idle_timeout_s", config.idle_timeout_s)?,
            request: time("request_timeout_s", config.request_timeout_s)?,
            body: time("body_timeout_s", config.body_timeout_s)?,
            health_interval: time("health_interval_s", config.health_interval_s)?,
            health: time("health_timeout_s", config.health_timeout_s)?,
            body_bytes_max: usize::try_from(body_bytes_max).unwrap_or(usize::MAX),
            inflight_max: config.inflight_max.max(1),
            attempts_max: config.attempts_max.max(1),
            local_prefill: config.local_prefill,
            short_below_bytes: config.local_prefill_below_bytes,
            access_log: config.access_log,
            dispatch: config.dispatch,
        })
    }
}

/// Who may call admin routes.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    /// `Authorization: Bearer` that must be shown; without one, only loopback may call.
    pub(crate) token: Option<String>,
    /// Admin routes have a port of their own, and are not on this one.
    pub(crate) apart: bool,
}

/// Shared by all threads; nothing in it is locked on a request's usual way.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) limits: Limits,
    pub(crate) mode: Mode,
    pub(crate) connector: Connector,
    pub(crate) policy: Policy,
    pub(crate) prefill: Pool,
    pub(crate) decode: Pool,
    /// All workers, prefill first.
    pub(crate) workers: Box<[Arc<Worker>]>,
    /// One per worker that has a KV address.
    pub(crate) runtimes: Box<[Option<AdminClient>]>,
    /// One per worker that may take weights from us: its KV runtime, or a door of its own.
    pub(crate) doors: Box<[Option<AdminClient>]>,
    pub(crate) gate: Gate,
    pub(crate) weights: Desk,
    /// Seals the parameters that decode gets before prefill has answered.
    pub(crate) secret: Secret,
    pub(crate) metrics: Metrics,
    pub(crate) watch: Watch,
    /// None: no traces.
    pub(crate) tracing: Option<Tracing>,
    pub(crate) abandoned: mpsc::Sender<Abandoned>,
    pub(crate) inflight: AtomicUsize,
    pub(crate) draining: AtomicBool,
}

impl Shared {
    pub(crate) fn pool(&self, role: Role) -> &Pool {
        if role == Role::Prefill { &self.prefill } else { &self.decode }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }
}

/// What one server thread has for itself: its connections to workers, its lines of the access log.
#[derive(Debug)]
pub(crate) struct Lane {
    pub(crate) shared: Arc<Shared>,
    pub(crate) sockets: Sockets,
    pub(crate) access: Arc<AccessQueue>,
}

impl Lane {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        let sockets = Sockets::new(shared.workers.len(), shared.limits.dead_after);
        Self { shared, sockets, access: Arc::default() }
    }
}
