//! A node that is not node 0: joins, starts its share, and ends with the run.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::Context;
use serde_json::json;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::run::{Asked, start_fleet};
use super::stage::{self, Stage, seconds};
use super::{Here, RunSecret, node_ports, notes, planned_with, refuse_faults, show};
use crate::config::Config;
use crate::control::AdminClient;
use crate::launcher::fleet::{Fleet, FleetEvent, Happening};
use crate::launcher::life::seconds as duration;
use crate::launcher::log_dir::LogDir;
use crate::launcher::metrics::Life;
use crate::launcher::nodes::link::{Link, News};
use crate::launcher::nodes::messages::{BUILD, Node0Says, NodeCard, NodeSays, seats, shape};
use crate::launcher::nodes::ports::{CountedPorts, Held, NodePorts};
use crate::security::Secret;
use crate::topology::{Plan, dial};

/// How long a worker's runtime may take to say what it holds, and how often it is asked.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);
const STATUS_EVERY: Duration = Duration::from_millis(100);

/// How much longer than their grace workers of an earlier launcher may take to be gone.
const ENDING_MARGIN: Duration = Duration::from_secs(2);

/// A node's part of a run.
struct Member<'a> {
    config: &'a Config,
    rank: usize,
    share: Plan,
    /// The ports it took, by purpose.
    ports: Vec<(String, u16)>,
    secret: Secret,
    link: Link,
    /// Where node 0 is.
    node0: String,
    asked: Asked,
    stage: Stage,
    fleet: Fleet,
    /// Workers that serve.
    serving: BTreeSet<String>,
    /// Since when node 0 is away, and why.
    away: Option<(Instant, String)>,
    _logs: LogDir,
    _held: Held,
    began: Instant,
}

/// Joins the run and serves until it ends.
pub(super) async fn run(config: &Config, here: &Here, json: bool) -> anyhow::Result<()> {
    let (secret, rank) = (RunSecret::new(config)?, here.place.node);
    let secret_file = secret.file.to_string_lossy().into_owned();
    // The shape of the run does not depend on ports, which wait for node 0's word on what they were.
    let counted = planned_with(config, here, &secret_file, &mut CountedPorts::default())?;
    refuse_faults(config, here, &counted.share(rank))?;
    let card = NodeCard { build: BUILD.to_owned(), rank, shape: shape(&counted, config) };
    let node0 = dial(config.hosts.address(0).unwrap_or_default(), config.hosts.port);
    let mut asked = Asked::new()?;
    let mut link = Link::start(node0.clone(), &secret.secret, &card, duration(config.hosts.lost_after_s));
    stage::looking_for_node_0(json, rank, &node0);
    let before = tokio::select! {
        welcomed = welcome(&mut link, config, rank, &node0) => welcomed?,
        _ = asked.next() => return Ok(()),
    };
    let (host, kv_host) = here.place.own_hosts(config);
    NodePorts::until_free(&before, [host, kv_host], duration(config.launcher.grace_s) + ENDING_MARGIN).await;
    let prepared = || {
        let mut ports = node_ports(config, here, before)?;
        let plan = planned_with(config, here, &secret_file, &mut ports)?;
        let share = plan.share(rank);
        let stage = Stage::new(&share, json);
        let event = json!({ "event": "plan", "plan": share.to_json() });
        stage.announce(&event, &format!("{}{}", show::table(&share), notes(&share)));
        let (fleet, logs) = start_fleet(config, &share, &secret, &stage, "launcher")?;
        anyhow::Ok((ports, share, stage, fleet, logs))
    };
    let (ports, share, stage, fleet, logs) = match prepared() {
        Ok(prepared) => prepared,
        Err(error) => return give_up(&link, error).await,
    };
    let taken = ports.taken().to_vec();
    let member = Member {
        config,
        rank,
        share,
        ports: taken,
        secret: secret.secret.clone(),
        link,
        node0,
        asked,
        stage,
        fleet,
        serving: BTreeSet::new(),
        away: None,
        _logs: logs,
        _held: ports.held(),
        began: Instant::now(),
    };
    member.live_and_end().await
}

/// Tells node 0 why this node cannot do its part.
async fn give_up(link: &Link, error: anyhow::Error) -> anyhow::Result<()> {
    link.tell(&NodeSays::Failed { why: format!("{error:#}") });
    link.flushed().await;
    Err(error)
}

