//! Starting and ending the proxy.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use prometheus_client::registry::Registry;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::abort::{self, Abandoned};
use super::access::{self, AccessQueue};
use super::dialect::Connector;
use super::health::Rules;
use super::metrics::Metrics;
use super::pool::Pool;
use super::server::{self, ARRIVALS_MAX, Door, Service, Stop};
use super::shared::{Gate, Lane, Limits, Shared};
use super::trace::{self, Traced, Tracing};
use super::watch::{self, Watch, What};
use super::weights::{self, Desk, Orders};
use super::worker::{Worker, WorkerAddress, base_url};
use super::{doubt, probe, routes};
use crate::config::{Dispatch, ProxyConfig, TelemetryConfig, WeightsConfig};
use crate::control::{AdminClient, Role};
use crate::security::Secret;
use crate::telemetry::traces::{TraceError, Traces};

/// Most server threads that are taken without being asked for. One serves some 15,000 requests a second; each one more than
/// the load needs costs processor time, since a wake-up then finds fewer requests to serve.
const THREADS_DEFAULT_MAX: usize = 4;

/// Workers are not asked more often how they are.
const WATCH_MIN: Duration = Duration::from_millis(10);

/// Files that are no request's: listeners, idle connections to workers, control connections, the log.
pub const FILES_OF_OTHERS: usize = 320;

/// Whether prefill and decode are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    #[default]
    Disaggregated,
    /// Plain workers, given as decode workers: each serves whole requests.
    Plain,
}

/// Everything the proxy is started with.
#[derive(Debug)]
pub struct ProxySetup {
    /// Where clients come. Listening already.
    pub listener: TcpListener,
    /// Where admin calls come, if not there.
    pub admin_listener: Option<TcpListener>,
    pub config: ProxyConfig,
    /// How often workers are asked how they are.
    pub telemetry: TelemetryConfig,
    /// How updates of the weights go.
    pub weights: WeightsConfig,
    pub prefill: Vec<WorkerAddress>,
    pub decode: Vec<WorkerAddress>,
    pub connector: Connector,
    pub mode: Mode,
    /// The run's secret, for the workers' runtimes.
    pub secret: Secret,
    /// What else the metrics page shows: whoever starts the proxy may have numbers of its own.
    pub registry: Registry,
    /// Health questions that may fail in a row before a worker counts as down. PRIME-RL's default is 2.
    pub health_failures_max: u32,
}

/// Why the proxy cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    #[error("the worker URL `{url}` cannot be used: {why}; write http://HOST:PORT")]
    WorkerUrl { url: String, why: &'static str },
    #[error("the {role} worker {url} was given twice: each counts as a worker of its own")]
    SameWorker { role: &'static str, url: String },
    #[error("no {role} worker was given")]
    NoWorkers { role: &'static str },
    #[error(
        "worker {url} needs a KV address: vLLM's P2pNcclConnector finds its peers by it (--prefill-kv-addrs, --decode-kv-addrs)"
    )]
    NoKvAddress { url: String },
    #[error("`[proxy] {key}` {why}")]
    Setting { key: &'static str, why: String },
    #[error(transparent)]
    Traces(#[from] TraceError),
    #[error("cannot start the proxy's threads: {0}")]
    Threads(io::Error),
    #[error("cannot use the proxy's listener: {0}")]
    Listener(io::Error),
}

impl ProxyError {
    /// Whether what was asked for is at fault, and not the machine.
    pub fn is_configuration(&self) -> bool {
        !matches!(self, Self::Threads(_) | Self::Listener(_))
    }
}

/// How a shutdown went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// Every request ended by itself.
    Clean,
    /// The grace period ended first; this many requests were cut off.
    Cut { requests: usize },
}

/// A running proxy. Dropping it ends it without grace.
#[derive(Debug)]
pub struct ProxyHandle {
    shared: Arc<Shared>,
    address: SocketAddr,
    admin_address: Option<SocketAddr>,
    stop: Stop,
    threads: Vec<JoinHandle<()>>,
}

/// Starts the proxy's threads. They serve until the handle is shut down or dropped.
pub fn serve(mut setup: ProxySetup) -> Result<ProxyHandle, ProxyError> {
    let address = setup.listener.local_addr().map_err(ProxyError::Listener)?;
    let admin = setup.admin_listener.as_ref().map(TcpListener::local_addr).transpose();
    let admin_address = admin.map_err(ProxyError::Listener)?;
    for listener in std::iter::once(&setup.listener).chain(&setup.admin_listener) {
        listener.set_nonblocking(true).map_err(ProxyError::Listener)?;
    }
    let threads = setup.config.threads.unwrap_or_else(default_threads).max(1);
    let (abandon, abandoned) = mpsc::channel(abort::QUEUE_MAX);
    let (desk, orders) = Desk::new(&setup.weights);
    let registry = std::mem::take(&mut setup.registry);
    let (traced, to_trace) = mpsc::channel(trace::QUEUE_MAX);
    let tracing = Traces::start(&setup.telemetry)?.map(|traces| Tracing::new(traces, traced));
    let shared = share(&setup, registry, abandon, desk, tracing)?;
    let stop = Stop { drain: CancellationToken::new(), kill: CancellationToken::new() };
    let mut handle = ProxyHandle {
        shared: Arc::clone(&shared),
        address,
        admin_address,
        stop: stop.clone(),
        threads: Vec::with_capacity(threads + 1),
    };
    let mut doors = Vec::with_capacity(threads);
    let mut access = Vec::with_capacity(threads + 1);
    for number in 0..threads {
        let lane = Arc::new(Lane::new(Arc::clone(&shared)));
        access.push(Arc::clone(&lane.access));
        let (door, thread) = start_lane(number, lane, &stop).map_err(ProxyError::Threads)?;
        doors.push(door);
        handle.threads.push(thread);
    }
    let keeper = Keeper {
        shared,
        listener: setup.listener,
        admin_listener: setup.admin_listener,
        doors,
        access,
        abandoned,
        to_trace,
        orders,
        secret: setup.secret,
        stop,
    };
    handle.threads.push(keeper.start().map_err(ProxyError::Threads)?);
    Ok(handle)
}

fn default_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    // The other half is the workers'.
    (cores / 2).clamp(1, THREADS_DEFAULT_MAX)
}

