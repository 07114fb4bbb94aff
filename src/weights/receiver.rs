//! A worker's weights runtime: the thread that takes part in updates, and the door to it.
//!
//! One thread with a single-threaded tokio runtime owns the session, the staging in progress and what is kept. Requests of
//! the coordinator come in by the worker's control listener ([`WeightsReceiver::door`]) or from the worker's own HTTP routes
//! ([`WeightsHandle`]); the engine is driven through a [`WeightTarget`].

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::metrics::WeightsMetrics;
use super::paths::Paths;
use super::prime_rl::{JoinError, Joined, Trainer, join};
use super::room::Leftover;
use super::session::{Act, Heard, Session};
use super::source::Source;
use super::stage::{Stage, StageError, StageProgress};
use super::staged::Staged;
use super::stream::{self, Stream};
use crate::config::{InFlight, KvMemory, Staging};
use crate::control::{
    AdminAnswer, AdminHandler, AdminReply, AdminRequest, Connection, ControlError, Hello, Sink, TrainerGroup,
    WeightSource, WeightsDoor, WeightsOffer, WeightsPhase, WeightsRequest, WeightsStatus,
};

/// What an engine takes over at a commit.
#[derive(Clone)]
pub struct NewWeights {
    /// Names the transaction, the same on all ranks of a worker.
    pub update: u64,
    pub version: u64,
    /// Neither this nor a stream: what the worker was started with.
    pub staged: Option<Arc<Staged>>,
    /// Bytes that come as they are taken.
    pub stream: Option<Arc<Stream>>,
}

/// An engine whose weights can be changed. Nothing here blocks: what takes time ends in `done`, on any thread.
pub trait WeightTarget: Send + Sync {
    /// Stop between two steps. `done` once nothing is computed any more. A resumption that comes before takes it back.
    fn pause(&self, in_flight: InFlight, done: Box<dyn FnOnce() + Send>);

    /// Serve these from now on; called only while paused. An error means that the old ones are still there, whole.
    fn commit(&self, weights: NewWeights, done: Box<dyn FnOnce(Result<(), String>) + Send>);

    /// Go on.
    fn resume(&self);

    /// Meet a trainer's group in the store that it keeps, and tell what its first rank has put there for all others: NCCL's name for the
    /// group, as it was pickled.
    fn meet(&self, _group: TrainerGroup, done: Box<dyn FnOnce(Result<Vec<u8>, String>) + Send>) {
        done(Err("this engine meets no trainer's group; use weight_broadcast.type = \"filesystem\"".to_owned()));
    }
}

/// What a worker's part in updates is started with.
pub struct ReceiverSetup {
    /// What the worker serves at its start.
    pub version: u64,
    pub paths: Paths,
    pub target: Arc<dyn WeightTarget>,
    /// The checkpoint that the worker was started with, if it can be staged; otherwise the engine has to keep it.
    pub base: Option<String>,
    /// As [`WeightsStatus::ranks`].
    pub ranks: Vec<String>,
    pub metrics: WeightsMetrics,
}

type Answer = Box<dyn FnOnce(Result<WeightsStatus, String>) + Send>;

enum Event {
    Ask(WeightsRequest, Answer),
    Staged {
        update: u64,
        result: Result<Option<Arc<Staged>>, StageError>,
    },
    /// Ready to be taken as they come.
    Streams {
        update: u64,
        stream: Stream,
    },
    Heard(Heard),
    /// What serves lies where it is kept.
    Settled(Arc<Staged>),
    /// How joining a trainer's group ended.
    Joined {
        group: u64,
        result: Result<Joined, JoinError>,
    },
    Stop,
}

/// A running weights runtime. Dropping it ends it; an update under way is left to the coordinator's deadline.
pub struct WeightsReceiver {
    events: mpsc::UnboundedSender<Event>,
    kept: Arc<Mutex<Option<Source>>>,
    thread: Option<JoinHandle<()>>,
}

impl WeightsReceiver {
    pub fn start(setup: ReceiverSetup) -> io::Result<Self> {
        let (events, queue) = mpsc::unbounded_channel();
        let kept: Arc<Mutex<Option<Source>>> = Arc::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build()?;
        setup.metrics.version(setup.version);
        let driver = Driver {
            session: Session::new(setup.version),
            setup,
            events: events.clone(),
            kept: Arc::clone(&kept),
            serving: None,
            replaced: None,
            staged: None,
            stream: None,
            left: Arc::default(),
            progress: Arc::default(),
            paused_at: None,
            trainer: None,
            received: None,
            step: None,
            joining: JoinSet::new(),
            staging: JoinSet::new(),
            sources: JoinSet::new(),
        };
        let run = move || {
            runtime.block_on(driver.run(queue));
            // A read of a disk that hangs must not hold the worker's end.
            runtime.shutdown_background();
        };
        let thread = std::thread::Builder::new().name("pdlink-weights".to_owned()).spawn(run)?;
        Ok(Self { events, kept, thread: Some(thread) })
    }