/// Waits until node 0 lets this node in; the answer are the ports it had when it was here last.
async fn welcome(link: &mut Link, config: &Config, rank: usize, node0: &str) -> anyhow::Result<Vec<(String, u16)>> {
    let timeout_s = config.hosts.join_timeout_s;
    let until = Instant::now() + duration(timeout_s);
    let mut last = "it did not answer".to_owned();
    loop {
        match timeout_at(until, link.next()).await {
            Ok(News::Says(Node0Says::Welcome { ports })) => return Ok(ports),
            Ok(News::Says(Node0Says::Refused { why, again: false })) => {
                anyhow::bail!("node 0 ({node0}) does not take this host as node {rank}: {why}")
            }
            Ok(News::Says(Node0Says::Refused { why, again: true })) => {
                link.hang_up(why);
            }
            Ok(News::Says(Node0Says::End { why, .. })) => anyhow::bail!("node 0 ({node0}) ends the run: {why}"),
            Ok(News::Says(Node0Says::Ready { .. } | Node0Says::Drained)) => {}
            Ok(News::Away { why }) => last = why,
            Err(_) => anyhow::bail!(
                "node {rank} could not join node 0 at {node0} within {timeout_s} s (hosts.join_timeout_s): {last}; is `pdlink up` \
                 running there as node 0, with the same secret, and does no firewall stand between?"
            ),
        }
    }
}

