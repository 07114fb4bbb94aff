//! Workers without an engine: the weights runtime as it is, behind a control listener, before a target that a test scripts.
#![allow(dead_code, reason = "each file of tests uses its own part of this")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pdlink::config::{InFlight, KvConfig, WeightsConfig};
use pdlink::control::{
    self, AdminAnswer, AdminClient, AdminHandler, AdminReply, AdminRequest, Hello, Identity, Liveness, Part, Role,
    RuntimeStatus, TrainerGroup, VERSIONS, WeightSource, WeightsOffer, WeightsPhase, WeightsRequest, WeightsStatus,
};
use pdlink::security::Secret;
use pdlink::weights::{NewWeights, Paths, ReceiverSetup, WeightTarget, WeightsMetrics, WeightsReceiver};
use tokio::task::JoinSet;

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Longer than the proxy's patience with a commit in these tests.
const LATE: std::time::Duration = std::time::Duration::from_millis(1200);

/// What goes wrong in an engine, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    NeverPauses,
    DiesAtPause,
    RefusesWeights,
    NeverCommits,
    CommitsLate,
    DiesAtCommit,
}

/// An engine that does at once what it is told, and writes it down, unless it is in trouble.
#[derive(Default)]
pub(crate) struct Notes {
    pub(crate) said: Mutex<Vec<String>>,
    pub(crate) weights: Mutex<Option<NewWeights>>,
    trouble: Mutex<Option<Trouble>>,
    dead: Arc<AtomicBool>,
    /// What a trainer has put into its store, once there is one.
    pub(crate) name: Mutex<Option<Vec<u8>>>,
    /// What is never called must not be dropped either.
    kept: Mutex<Vec<Box<dyn std::any::Any + Send>>>,
}

impl Notes {
    pub(crate) fn said(&self) -> Vec<String> {
        self.said.lock().unwrap().clone()
    }

    fn note(&self, what: &str) {
        self.said.lock().unwrap().push(what.to_owned());
    }

    /// Whether one of these is due; it is then over.
    fn trouble(&self, kinds: &[Trouble]) -> Option<Trouble> {
        self.trouble.lock().unwrap().take_if(|trouble| kinds.contains(trouble))
    }
}

impl WeightTarget for Notes {
    fn pause(&self, _: InFlight, done: Box<dyn FnOnce() + Send>) {
        self.note("pause");
        match self.trouble(&[Trouble::NeverPauses, Trouble::DiesAtPause]) {
            Some(Trouble::DiesAtPause) => self.dead.store(true, Ordering::SeqCst),
            Some(_) => self.kept.lock().unwrap().push(Box::new(done)),
            None => done(),
        }
    }

    fn commit(&self, weights: NewWeights, done: Box<dyn FnOnce(Result<(), String>) + Send>) {
        const TROUBLES: [Trouble; 4] =
            [Trouble::RefusesWeights, Trouble::NeverCommits, Trouble::CommitsLate, Trouble::DiesAtCommit];
        let trouble = self.trouble(&TROUBLES);
        match trouble {
            Some(Trouble::RefusesWeights) => return done(Err("it does not fit the model".to_owned())),
            Some(Trouble::DiesAtCommit) => return self.dead.store(true, Ordering::SeqCst),
            Some(Trouble::CommitsLate) | None => {}
            Some(_) => return self.kept.lock().unwrap().push(Box::new(done)),
        }
        self.note(&format!("commit {}", weights.version));
        *self.weights.lock().unwrap() = Some(weights);
        if matches!(trouble, Some(Trouble::CommitsLate)) {
            std::thread::spawn(move || {
                std::thread::sleep(LATE);
                done(Ok(()));
            });
            return;
        }
        done(Ok(()));
    }

    fn resume(&self) {
        self.note("resume");
    }

    fn meet(&self, group: TrainerGroup, done: Box<dyn FnOnce(Result<Vec<u8>, String>) + Send>) {
        self.note(&format!("meet {} of {}", group.rank, group.ranks));
        done(self.name.lock().unwrap().clone().ok_or_else(|| "connection refused".to_owned()));
    }
}

pub(crate) fn paths(weights: WeightsConfig) -> Paths {
    Paths {
        weights,
        kv: KvConfig::default(),
        secret: Secret::loopback(),
        bind: std::net::Ipv4Addr::LOCALHOST.into(),
        advertise_host: "127.0.0.1".to_owned(),
        gpu: None,
        streams: false,
        casts: Arc::default(),
        casts_host: false,
        wrap_path: None,
    }
}

pub(crate) fn small_buckets() -> WeightsConfig {
    WeightsConfig { bucket_bytes: 4096, ..WeightsConfig::default() }
}

