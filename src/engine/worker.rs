//! One worker, whole: its KV, its scheduler thread, its HTTP front, in the order they start and end.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, sleep_until};

use super::blocks::Blocks;
use super::front::Front;
use super::kv_cache::KvCache;
use super::layout::CacheError;
use super::metrics::EngineMetrics;
use super::model::Weights;
use super::scheduler::{Command, Pace, Scheduler, SchedulerParts, SchedulerThread};
use super::server::{self, ServerState};
use super::weights::Target;
use crate::config::{KvConfig, KvSendType, ReferenceConfig, WeightsConfig};
use crate::control::WeightsDoor;
use crate::kv::{KvError, KvMetrics, KvRuntime, Role, RuntimeConfig};
use crate::openai::RefusalIo;
use crate::security::Secret;
use crate::transport::{self, Transport, TransportError};
use crate::weights::{Paths, ReceiverSetup, WeightsMetrics, WeightsReceiver};

/// How often a draining worker looks whether it is at rest.
const REST_POLL: Duration = Duration::from_millis(5);

/// What a worker is started with.
pub struct EngineSetup {
    pub role: Role,
    /// The model's name, as clients must give it.
    pub model: String,
    pub tp: u32,
    pub reference: ReferenceConfig,
    pub kv: KvConfig,
    /// How new weights come, while it serves.
    pub weights: WeightsConfig,
    pub prefix_caching: bool,
    /// KV of one version is never used with another (KV-5).
    pub weight_version: u64,
    /// The KV address: bound and listening.
    pub kv_listener: std::net::TcpListener,
    /// Under which name or address peers reach the KV address.
    pub advertise_host: String,
    pub secret: Secret,
    /// Who drives the copy of what this worker prefills.
    pub send_type: KvSendType,
    /// Put around each path that this worker offers: how tests make paths go wrong.
    #[doc(hidden)]
    pub wrap_path: Option<WrapPath>,
}

/// Makes one path of another.
#[doc(hidden)]
pub type WrapPath = Box<dyn Fn(Arc<dyn Transport>) -> Arc<dyn Transport> + Send + Sync>;

