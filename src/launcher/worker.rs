//! The task that owns one worker: feeds its [`Life`], does what it says, tells what happens.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::exit::Exit;
use super::fleet::{Failure, FleetEvent, FleetOptions, Happening, WorkerSpec};
use super::guarded::{GuardReport, Guarded};
use super::life::{Action, Cause, Event, Life, Notice};
use super::logs::{Follower, WorkerLog};
use super::probe;
use super::vllm::diagnosis::diagnose;
use super::vllm::progress::{self, Sign};

/// How often the log of a starting worker is looked at.
const FOLLOW_EVERY: Duration = Duration::from_millis(200);

type Probe = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(super) struct WorkerTask {
    index: usize,
    spec: WorkerSpec,
    options: Arc<FleetOptions>,
    life: Life,
    log: WorkerLog,
    began: Instant,
    events: mpsc::Sender<FleetEvent>,
    stop: Ask,
    halt: Ask,
    guarded: Option<Guarded>,
    probe: Option<Probe>,
    wake: Option<Instant>,
    not_started: Option<Exit>,
    /// Where this start's lines begin in the log.
    log_position: u64,
    start: Option<Start>,
}

/// What the log of a starting vLLM has told.
struct Start {
    follower: Follower,
    look_at: Instant,
    last: Option<Sign>,
    kv_tokens: Option<u64>,
}

impl Start {
    fn new(follower: Follower) -> Self {
        Self { follower, look_at: Instant::now() + FOLLOW_EVERY, last: None, kv_tokens: None }
    }

    /// The newest sign in what has been written since the last look, if it is news.
    fn look(&mut self) -> Option<Sign> {
        self.look_at = Instant::now() + FOLLOW_EVERY;
        let signs: Vec<Sign> = self.follower.lines().iter().filter_map(|line| progress::read(line)).collect();
        for sign in &signs {
            if let Sign::KvCache { tokens } = sign {
                self.kv_tokens = Some(*tokens);
            }
        }
        let newest = *signs.last()?;
        let news = self.last != Some(newest);
        self.last = Some(newest);
        news.then_some(newest)
    }
}

/// A request that is heard once.
pub(super) struct Ask {
    token: CancellationToken,
    heard: bool,
}

impl Ask {
    pub(super) fn new(token: CancellationToken) -> Self {
        Self { token, heard: false }
    }
}

impl WorkerTask {
    pub(super) fn new(
        index: usize,
        spec: WorkerSpec,
        options: Arc<FleetOptions>,
        log: WorkerLog,
        events: mpsc::Sender<FleetEvent>,
        (stop, halt): (Ask, Ask),
    ) -> Self {
        let life = Life::new(options.limits);
        Self {
            index,
            spec,
            options,
            life,
            log,
            began: Instant::now(),
            events,
            stop,
            halt,
            guarded: None,
            probe: None,
            wake: None,
            not_started: None,
            log_position: 0,
            start: None,
        }
    }

    pub(super) async fn run(mut self) {
        self.feed(Event::Start).await;
        while !self.life.is_over() {
            let event = self.next().await;
            self.feed(event).await;
        }
    }

    async fn feed(&mut self, event: Event) {
        for action in self.life.on(event, self.began.elapsed()) {
            self.act(action).await;
        }
    }

    async fn next(&mut self) -> Event {
        if let Some(exit) = self.not_started.take() {
            return Event::Exited(exit);
        }
        loop {
            tokio::select! {
                biased;
                () = self.halt.token.cancelled(), if !self.halt.heard => {
                    self.halt.heard = true;
                    return Event::Halt;
                }
                () = self.stop.token.cancelled(), if !self.stop.heard => {
                    self.stop.heard = true;
                    return Event::Stop;
                }
                report = report_of(&mut self.guarded), if self.guarded.is_some() => match report {
                    GuardReport::Started { pid } => self.tell(Happening::Started { pid }).await,
                    GuardReport::Exited(exit) => {
                        (self.guarded, self.probe, self.wake, self.start) = (None, None, None, None);
                        return Event::Exited(exit);
                    }
                },
                () = answer_of(&mut self.probe), if self.probe.is_some() => {
                    self.probe = None;
                    return Event::Healthy;
                }
                () = sleep_until(self.start.as_ref().map_or(self.began, |start| start.look_at)), if self.start.is_some() => {
                    if let Some(sign) = self.start.as_mut().and_then(Start::look) {
                        self.tell(Happening::Progress(sign)).await;
                    }
                }
                () = sleep_until(self.wake.unwrap_or(self.began)), if self.wake.is_some() => {
                    self.wake = None;
                    return Event::Tick;
                }
            }
        }
    }

    async fn act(&mut self, action: Action) {
        match action {
            Action::Spawn { attempt } => self.spawn(attempt),
            Action::WakeAt(at) => self.wake = self.began.checked_add(at),
            Action::Terminate => {
                self.probe = None;
                if let Some(guarded) = &mut self.guarded {
                    guarded.terminate().await;
                }
            }
            Action::Kill => {
                self.probe = None;
                if let Some(guarded) = &mut self.guarded {
                    guarded.kill().await;
                }
            }
            Action::Tell(notice) => self.notify(notice).await,
        }
    }

    fn spawn(&mut self, attempt: u32) {
        let (spec, options) = (&self.spec, &self.options);
        let guarded = self.log.open(attempt).and_then(|(file, position)| {
            self.log_position = position;
            Guarded::spawn(&options.guard, &options.guards, &spec.command, &spec.env, file)
        });
        match guarded {
            Ok(guarded) => {
                self.guarded = Some(guarded);
                self.start = spec.is_vllm.then(|| Start::new(self.log.follow(self.log_position)));
                let (host, port) = (spec.host.clone(), spec.port);
                self.probe = Some(Box::pin(async move { probe::until_ready(&host, port).await }));
            }
            Err(error) => self.not_started = Some(Exit::NotStarted(error.to_string())),
        }
    }

    async fn notify(&mut self, notice: Notice) {
        let happening = match notice {
            Notice::Ready { took } => {
                let mut start = self.start.take();
                let kv_tokens = start.as_mut().and_then(|start| {
                    start.look();
                    start.kv_tokens
                });
                Happening::Ready { took, kv_tokens }
            }
            Notice::Ended { exit } => Happening::Ended { exit },
            Notice::Restarts { cause, pause } => Happening::Restarts { failure: self.failure(cause), pause },
            Notice::GivenUp { cause } => Happening::GivenUp { failure: self.failure(cause) },
        };
        self.tell(happening).await;
    }

    fn failure(&self, cause: Cause) -> Failure {
        let diagnosis = if self.spec.is_vllm { diagnose(self.log.end(self.log_position).lines()) } else { None };
        let tail = self.log.tail(self.log_position, self.options.tail_lines);
        Failure { cause, diagnosis, tail, log: self.log.path().to_owned() }
    }

    /// A launcher that listens no more ends the fleet by dropping it.
    async fn tell(&mut self, happening: Happening) {
        let _ = self.events.send(FleetEvent { worker: self.index, happening }).await;
    }
}

async fn report_of(guarded: &mut Option<Guarded>) -> GuardReport {
    match guarded {
        Some(guarded) => guarded.report().await,
        None => std::future::pending().await,
    }
}

async fn answer_of(probe: &mut Option<Probe>) {
    match probe {
        Some(probe) => probe.await,
        None => std::future::pending().await,
    }
}