/// Serves control connections; what is welcome is up to the caller.
pub(crate) async fn listen(tasks: &mut JoinSet<()>, welcome: control::Welcome) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let hello =
        Hello { part: Part::Engine, engine_id: "w".to_owned(), incarnation: 1, role: Role::Both, payload: Vec::new() };
    let identity = Identity { secret: Secret::loopback(), versions: VERSIONS, hello, timeout: PATIENCE };
    let liveness = Liveness { ping_interval: Duration::from_millis(200), peer_timeout: PATIENCE };
    tasks.spawn(control::serve(listener, Arc::new(identity), liveness, welcome));
    address
}

/// What a KV runtime answers beside what is about weights.
struct Runtime(Arc<dyn AdminHandler>);

impl AdminHandler for Runtime {
    fn ask(&self, request: AdminRequest, reply: AdminReply) {
        match request {
            AdminRequest::Weights(_) => self.0.ask(request, reply),
            AdminRequest::Status => reply.send(&AdminAnswer::Status(RuntimeStatus {
                engine_id: "w".to_owned(),
                incarnation: 1,
                role: Role::Both,
                held_blocks: 0,
                transfers_active: 0,
                weight_version: 0,
            })),
            other => reply.send(&AdminAnswer::Refused(format!("{other:?}"))),
        }
    }
}

/// A worker without an engine.
pub(crate) struct Worker {
    pub(crate) address: String,
    pub(crate) notes: Arc<Notes>,
    admin: AdminClient,
    _receiver: WeightsReceiver,
    _tasks: JoinSet<()>,
}

impl Worker {
    pub(crate) async fn start(paths: Paths) -> Self {
        let notes = Arc::new(Notes::default());
        let metrics = WeightsMetrics::new(&mut prometheus_client::registry::Registry::default());
        let target: Arc<dyn WeightTarget> = Arc::clone(&notes) as _;
        let receiver =
            WeightsReceiver::start(ReceiverSetup { version: 0, paths, target, base: None, ranks: Vec::new(), metrics })
                .unwrap();
        let door = receiver.door();
        let mut tasks = JoinSet::new();
        let admin: Arc<dyn AdminHandler> = Arc::new(Runtime(Arc::clone(&door.admin)));
        let welcome = move |hello: Hello, connection: &control::Connection| match hello.part {
            Part::Weights => (door.welcome)(hello, connection),
            _ => control::admin_sink(connection, Arc::clone(&admin)),
        };
        let dead = Arc::clone(&notes.dead);
        let mut serving = JoinSet::new();
        let address = listen(&mut serving, Arc::new(welcome)).await;
        tasks.spawn(async move {
            while !dead.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            serving.shutdown().await;
        });
        let admin = AdminClient::new(address.clone(), Secret::loopback(), PATIENCE);
        Self { address, notes, admin, _receiver: receiver, _tasks: tasks }
    }

    /// From now on this goes wrong, once.
    pub(crate) fn trouble(&self, trouble: Trouble) {
        *self.notes.trouble.lock().unwrap() = Some(trouble);
    }

    /// Ends as a process that is killed does: all its connections, and its listener.
    pub(crate) fn kill(&self) {
        self.notes.dead.store(true, Ordering::SeqCst);
    }

    pub(crate) async fn ask(&self, request: WeightsRequest) -> WeightsStatus {
        self.admin.weights(request).await.expect("an answer")
    }

    pub(crate) async fn offer(&self, version: u64, source: WeightSource, receiver: u32, receivers: u32) {
        let offer =
            WeightsOffer { update: version, version, source, receivers, receiver, stage_ms: 10_000, hold_ms: 10_000 };
        self.ask(WeightsRequest::Offer(offer)).await;
    }

    /// Waits until staging has ended.
    pub(crate) async fn staged(&self) -> WeightsStatus {
        self.until(|status| status.phase != WeightsPhase::Staging).await
    }

    pub(crate) async fn until(&self, what: impl Fn(&WeightsStatus) -> bool) -> WeightsStatus {
        let waiting = async {
            loop {
                let status = self.ask(WeightsRequest::Status).await;
                if what(&status) {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.expect("in time")
    }

    pub(crate) async fn commit(&self, update: u64) {
        self.ask(WeightsRequest::Pause { update, in_flight: InFlight::Restart }).await;
        self.until(|status| status.phase == WeightsPhase::Paused).await;
        self.ask(WeightsRequest::Commit { update }).await;
        self.until(|status| status.phase == WeightsPhase::Committed).await;
        self.ask(WeightsRequest::Resume { update }).await;
    }

    /// The bytes of every tensor that the engine was handed.
    pub(crate) fn tensors(&self) -> Vec<(String, Vec<u8>)> {
        let weights = self.notes.weights.lock().unwrap();
        let staged = weights.as_ref().unwrap().staged.as_ref().unwrap();
        let (manifest, region) = (staged.manifest(), staged.region().expect("staged in host memory"));
        let bytes = |at: usize| {
            let place = manifest.place(at);
            region.to_vec(place.start, place.end - place.start).unwrap()
        };
        manifest.tensors().iter().enumerate().map(|(at, tensor)| (tensor.name.clone(), bytes(at))).collect()
    }
}
