//! A run from its first process to its last.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::Context;
use console::style;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::task::JoinSet;

use super::front::{Front, Listeners};
use super::nodes::{Nodes, next_news};
use super::pairs::{PairError, meet};
use super::stage::{Stage, seconds, why};
use super::{RunSecret, Sockets};
use crate::config::{Config, EngineKind, Path, Role};
use crate::launcher::fleet::{Fleet, FleetEvent, FleetOptions, Happening, WorkerSpec};
use crate::launcher::guarded::{GuardSetup, Guards};
use crate::launcher::life::{Limits, seconds as duration};
use crate::launcher::log_dir::LogDir;
use crate::launcher::logs::WorkerLog;
use crate::launcher::metrics::{LauncherMetrics, Life};
use crate::security::Secret;
use crate::telemetry;
use crate::topology::{Plan, WorkerPlan};

/// Lines of a worker's log that are shown when it dies.
const TAIL_LINES: usize = 20;

/// How much longer than their workers' grace other nodes may take to end.
const NODES_END_TIMEOUT: Duration = Duration::from_secs(5);

type Met = Result<BTreeMap<Path, usize>, PairError>;

/// A run: the workers, the front before them, and who is told.
pub(super) struct Run<'a> {
    pub(super) config: &'a Config,
    /// All of it, with the workers of other nodes where they really listen.
    pub(super) plan: Plan,
    /// What runs on this host.
    pub(super) share: Plan,
    /// The other nodes.
    pub(super) nodes: Option<Nodes>,
    /// Holds the workers' ports to the end; the proxy's are taken out when it starts.
    sockets: Sockets,
    secret: Secret,
    pub(super) stage: Stage,
    /// Nobody else writes to it while the run lives.
    _logs: LogDir,
    fleet: Fleet,
    pub(super) front: Option<Front>,
    pub(super) metrics: LauncherMetrics,
    asked: Asked,
    /// Meetings of restarted workers with their peers.
    meetings: JoinSet<Met>,
    began: Instant,
}

impl<'a> Run<'a> {
    /// Starts every worker. Logs go to the log folder from here on: the terminal is for people.
    pub(super) async fn start(
        config: &'a Config,
        plan: Plan,
        sockets: Sockets,
        secret: &RunSecret,
        stage: Stage,
    ) -> anyhow::Result<Self> {
        let asked = Asked::new()?;
        let nodes = Nodes::listen(config, &plan, &secret.secret).await?;
        let share = plan.share(0);
        let (fleet, logs) = start_fleet(config, &share, secret, &stage, "proxy")?;
        Ok(Self {
            config,
            plan,
            share,
            nodes,
            sockets,
            secret: secret.secret.clone(),
            stage,
            _logs: logs,
            fleet,
            front: None,
            metrics: LauncherMetrics::default(),
            asked,
            meetings: JoinSet::new(),
            began: Instant::now(),
        })
    }

    /// Serves until somebody asks for the end or the run fails; then ends every process.
    pub(super) async fn live_and_end(mut self) -> anyhow::Result<()> {
        let outcome = self.live().await;
        self.end(outcome.as_ref().err()).await;
        if outcome.is_ok() {
            let took = self.began.elapsed();
            let event = json!({ "event": "all_ended", "after_ms": u64::try_from(took.as_millis()).ok() });
            self.stage.announce(&event, &format!("all has ended, after {}", seconds(took)));
        }
        outcome
    }

    /// `Ok` when asked to end.
    async fn live(&mut self) -> anyhow::Result<()> {
        if !self.until_ready().await? {
            return Ok(());
        }
        let met = tokio::select! {
            met = meet(&self.plan, &self.secret, |_, _| true) => met?,
            by = self.asked.next() => return self.say_ending(by),
        };
        self.nodes_are_ready();
        let listeners = self.listen().context("cannot listen for requests")?;
        self.front = Some(Front::start(self.config, &self.plan, &self.secret, listeners, self.metrics.registry())?);
        self.tell_who_went_meanwhile();
        self.announce_ready(&met);
        self.watch().await
    }

    fn listen(&mut self) -> std::io::Result<Listeners> {
        let Sockets { run, admin, .. } = &mut self.sockets;
        let admin = admin.as_mut().map(|(ports, port)| ports.listen(*port)).transpose()?;
        Ok(Listeners { clients: run.listen(self.plan.proxy.port)?, admin })
    }