    /// What the worker's control listener is to do with requests and visitors that are about weights.
    pub fn door(&self) -> WeightsDoor {
        let kept = Arc::clone(&self.kept);
        let welcome = move |_: Hello, connection: &Connection| -> Sink {
            match &*locked(&kept) {
                Some(source) => source.welcome(connection),
                None => {
                    let (peer, why) = (connection.peer().to_owned(), "no weights are kept here".to_owned());
                    connection.close(ControlError::Refused { peer, why });
                    Box::new(|_| {})
                }
            }
        };
        WeightsDoor { admin: Arc::new(self.handle()), welcome: Arc::new(welcome) }
    }

    /// For the worker's own HTTP routes.
    pub fn handle(&self) -> WeightsHandle {
        WeightsHandle(self.events.clone())
    }
}

impl Drop for WeightsReceiver {
    fn drop(&mut self) {
        let _ = self.events.send(Event::Stop);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the weights runtime's thread panicked");
        }
    }
}

/// A way to ask the weights runtime.
#[derive(Clone)]
pub struct WeightsHandle(mpsc::UnboundedSender<Event>);

impl WeightsHandle {
    pub async fn ask(&self, request: WeightsRequest) -> Result<WeightsStatus, String> {
        let (sender, answer) = oneshot::channel();
        let _ = self.0.send(Event::Ask(request, Box::new(move |status| drop(sender.send(status)))));
        answer.await.unwrap_or_else(|_| Err("the weights runtime has ended".to_owned()))
    }
}

impl AdminHandler for WeightsHandle {
    fn ask(&self, request: AdminRequest, reply: AdminReply) {
        let AdminRequest::Weights(request) = request else {
            return reply.send(&AdminAnswer::Refused("this is not about weights".to_owned()));
        };
        let answer = move |status: Result<WeightsStatus, String>| {
            reply.send(&status.map_or_else(AdminAnswer::Refused, |status| AdminAnswer::Weights(Box::new(status))));
        };
        let _ = self.0.send(Event::Ask(request, Box::new(answer)));
    }
}

struct Driver {
    session: Session,
    setup: ReceiverSetup,
    events: mpsc::UnboundedSender<Event>,
    /// Serves what is kept to workers that were restarted.
    kept: Arc<Mutex<Option<Source>>>,
    serving: Option<Arc<Staged>>,
    /// What served before, until the engine goes on: to give back its memory takes time.
    replaced: Option<Arc<Staged>>,
    staged: Option<Arc<Staged>>,
    stream: Option<Arc<Stream>>,
    left: Arc<Leftover>,
    progress: Arc<StageProgress>,
    paused_at: Option<Instant>,
    /// The trainer's group that this rank was told to join.
    trainer: Option<Trainer>,
    /// What such a group has brought, until it serves: a trainer does not send a step again.
    received: Option<(WeightSource, Arc<Staged>)>,
    /// What it brings now.
    step: Option<WeightSource>,
    joining: JoinSet<()>,
    staging: JoinSet<()>,
    sources: JoinSet<()>,
}