fn share(
    setup: &ProxySetup,
    registry: Registry,
    abandoned: mpsc::Sender<Abandoned>,
    weights: Desk,
    tracing: Option<Tracing>,
) -> Result<Arc<Shared>, ProxyError> {
    let config = &setup.config;
    if config.dispatch == Dispatch::Concurrent && setup.connector != Connector::Native {
        let why = "is \"concurrent\", which pdlink's own connector alone can do; set `dispatch = \"sequential\"`, or use \
                   `--connector-impl native`";
        return Err(ProxyError::Setting { key: "dispatch", why: why.to_owned() });
    }
    let mut limits = Limits::of(config)?;
    limits.inflight_max = fitting(limits.inflight_max);
    let quarantine = Duration::try_from_secs_f64(config.quarantine_s)
        .map_err(|error| ProxyError::Setting { key: "quarantine_s", why: error.to_string() })?;
    let rules = Rules {
        quarantine_after_failures: config.quarantine_after_failures.max(1),
        quarantine,
        down_after_probes: setup.health_failures_max.max(1),
    };
    let mut workers: Vec<Arc<Worker>> = Vec::new();
    for (role, addresses) in [(Role::Prefill, &setup.prefill), (Role::Decode, &setup.decode)] {
        let needed = role == Role::Decode || setup.mode == Mode::Disaggregated;
        if needed && addresses.is_empty() {
            return Err(ProxyError::NoWorkers { role: role.name() });
        }
        for address in addresses {
            if setup.connector == Connector::P2pNccl && setup.mode == Mode::Disaggregated && address.kv_addr.is_none() {
                return Err(ProxyError::NoKvAddress { url: address.url.clone() });
            }
            let worker = Worker::new(workers.len(), role, address.clone(), rules)?;
            if workers.iter().any(|other| other.role == role && other.name() == worker.name()) {
                return Err(ProxyError::SameWorker { role: role.name(), url: worker.name().to_owned() });
            }
            workers.push(Arc::new(worker));
        }
    }
    let of = |role| workers.iter().filter(|worker| worker.role == role).cloned().collect();
    // Only pdlink's own runtime listens at a worker's KV address for such questions.
    let runtime = |worker: &Arc<Worker>| match (setup.connector, &worker.address.kv_addr) {
        (Connector::Native, Some(addr)) => {
            Some(AdminClient::new(addr.clone(), setup.secret.clone(), abort::TELL_TIMEOUT))
        }
        _ => None,
    };
    let runtimes: Box<[Option<AdminClient>]> = workers.iter().map(runtime).collect();
    let door = |(worker, runtime): (&Arc<Worker>, &Option<AdminClient>)| match &worker.address.weights_addr {
        Some(addr) => Some(AdminClient::new(addr.clone(), setup.secret.clone(), abort::TELL_TIMEOUT)),
        None => runtime.clone(),
    };
    let every = Duration::try_from_secs_f64(setup.telemetry.watch_interval_s).ok().filter(|every| *every >= WATCH_MIN);
    let every = every.ok_or_else(|| ProxyError::Setting {
        key: "watch_interval_s",
        why: format!("of `[telemetry]` must be {WATCH_MIN:?} at least, got {} s", setup.telemetry.watch_interval_s),
    })?;
    Ok(Arc::new(Shared {
        limits,
        watch: Watch::new(workers.len(), every),
        tracing,
        mode: setup.mode,
        connector: setup.connector,
        policy: config.policy,
        prefill: Pool::new(of(Role::Prefill), config.policy),
        decode: Pool::new(of(Role::Decode), config.policy),
        doors: workers.iter().zip(&runtimes).map(door).collect(),
        runtimes,
        workers: workers.into_boxed_slice(),
        gate: Gate { token: config.admin_token.clone(), apart: setup.admin_listener.is_some() },
        weights,
        metrics: Metrics::new(registry),
        secret: setup.secret.clone(),
        abandoned,
        inflight: AtomicUsize::new(0),
        draining: AtomicBool::new(false),
    }))
}