impl Member<'_> {
    async fn live_and_end(mut self) -> anyhow::Result<()> {
        self.tell_share();
        let outcome = self.live().await;
        if let Err(error) = &outcome {
            self.stage
                .announce(&json!({ "event": "ending", "by": error.to_string() }), "ending the workers of this node");
        }
        self.end().await;
        if outcome.is_ok() {
            let took = self.began.elapsed();
            let event = json!({ "event": "all_ended", "after_ms": u64::try_from(took.as_millis()).ok() });
            self.stage.announce(&event, &format!("all has ended, after {}", seconds(took)));
        }
        outcome
    }

    /// Tells node 0 where the workers are, and which of them serve.
    fn tell_share(&self) {
        let seats = seats(&self.share, &|worker| self.serving.contains(&worker.name()));
        self.link.tell(&NodeSays::Share { seats, ports: self.ports.clone() });
    }

    /// `Ok` when asked to end, by whomever.
    async fn live(&mut self) -> anyhow::Result<()> {
        let patience = duration(self.config.hosts.node0_timeout_s);
        loop {
            let away_until = self.away.as_ref().map(|(since, _)| *since + patience);
            let is_late = async {
                match away_until {
                    Some(until) => sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = self.fleet.event(), if !self.share.workers.is_empty() => {
                    self.happened(event.context("every worker is gone")?).await?;
                }
                news = self.link.next() => match news {
                    News::Says(Node0Says::End { why, failed }) => return self.told_to_end(&why, failed),
                    news => self.hear(news)?,
                },
                () = is_late => return Err(self.without_node_0()),
                by = self.asked.next() => {
                    self.leave(by).await;
                    return Ok(());
                }
            }
        }
    }

    async fn happened(&mut self, event: FleetEvent) -> anyhow::Result<()> {
        self.stage.happening(event.worker, &event.happening);
        let Some(worker) = self.share.workers.get(event.worker).map(|worker| worker.name()) else { return Ok(()) };
        if let Some(life) = Life::of(&event.happening) {
            self.link.tell(&NodeSays::Life { worker: worker.clone(), life });
        }
        match &event.happening {
            Happening::Ready { .. } => {
                self.serving.insert(worker.clone());
                self.link.tell(&NodeSays::Worker { worker, serves: true, why: String::new() });
            }
            Happening::Restarts { failure, .. } => {
                self.serving.remove(&worker);
                let text = self.stage.failure(event.worker, failure);
                let why = text.lines().next().unwrap_or_default().to_owned();
                self.link.tell(&NodeSays::Worker { worker, serves: false, why });
            }
            Happening::GivenUp { failure } => {
                let text = self.stage.failure(event.worker, failure);
                return give_up(&self.link, anyhow::anyhow!(text)).await;
            }
            Happening::Started { .. } | Happening::Progress(_) | Happening::Ended { .. } => {}
        }
        Ok(())
    }

    fn hear(&mut self, news: News) -> anyhow::Result<()> {
        match news {
            News::Says(Node0Says::Welcome { .. }) => {
                self.tell_share();
                if let Some((since, _)) = self.away.take() {
                    let text = format!("node 0 is back, after {}", seconds(since.elapsed()));
                    self.stage.announce(&json!({ "event": "node0_back" }), &text);
                }
            }
            News::Says(Node0Says::Refused { why, again: true }) => {
                self.link.hang_up(why.clone());
                self.is_away(why);
            }
            News::Says(Node0Says::Refused { why, again: false }) => {
                anyhow::bail!("node 0 ({}) does not take node {} back: {why}", self.node0, self.rank)
            }
            News::Says(Node0Says::Ready { base_url }) => {
                let text = format!("the run is ready: {base_url}");
                self.stage.announce(&json!({ "event": "run_ready", "base_url": base_url }), &text);
            }
            News::Away { why } => self.is_away(why),
            News::Says(Node0Says::Drained | Node0Says::End { .. }) => {}
        }
        Ok(())
    }

    fn is_away(&mut self, why: String) {
        if let Some((_, last)) = &mut self.away {
            *last = why;
            return;
        }
        let patience = seconds(duration(self.config.hosts.node0_timeout_s));
        let text = format!(
            "node 0 is away: {why}; this node keeps its workers for {patience} (hosts.node0_timeout_s) and looks for it"
        );
        self.stage.tell(&json!({ "event": "node0_away", "why": why }), &text, true);
        self.away = Some((Instant::now(), why));
    }

    fn without_node_0(&self) -> anyhow::Error {
        let why = self.away.as_ref().map_or("", |(_, why)| why.as_str());
        anyhow::anyhow!(
            "node 0 ({}) has been away for {} s (hosts.node0_timeout_s), so this node ends: {why}; start it again there, then this \
             node",
            self.node0,
            self.config.hosts.node0_timeout_s,
        )
    }

    fn told_to_end(&self, why: &str, failed: bool) -> anyhow::Result<()> {
        if failed {
            anyhow::bail!("node 0 ends the run: {why}");
        }
        let text = format!("node 0 ends the run: {why}");
        self.stage.announce(&json!({ "event": "ending", "by": "node 0", "why": why }), &text);
        Ok(())
    }

    /// Lets what is in flight end: first what clients wait for, which node 0 knows, then what other workers fetch.
    async fn leave(&mut self, by: &'static str) {
        let drain = duration(self.config.launcher.drain_s);
        let text =
            format!("{by}: finishing what is in flight, for {} at most (once more ends at once)", seconds(drain));
        self.stage.announce(&json!({ "event": "ending", "by": by }), &text);
        if !self.link.tell(&NodeSays::Leaving { by: by.to_owned() }) {
            return;
        }
        let until = Instant::now() + drain;
        let (link, share, secret) = (&mut self.link, &self.share, &self.secret);
        let drained = async {
            while !matches!(
                link.next().await,
                News::Says(Node0Says::Drained | Node0Says::End { .. }) | News::Away { .. }
            ) {}
            until_nothing_is_held(share, secret).await;
        };
        tokio::select! {
            drained = timeout_at(until, drained) => {
                if drained.is_err() {
                    self.stage.warn(&format!("something was still in flight after {} (launcher.drain_s)", seconds(drain)));
                }
            }
            _ = self.asked.next() => self.fleet.halt(),
        }
    }

    async fn end(&mut self) {
        self.fleet.stop();
        loop {
            tokio::select! {
                event = self.fleet.event() => match event {
                    Some(event) => self.stage.happening(event.worker, &event.happening),
                    None => return,
                },
                _ = self.asked.next() => self.fleet.halt(),
            }
        }
    }
}

/// Waits until no runtime of these workers holds KV or moves any.
async fn until_nothing_is_held(share: &Plan, secret: &Secret) {
    for worker in share.workers.iter().filter(|worker| worker.has_runtime) {
        for address in worker.kv_addresses() {
            let client = AdminClient::new(address, secret.clone(), STATUS_TIMEOUT);
            // One that does not answer holds nothing that could be waited for.
            while client.status().await.is_ok_and(|status| status.held_blocks > 0 || status.transfers_active > 0) {
                sleep(STATUS_EVERY).await;
            }
        }
    }
}