impl Driver {
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Event>) {
        loop {
            let wake = self.session.wake();
            tokio::select! {
                biased;
                event = queue.recv() => match event {
                    None | Some(Event::Stop) => break,
                    Some(event) => self.handle(event),
                },
                () = sleep_until(wake) => {
                    let acts = self.session.tick(Instant::now());
                    self.act(acts);
                }
            }
        }
        *locked(&self.kept) = None;
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Ask(WeightsRequest::Join(group), answer) => answer(self.join(group).map(|()| self.status())),
            Event::Ask(request, answer) => {
                let asked = self.session.ask(&request, Instant::now());
                let answered =
                    asked.inspect_err(|why| tracing::warn!(why, ?request, "refused")).map(|acts| self.act(acts));
                answer(answered.map(|()| self.status()));
            }
            Event::Staged { update, result } => self.staged(update, result),
            Event::Streams { update, stream } => {
                if self.session.update() == Some(update) && self.session.phase() == WeightsPhase::Staging {
                    tracing::warn!(
                        "the new weights go into the engine as they come: if that fails, neither version is left (WT-1 is given up)"
                    );
                    self.stream = Some(Arc::new(stream));
                }
                let acts = self.session.hear(Heard::Staged { update, result: Ok(None) }, Instant::now());
                self.act(acts);
            }
            Event::Heard(heard) => {
                let acts = self.session.hear(heard, Instant::now());
                self.act(acts);
                if self.session.phase() == WeightsPhase::Committed {
                    self.received = None;
                    self.replaced = std::mem::replace(&mut self.serving, self.staged.take());
                    if let Some(stream) = self.stream.take() {
                        self.session.serves(stream.digest());
                    }
                    self.setup.metrics.ended("committed");
                    self.setup.metrics.version(self.session.version());
                    tracing::info!(version = self.session.version(), digest = ?self.session.digest(), "new weights taken");
                }
            }
            Event::Joined { group, result } => {
                if let Some(trainer) = &mut self.trainer {
                    trainer.joined(group, result);
                }
            }
            Event::Settled(staged) => {
                self.give_to_others(&staged);
                let left = Arc::clone(&self.left);
                // If it was replaced meanwhile.
                self.sources.spawn_blocking(move || left.inherit(staged));
            }
            Event::Stop => {}
        }
    }

    /// Another group than before is left.
    fn join(&mut self, group: TrainerGroup) -> Result<(), String> {
        let phase = self.session.phase();
        if phase != WeightsPhase::Serving {
            return Err(format!("an update is under way here ({}); let it end first", phase.name()));
        }
        if self.trainer.as_ref().is_some_and(|trainer| trainer.link().group == group.id) {
            return Ok(());
        }
        self.joining = JoinSet::new();
        (self.trainer, self.received) = (Some(Trainer::joining(group.id)), None);
        let (target, paths) = (Arc::clone(&self.setup.target), self.setup.paths.clone());
        let events = self.events.clone();
        self.joining.spawn(async move {
            let id = group.id;
            let result = join(group, target, paths).await;
            let _ = events.send(Event::Joined { group: id, result });
        });
        Ok(())
    }

    fn staged(&mut self, update: u64, result: Result<Option<Arc<Staged>>, StageError>) {
        let result = result.map_err(|error| error.to_string());
        let heard = result.as_ref().map(|staged| staged.as_ref().map(|staged| staged.digest())).map_err(Clone::clone);
        if let Err(why) = &heard {
            tracing::warn!(why, "weights were not staged");
        }
        if self.session.update() == Some(update) && self.session.phase() == WeightsPhase::Staging {
            self.staged = result.ok().flatten();
            self.received = self.step.clone().zip(self.staged.clone());
        }
        let acts = self.session.hear(Heard::Staged { update, result: heard }, Instant::now());
        self.act(acts);
    }

    fn act(&mut self, acts: Vec<Act>) {
        for act in acts {
            match act {
                Act::Stage(offer) => self.stage(offer),
                Act::Drop => {
                    self.staging = JoinSet::new();
                    self.stream = None;
                    if let Some(staged) = self.staged.take() {
                        let left = Arc::clone(&self.left);
                        self.sources.spawn_blocking(move || left.inherit(staged));
                    }
                    self.setup.metrics.ended("aborted");
                    let failure = self.session.failure();
                    tracing::warn!(why = failure.map(|failure| &*failure.why), "an update of the weights was given up");
                }
                Act::Pause { update, in_flight } => {
                    self.paused_at = Some(Instant::now());
                    let events = self.events.clone();
                    let done = move || drop(events.send(Event::Heard(Heard::Paused { update })));
                    self.setup.target.pause(in_flight, Box::new(done));
                }
                Act::Commit { update, version } => {
                    let (staged, stream) = (self.staged.clone(), self.stream.clone());
                    let weights = NewWeights { update, version, staged, stream };
                    let events = self.events.clone();
                    let done = move |result| drop(events.send(Event::Heard(Heard::Committed { update, result })));
                    self.setup.target.commit(weights, Box::new(done));
                }
                Act::Resume => {
                    self.setup.target.resume();
                    if let Some(paused_at) = self.paused_at.take() {
                        self.setup.metrics.paused(paused_at.elapsed());
                    }
                    self.keep();
                }
            }
        }
    }

    fn stage(&mut self, offer: WeightsOffer) {
        tracing::info!(version = offer.version, source = %offer.source, "staging new weights");
        self.progress = Arc::default();
        let deadline = Instant::now() + Duration::from_millis(offer.stage_ms);
        let (update, paths, progress) = (offer.update, self.setup.paths.clone(), Arc::clone(&self.progress));
        let base = self.setup.base.clone();
        let events = self.events.clone();
        self.step = matches!(offer.source, WeightSource::Trainer { .. }).then(|| offer.source.clone());
        if let Some((_, received)) = self.received.as_ref().filter(|(source, _)| *source == offer.source) {
            let _ = events.send(Event::Staged { update, result: Ok(Some(Arc::clone(received))) });
            return;
        }
        self.received = None;
        let trainer = match (&offer.source, &self.trainer) {
            (WeightSource::Trainer { group, .. }, Some(trainer)) => trainer.of(*group),
            _ => None,
        };
        let stage = Stage { offer, base, paths, progress, left: Arc::clone(&self.left), deadline, trainer };
        let streams = stage.paths.streams && stage.paths.weights.staging == Staging::None;
        self.staging.spawn(async move {
            let result = match stage.offer.source.clone() {
                WeightSource::Peer(address) if streams => match stream::open(stage, &address).await {
                    Ok((stream, run)) => {
                        let _ = events.send(Event::Streams { update, stream });
                        return run.await;
                    }
                    Err(error) => Err(error),
                },
                _ => stage.run().await,
            };
            let result = result.map(|staged| staged.map(Arc::new));
            let _ = events.send(Event::Staged { update, result });
        });
    }

    /// What the engine took over can be had here by other workers, if it is kept.
    fn keep(&mut self) {
        while self.sources.try_join_next().is_some() {}
        // The old version's first: it must not be given to anybody any more.
        *locked(&self.kept) = None;
        let (replaced, serving) = (self.replaced.take(), self.serving.clone());
        if !self.setup.paths.weights.keep {
            self.serving = None;
        }
        let leaving = serving.as_ref().filter(|serving| serving.is_on_gpu()).map(|_| Leftover::leaving(&self.left));
        if let Some(serving) = serving.as_ref().filter(|_| leaving.is_none()) {
            self.give_to_others(serving);
        }
        let (events, left) = (self.events.clone(), Arc::clone(&self.left));
        // To give memory back takes time, and so does to copy it.
        self.sources.spawn_blocking(move || {
            if let Some(replaced) = replaced {
                left.inherit(replaced);
            }
            match (serving, leaving) {
                // If nobody has it but this, the next ones have replaced it by now.
                (Some(serving), Some(leaving)) if Arc::strong_count(&serving) > 1 => {
                    // The engine has loaded it; what is kept of it must not take the GPU's memory.
                    if let Err(error) = serving.leave_gpu(&left) {
                        tracing::warn!(%error, "weights stay on the GPU: there is no host memory to keep them in");
                    }
                    drop(leaving);
                    let _ = events.send(Event::Settled(serving));
                }
                (Some(serving), _) => left.inherit(serving),
                (None, _) => {}
            }
        });
    }

    fn give_to_others(&mut self, staged: &Arc<Staged>) {
        // Another version serves by now, or nothing is kept.
        let is_kept = self.serving.as_ref().is_some_and(|serving| Arc::ptr_eq(serving, staged));
        let Some(region) = staged.region().filter(|_| is_kept && self.session.phase() == WeightsPhase::Serving) else {
            return;
        };
        let kind = if region.device().is_some() { KvMemory::Gpu } else { KvMemory::Host };
        if self.setup.paths.that_move(kind).is_empty() {
            // They were not meant to.
            return tracing::debug!("weights.paths has none by which other workers could have these weights");
        }
        match Source::whole(self.session.version(), staged, &region, &self.setup.paths) {
            Ok((source, running)) => {
                self.sources.spawn(running);
                *locked(&self.kept) = Some(source);
            }
            Err(error) => tracing::warn!(%error, "other workers cannot have these weights here"),
        }
    }

    fn status(&self) -> WeightsStatus {
        use std::sync::atomic::Ordering::Relaxed;
        let session = &self.session;
        WeightsStatus {
            version: session.version(),
            digest: session.digest().map(|digest| digest.0),
            phase: session.phase(),
            update: session.update(),
            staged_digest: session.staged().map(|digest| digest.0),
            staged_bytes: self.progress.bytes.load(Relaxed),
            total_bytes: self.progress.total_bytes.load(Relaxed),
            path: self.progress.path().map(str::to_owned),
            serves_peers: locked(&self.kept).is_some(),
            ranks: self.setup.ranks.clone(),
            staging: self.setup.paths.weights.staging,
            failure: session.failure().cloned(),
            trainer: self.trainer.as_ref().map(Trainer::link),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