/// How many requests in flight the process has files for: each takes a socket on either side. The soft limit of 1024 that
/// most shells give is raised as far as it goes.
fn fitting(inflight_max: usize) -> usize {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let Some(files) = getrlimit(Resource::Nofile).current else { return inflight_max };
    let files = usize::try_from(files).unwrap_or(usize::MAX);
    let fitting = (files.saturating_sub(FILES_OF_OTHERS) / 2).max(1);
    if fitting < inflight_max {
        tracing::info!(files, inflight_max, fitting, "the limit on open files allows fewer requests in flight");
    }
    if let Err(error) = raised {
        tracing::info!(%error, "the limit on open files could not be raised");
    }
    inflight_max.min(fitting)
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn start_lane(number: usize, lane: Arc<Lane>, stop: &Stop) -> io::Result<(Door, JoinHandle<()>)> {
    let (sender, arrivals) = mpsc::channel(ARRIVALS_MAX);
    let connections = Arc::new(AtomicUsize::new(0));
    let door = Door { arrivals: sender, connections: Arc::clone(&connections) };
    // A child token per lane: its connections then share no lock with other lanes.
    let stop = Stop { drain: stop.drain.child_token(), kill: stop.kill.child_token() };
    let runtime = runtime()?;
    let thread = std::thread::Builder::new().name(format!("proxy-{number}")).spawn(move || {
        let service = Service { router: routes::main(&lane), generates: true };
        runtime.block_on(server::serve(lane, service, arrivals, connections, stop));
    })?;
    Ok((door, thread))
}

/// The thread for what is not on a request's way: accepting, health, aborts, admin on its own port.
struct Keeper {
    shared: Arc<Shared>,
    listener: TcpListener,
    admin_listener: Option<TcpListener>,
    doors: Vec<Door>,
    access: Vec<Arc<AccessQueue>>,
    abandoned: mpsc::Receiver<Abandoned>,
    to_trace: mpsc::Receiver<Traced>,
    orders: Orders,
    secret: Secret,
    stop: Stop,
}

impl Keeper {
    fn start(self) -> io::Result<JoinHandle<()>> {
        let runtime = runtime()?;
        std::thread::Builder::new().name("proxy-keeper".to_owned()).spawn(move || {
            if let Err(error) = runtime.block_on(self.run()) {
                tracing::error!(%error, "the proxy cannot use its listener");
            }
        })
    }

    async fn run(mut self) -> io::Result<()> {
        let lane = Arc::new(Lane::new(Arc::clone(&self.shared)));
        self.access.push(Arc::clone(&lane.access));
        let mut tasks = JoinSet::new();
        tasks.spawn(access::write(self.access.clone()));
        tasks.spawn(probe::watch_all(Arc::clone(&lane)));
        tasks.spawn(watch::keep(Arc::clone(&lane)));
        if self.shared.connector == Connector::P2pNccl && self.shared.mode == Mode::Disaggregated {
            for worker in &self.shared.workers {
                tasks.spawn(doubt::tell(Arc::clone(&lane), Arc::clone(worker), self.secret.clone()));
            }
        }
        tasks.spawn(trace::tell_transfers(Arc::clone(&self.shared), self.to_trace));
        tasks.spawn(weights::keep(Arc::clone(&self.shared), self.orders));
        tasks.spawn(abort::tell(self.shared, self.secret, self.abandoned));
        let listener = tokio::net::TcpListener::from_std(self.listener)?;
        let accept = server::accept(listener, self.doors, self.stop.drain.clone());
        let admin = async {
            let Some(listener) = self.admin_listener else { return Ok(()) };
            let listener = tokio::net::TcpListener::from_std(listener)?;
            let (sender, arrivals) = mpsc::channel(ARRIVALS_MAX);
            let connections = Arc::new(AtomicUsize::new(0));
            let door = Door { arrivals: sender, connections: Arc::clone(&connections) };
            let service = Service { router: routes::admin_only(&lane), generates: false };
            let serve = server::serve(Arc::clone(&lane), service, arrivals, connections, self.stop.clone());
            tokio::join!(server::accept(listener, vec![door], self.stop.drain.clone()), serve);
            Ok(())
        };
        let ((), admin) = tokio::join!(accept, admin);
        // Requests that are still in flight may leave transfers behind, so aborts are told until the end.
        self.stop.kill.cancelled().await;
        access::flush(&self.access);
        admin
    }
}

impl ProxyHandle {
    /// Where clients come.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where admin calls come, if apart.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin_address
    }

    /// Requests being served now.
    pub fn inflight(&self) -> usize {
        self.shared.inflight.load(Ordering::Relaxed)
    }

    /// Says at once that a worker has ended. False: there is none of that URL.
    pub fn worker_went_down(&self, url: &str) -> bool {
        self.tell(url, |worker| worker.health.went_down())
    }

    /// Says at once that a worker serves (again).
    pub fn worker_came_up(&self, url: &str) -> bool {
        self.tell(url, |worker| worker.health.came_up())
    }

    /// Says that a worker finishes what it has and takes nothing more, until it is said to serve again.
    pub fn worker_leaves(&self, url: &str) -> bool {
        self.tell(url, |worker| worker.health.leaves())
    }

    /// Requests that a worker has now; none where there is no worker of that URL.
    pub fn worker_inflight(&self, url: &str) -> usize {
        let found = self.shared.workers.iter().filter(|worker| worker.name() == base_url(url));
        found.map(|worker| worker.inflight()).sum()
    }

    /// Why a worker ended, as somebody knows who saw it. False: there is none of that URL.
    pub fn worker_failed(&self, url: &str, why: &str) -> bool {
        self.tell(url, |worker| self.shared.watch.failures.note(What::Worker, Some(worker.number), why))
    }

    fn tell(&self, url: &str, what: impl Fn(&Worker)) -> bool {
        let found = self.shared.workers.iter().filter(|worker| worker.name() == base_url(url));
        found.inspect(|worker| what(worker)).count() > 0
    }

    /// Takes no more requests, lets those in flight end within `grace`, then ends the threads. Blocks.
    pub fn shutdown(mut self, grace: Duration) -> Drained {
        self.shared.draining.store(true, Ordering::Relaxed);
        self.shared.watch.end();
        self.stop.drain.cancel();
        let deadline = Instant::now() + grace;
        // Lanes end by themselves when their last connection has; the keeper waits for them.
        while Instant::now() < deadline && !self.lanes_ended() {
            std::thread::sleep(Duration::from_millis(5).min(grace));
        }
        let requests = self.inflight();
        self.end();
        if requests == 0 { Drained::Clean } else { Drained::Cut { requests } }
    }

    fn lanes_ended(&self) -> bool {
        let lanes = self.threads.len().saturating_sub(1);
        self.threads.iter().take(lanes).all(JoinHandle::is_finished)
    }

    fn end(&mut self) {
        self.stop.drain.cancel();
        self.stop.kill.cancel();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread of the proxy panicked");
            }
        }
        if let Some(tracing) = &self.shared.tracing {
            tracing.end();
        }
    }
}

impl Drop for ProxyHandle {
    fn drop(&mut self) {
        self.end();
    }
}