/// Why a worker does not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the KV cache cannot be made: {0}")]
    Cache(#[from] CacheError),
    #[error(transparent)]
    Link(#[from] KvError),
    #[error("cannot open the paths to other workers: {0}")]
    Paths(#[from] TransportError),
    #[error("the KV address: {0}")]
    Address(io::Error),
    #[error("cannot start the scheduler's thread: {0}")]
    Thread(io::Error),
    #[error("cannot start the weights runtime: {0}")]
    Weights(io::Error),
}

/// A running worker. Dropping it stops it.
pub struct Engine {
    front: Front,
    state: server::State,
    metrics: Arc<EngineMetrics>,
    memory: String,
    thread: SchedulerThread,
    receiver: Option<WeightsReceiver>,
    link: Option<Arc<KvRuntime>>,
}

impl Engine {
    /// Allocates the KV, opens the link, starts the scheduler.
    pub fn start(setup: EngineSetup) -> Result<Self, EngineError> {
        let cache = KvCache::new(&setup.model, &setup.reference, setup.tp)?;
        let memory = memory_line(&cache, &setup);
        let weights = Weights::base(setup.weight_version);
        let model_len_max = setup.reference.max_model_len.min(setup.reference.num_blocks * setup.reference.block_size);
        let mut registry = Registry::default();
        let metrics = Arc::new(EngineMetrics::new(&mut registry));
        let (sender, commands) = channel();
        let front = Front::new(sender, setup.reference.requests_max);
        let receiver = start_receiver(&setup, &mut registry, &front, weights)?;
        let weights_runtime = receiver.handle();
        let link = Arc::new(start_link(&setup, &cache, &mut registry, &front, receiver.door())?);
        let scheduler = Scheduler::new(SchedulerParts {
            blocks: Blocks::new(cache, setup.prefix_caching),
            link: link.clone(),
            metrics: metrics.clone(),
            policy: setup.kv.load_failure_policy,
            model_len_max,
            weights,
        });
        let alive = Arc::new(AtomicBool::new(true));
        let pace = Pace {
            prefill_us_per_token: setup.reference.prefill_us_per_token,
            decode_us_per_token: setup.reference.decode_us_per_token,
        };
        let thread = SchedulerThread::start(scheduler, commands, pace, link.clone(), alive.clone())
            .map_err(EngineError::Thread)?;
        let state = Arc::new(ServerState {
            front: front.clone(),
            model: setup.model,
            model_len_max,
            role: setup.role,
            weights,
            adapters: server::Adapters::default(),
            weights_runtime,
            weights_config: setup.weights,
            registry,
            started_s: server::unix_time_s(),
            alive,
        });
        Ok(Self { front, state, metrics, memory, thread, receiver: Some(receiver), link: Some(link) })
    }

    /// How much memory the KV takes, and why, in one line.
    pub fn memory(&self) -> &str {
        &self.memory
    }

    /// The HTTP routes.
    pub fn router(&self) -> Router {
        server::router(self.state.clone())
    }

    /// Serves HTTP until `stop` resolves, then drains: takes no more requests, ends those in flight, and waits until no
    /// block is held for decode. True if all of that was done within `grace`.
    pub async fn serve(
        &self,
        listener: TcpListener,
        stop: impl Future<Output = ()> + Send + 'static,
        grace: Duration,
    ) -> io::Result<bool> {
        let front = self.front.clone();
        let (stopped, mut deadline) = tokio::sync::watch::channel(None);
        let signal = async move {
            stop.await;
            front.drain();
            stopped.send_replace(Some(Instant::now() + grace));
        };
        let serving = axum::serve(Clients(listener), self.router()).with_graceful_shutdown(signal);
        let overdue = async {
            let at = deadline.wait_for(Option::is_some).await.ok().and_then(|at| *at);
            match at {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            served = serving.into_future() => served?,
            () = overdue => return Ok(false),
        }
        let until = deadline.borrow().unwrap_or_else(Instant::now);
        Ok(self.rest(until).await)
    }

    /// Waits until nothing runs or is held, but no longer than `until`.
    async fn rest(&self, until: Instant) -> bool {
        while !self.metrics.at_rest() {
            if Instant::now() >= until {
                return false;
            }
            sleep(REST_POLL).await;
        }
        true
    }

    /// `host:port` under which peers reach this worker's KV.
    pub fn kv_address(&self) -> String {
        self.link.as_ref().map(|link| link.address()).unwrap_or_default()
    }

    /// Ends every request, the scheduler and the link. False if the scheduler had died before.
    pub fn stop(mut self) -> bool {
        self.end()
    }

    fn end(&mut self) -> bool {
        let was_alive = self.state.alive.load(Ordering::Acquire);
        self.front.drain();
        // First: what it began with the scheduler must not wait for a scheduler that has ended.
        drop(self.receiver.take());
        self.front.send(Command::Stop);
        let ended_well = self.thread.join();
        // Last, and after the scheduler's own handle is gone: peers are told of what the scheduler aborted.
        if let Some(link) = self.link.take().and_then(Arc::into_inner) {
            link.shutdown();
        }
        ended_well && was_alive
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.end();
    }
}

/// Where clients come.
struct Clients(TcpListener);

impl Listener for Clients {
    type Io = RefusalIo<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let (stream, peer) = Listener::accept(&mut self.0).await;
        // A token is a small packet: it must not wait for the next one.
        let _ = stream.set_nodelay(true);
        (RefusalIo::new(stream), peer)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

fn start_link(
    setup: &EngineSetup,
    cache: &KvCache,
    registry: &mut Registry,
    front: &Front,
    weights: WeightsDoor,
) -> Result<KvRuntime, EngineError> {
    let listener = setup.kv_listener.try_clone().map_err(EngineError::Address)?;
    let bind = listener.local_addr().map_err(EngineError::Address)?.ip();
    let paths = transport::offers(&transport::Setup {
        config: &setup.kv,
        regions: cache.regions(),
        secret: &setup.secret,
        bind,
        advertise_host: &setup.advertise_host,
    })?;
    let wrap = |path| setup.wrap_path.as_ref().map_or_else(|| Arc::clone(&path), |wrap| wrap(Arc::clone(&path)));
    let config = RuntimeConfig {
        kv: &setup.kv,
        engine_id: format!("{}-{:016x}", setup.role.name(), rand::random::<u64>()),
        role: setup.role,
        send_type: setup.send_type,
        siblings: Vec::new(),
        geometry: cache.geometry().clone(),
        ranks: cache.ranks().to_vec(),
        secret: setup.secret.clone(),
        listener,
        advertise_host: setup.advertise_host.clone(),
        weight_version: setup.weight_version,
        weights: Some(weights),
        transports: Some(paths.into_iter().map(wrap).collect()),
        metrics: KvMetrics::new(registry),
    };
    let reports = front.clone();
    Ok(KvRuntime::start(config, Box::new(move |report| reports.send(Command::Report(report))))?)
}

fn start_receiver(
    setup: &EngineSetup,
    registry: &mut Registry,
    front: &Front,
    base: Weights,
) -> Result<WeightsReceiver, EngineError> {
    let paths = Paths {
        weights: setup.weights.clone(),
        kv: setup.kv.clone(),
        secret: setup.secret.clone(),
        bind: setup.kv_listener.local_addr().map_err(EngineError::Address)?.ip(),
        advertise_host: setup.advertise_host.clone(),
        gpu: None,
        streams: false,
        casts: Arc::default(),
        casts_host: false,
        wrap_path: None,
    };
    let target = Arc::new(Target { front: front.clone(), base });
    let metrics = WeightsMetrics::new(registry);
    let (version, ranks) = (setup.weight_version, Vec::new());
    let receiver = ReceiverSetup { version, paths, target, base: None, ranks, metrics };
    WeightsReceiver::start(receiver).map_err(EngineError::Weights)
}

fn memory_line(cache: &KvCache, setup: &EngineSetup) -> String {
    let block = cache.block_bytes();
    let total = block * u64::from(cache.num_blocks());
    let (shape, geometry) = (&setup.reference, cache.geometry());
    format!(
        "KV cache: {} blocks × {block} bytes = {:.1} MiB ({} layers, {} KV heads × {} × {} bytes, {} tokens per block, {} ranks, {:?}); \
         memory is taken as blocks are first used",
        cache.num_blocks(),
        total as f64 / f64::from(1 << 20),
        shape.layers,
        shape.kv_heads,
        shape.head_size,
        shape.dtype_bytes,
        shape.block_size,
        geometry.tp_size,
        shape.layout,
    )
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use http::{Request, StatusCode};
    use tower::ServiceExt;

    use super::*;

    fn setup() -> EngineSetup {
        EngineSetup {
            role: Role::Both,
            model: "m".to_owned(),
            tp: 1,
            reference: ReferenceConfig { num_blocks: 16, ..ReferenceConfig::default() },
            kv: KvConfig::default(),
            weights: WeightsConfig::default(),
            prefix_caching: true,
            weight_version: 0,
            kv_listener: std::net::TcpListener::bind("127.0.0.1:0").expect("a port"),
            advertise_host: "127.0.0.1".to_owned(),
            secret: Secret::loopback(),
            send_type: KvSendType::Get,
            wrap_path: None,
        }
    }

    async fn status(engine: &Engine, request: Request<Body>) -> StatusCode {
        engine.router().oneshot(request).await.expect("infallible").status()
    }

    #[tokio::test]
    async fn a_worker_whose_scheduler_has_ended_says_so() {
        let engine = Engine::start(setup()).expect("it starts");
        let health = || Request::get("/health").body(Body::empty()).expect("a request");
        let completion = || {
            let body = r#"{"model": "m", "prompt": "hi"}"#;
            Request::post("/v1/completions").body(Body::from(body)).expect("a request")
        };
        assert_eq!(status(&engine, health()).await, StatusCode::OK);
        assert_eq!(status(&engine, completion()).await, StatusCode::OK);
        engine.front.send(Command::Stop);
        let patience = Instant::now() + Duration::from_secs(20);
        while engine.state.alive.load(Ordering::Acquire) {
            assert!(Instant::now() < patience, "the scheduler does not end");
            sleep(REST_POLL).await;
        }
        assert_eq!(status(&engine, health()).await, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(status(&engine, completion()).await, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(!engine.stop(), "it had died before");
    }

    #[test]
    fn a_shape_that_cannot_be_is_no_worker() {
        let mut wrong = setup();
        wrong.tp = 3;
        assert!(matches!(Engine::start(wrong), Err(EngineError::Cache(CacheError::Heads { kv_heads: 4, tp: 3 }))));
    }
}