    /// True once every worker serves; false when asked to end before.
    async fn until_ready(&mut self) -> anyhow::Result<bool> {
        let mut starting: BTreeSet<usize> = (0..self.share.workers.len()).collect();
        while !starting.is_empty() || !self.nodes.as_ref().is_none_or(Nodes::all_serve) {
            tokio::select! {
                event = next_event(&mut self.fleet, &self.share) => {
                    let event = event.context("every worker is gone")?;
                    match event.happening {
                        Happening::Ready { .. } => _ = starting.remove(&event.worker),
                        // It served, and is not there now.
                        Happening::Restarts { .. } => _ = starting.insert(event.worker),
                        _ => {}
                    }
                    self.show(&event)?;
                }
                news = next_news(&mut self.nodes) => self.hear(news)?,
                by = self.asked.next() => {
                    self.say_ending(by)?;
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    async fn watch(&mut self) -> anyhow::Result<()> {
        loop {
            tokio::select! {
                event = next_event(&mut self.fleet, &self.share) => {
                    let event = event.context("every worker is gone")?;
                    self.show(&event)?;
                    if let (Happening::Ready { .. }, Some(worker)) = (&event.happening, self.share.workers.get(event.worker)) {
                        self.meet_again(worker.name());
                    }
                }
                news = next_news(&mut self.nodes) => self.hear(news)?,
                Some(met) = self.meetings.join_next() => match met {
                    Ok(Ok(met)) => self.warn_of_slower_paths(&met),
                    Ok(Err(error)) => self.stage.warn(&error.to_string()),
                    // Cancelled with the run.
                    Err(_) => {}
                },
                by = self.asked.next() => return self.say_ending(by),
            }
        }
    }

    /// Shows what happened; an error when the run must end for it.
    fn show(&mut self, event: &FleetEvent) -> anyhow::Result<()> {
        // Before it is said: who reads that a worker serves may ask the proxy at once.
        self.tell_front(event);
        self.stage.happening(event.worker, &event.happening);
        match &event.happening {
            Happening::GivenUp { failure } => Err(anyhow::anyhow!(self.stage.failure(event.worker, failure))),
            _ => Ok(()),
        }
    }

    fn tell_front(&self, event: &FleetEvent) {
        let Some(worker) = self.share.workers.get(event.worker) else { return };
        if let Some(life) = Life::of(&event.happening) {
            self.metrics.happened(&worker.name(), &life);
        }
        let Some(front) = &self.front else { return };
        match event.happening {
            Happening::Ready { .. } => front.tell(worker, true),
            Happening::Restarts { ref failure, .. } | Happening::GivenUp { ref failure } => {
                front.tell(worker, false);
                front.tell_why(worker, &why(failure));
            }
            Happening::Started { .. } | Happening::Progress(_) | Happening::Ended { .. } => {}
        }
    }

    /// A restarted worker is a new peer: it meets the others again, in the background, while they serve.
    pub(super) fn meet_again(&mut self, worker: String) {
        let (plan, secret) = (self.plan.clone(), self.secret.clone());
        self.meetings.spawn(async move {
            meet(&plan, &secret, |prefill, decode| prefill.name() == worker || decode.name() == worker).await
        });
    }

    fn announce_ready(&self, met: &BTreeMap<Path, usize>) {
        let base_url = self.plan.proxy.base_url();
        if let Some(nodes) = &self.nodes {
            nodes.tell_ready(&base_url);
        }
        let paths: Vec<&str> = met.keys().map(|path| path.name()).collect();
        let count = |role| self.plan.of_role(role).count();
        let (prefill, decode, plain) = (count(Role::Prefill), count(Role::Decode), count(Role::Both));
        let took = self.began.elapsed();
        let mut event =
            json!({ "event": "ready", "base_url": base_url, "took_ms": u64::try_from(took.as_millis()).ok() });
        let what = match &self.plan.link {
            Some(link) => {
                event["prefill"] = json!(prefill);
                event["decode"] = json!(decode);
                event["kv_connector"] = json!(link.connector.name());
                event["connector_impl"] = json!(link.connector_impl.name());
                event["paths"] = json!(paths);
                let by = if paths.is_empty() { link.connector_impl.name().to_owned() } else { paths.join(", ") };
                format!("{prefill} prefill, {decode} decode, {}, {by}", link.connector.name())
            }
            None => {
                event["workers"] = json!(plain);
                format!("{plain} plain")
            }
        };
        self.warn_of_slower_paths(met);
        self.stage.announce(&event, &format!("{} {base_url} ({what})", style("ready:").green().bold()));
    }

    /// A path that is not the first choice is allowed, but it is said.
    fn warn_of_slower_paths(&self, met: &BTreeMap<Path, usize>) {
        // Between nodes the first path that goes there is the first choice, within one any other.
        let crosses = |path: &&Path| self.nodes.is_none() || path.crosses_hosts();
        let Some(best) = self.plan.link.as_ref().and_then(|link| link.paths.iter().find(crosses)) else { return };
        for (path, pairs) in met.iter().filter(|(path, _)| *path != best && crosses(path)) {
            let (path, best) = (path.name(), best.name());
            self.stage
                .warn(&format!("{pairs} pair(s) move KV by {path}: {best}, which comes first in the list, cannot"));
        }
    }

    fn say_ending(&self, by: &'static str) -> anyhow::Result<()> {
        let drain = seconds(duration(self.config.launcher.drain_s));
        let text = format!("{by}: finishing what is in flight, for {drain} at most (once more ends at once)");
        self.stage.announce(&json!({ "event": "ending", "by": by }), &text);
        Ok(())
    }

    /// Stops taking requests, lets those in flight finish, ends the workers. Asked again, ends at once.
    async fn end(&mut self, failure: Option<&anyhow::Error>) {
        self.meetings.abort_all();
        let mut hurry = false;
        if let Some(front) = self.front.take() {
            let drain = duration(self.config.launcher.drain_s);
            tokio::select! {
                left = front.drain(drain) => {
                    if let Some(left) = left {
                        self.stage.warn(&left);
                    }
                }
                _ = self.asked.next() => hurry = true,
            }
        }
        if let Some(nodes) = &self.nodes {
            nodes.tell_end(failure);
        }
        self.fleet.stop();
        if hurry {
            self.fleet.halt();
        }
        loop {
            tokio::select! {
                event = self.fleet.event() => match event {
                    Some(event) => self.stage.happening(event.worker, &event.happening),
                    None => break,
                },
                _ = self.asked.next() => self.fleet.halt(),
            }
        }
        if let Some(nodes) = &mut self.nodes {
            let bound = duration(self.config.launcher.grace_s) + NODES_END_TIMEOUT;
            if !hurry && tokio::time::timeout(bound, nodes.ended()).await.is_err() {
                self.stage.warn("some nodes have not said that they ended; look at their terminals");
            }
        }
    }
}

/// The next happening; where nothing runs here there is none to wait for.
async fn next_event(fleet: &mut Fleet, share: &Plan) -> Option<FleetEvent> {
    if share.workers.is_empty() { std::future::pending().await } else { fleet.event().await }
}

/// Starts the workers of a share. `own` names the log of this process itself, which writes there from here on.
pub(super) fn start_fleet(
    config: &Config,
    share: &Plan,
    secret: &RunSecret,
    stage: &Stage,
    own: &str,
) -> anyhow::Result<(Fleet, LogDir)> {
    let launcher = &config.launcher;
    let logs = LogDir::take(&launcher.log_dir)?;
    if logs.is_own() {
        let (own, asked_for) = (logs.path().display(), launcher.log_dir.display());
        let text = format!("logs are in {own}: another launcher that runs has {asked_for}");
        stage.announce(&json!({ "event": "logs", "folder": logs.path() }), &text);
    }
    let options = FleetOptions {
        guard: GuardSetup {
            program: std::env::current_exe()?,
            grace: duration(launcher.grace_s),
            run_dir: secret.folder.as_ref().map(|folder| folder.path().to_owned()),
        },
        guards: Guards::adopting().context("cannot adopt orphaned processes")?,
        limits: Limits::new(launcher),
        log_dir: logs.path().to_owned(),
        tail_lines: TAIL_LINES,
    };
    let fleet = Fleet::start(share.workers.iter().map(spec).collect(), options)?;
    let log = WorkerLog::create(logs.path(), own).and_then(|log| log.open(1));
    let (log, _) = log.with_context(|| format!("cannot make {own}.log in {}", logs.path().display()))?;
    telemetry::log::init_to_file(config.telemetry.log_format, &config.telemetry.log_level, log);
    Ok((fleet, logs))
}

fn spec(worker: &WorkerPlan) -> WorkerSpec {
    WorkerSpec {
        name: worker.name(),
        host: worker.reach.clone(),
        port: worker.port,
        command: worker.command.clone(),
        env: worker.env.clone(),
        is_vllm: worker.engine == EngineKind::Vllm,
    }
}

/// The signals by which people and systems ask for the end.
pub(super) struct Asked {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Asked {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    pub(super) async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "Ctrl-C",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hangup.recv() => "SIGHUP",
        }
    }
}
