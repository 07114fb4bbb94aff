//! Node 0's part with the other nodes: waits for them, hears what becomes of them, tells the proxy.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde_json::json;
use tokio::time::{Duration, Instant, sleep, sleep_until};

use super::run::Run;
use crate::config::{Config, Restart};
use crate::launcher::life::seconds as duration;
use crate::launcher::nodes::hub::Hub;
use crate::launcher::nodes::membership::{Action, Event, Membership, Said};
use crate::launcher::nodes::messages::{BUILD, Node0Says, seat_in, shape};
use crate::launcher::ports::resolve;
use crate::security::Secret;
use crate::topology::{Plan, WorkerPlan};

/// How often it is looked whether a node that leaves carries anything yet.
const DRAIN_LOOK: Duration = Duration::from_millis(50);

/// The other nodes, and who of them is there.
pub(super) struct Nodes {
    hub: Hub,
    membership: Membership,
    /// Where node 0 is looked for.
    address: String,
    /// By when those that are missing must be there; none while all are.
    join_by: Option<Instant>,
    join_timeout: Duration,
    /// Nodes that leave, and when they have had their time.
    leaving: BTreeMap<usize, Instant>,
    is_ready: bool,
}

/// What node 0 has to look at.
pub(super) enum Heard {
    Of(Event),
    /// Nodes that are missing have had their time.
    JoinTimedOut,
    /// Time to look whether nodes that leave are drained.
    LookAtLeaving,
}

/// The next thing to look at; never, without other nodes.
pub(super) async fn next_news(nodes: &mut Option<Nodes>) -> Heard {
    let Some(nodes) = nodes else { return std::future::pending().await };
    let join_by = nodes.join_by.filter(|_| !nodes.is_ready);
    let is_late = async {
        match join_by {
            Some(at) => sleep_until(at).await,
            None => std::future::pending().await,
        }
    };
    let is_leaving = !nodes.leaving.is_empty();
    tokio::select! {
        event = nodes.hub.next() => match event {
            Some(event) => Heard::Of(event),
            None => std::future::pending().await,
        },
        () = is_late => Heard::JoinTimedOut,
        () = sleep(DRAIN_LOOK), if is_leaving => Heard::LookAtLeaving,
    }
}

impl Nodes {
    /// Listens for the nodes of a run on several; `None` where it is on this host alone.
    pub(super) async fn listen(config: &Config, plan: &Plan, secret: &Secret) -> anyhow::Result<Option<Self>> {
        if !config.hosts.has_several() {
            return Ok(None);
        }
        let host = config.hosts.address(0).unwrap_or_default();
        let address = SocketAddr::new(resolve(host)?, config.hosts.port);
        let hub = Hub::listen(address, secret, duration(config.hosts.lost_after_s)).await?;
        let names = |rank: usize| plan.on_node(rank).map(WorkerPlan::name).collect();
        let workers = plan.nodes.iter().map(|node| (node.rank, names(node.rank))).collect();
        let never_restarts = config.launcher.restart == Restart::Never;
        let membership = Membership::new(workers, shape(plan, config), BUILD, never_restarts);
        let join_timeout = duration(config.hosts.join_timeout_s);
        Ok(Some(Self {
            hub,
            membership,
            address: address.to_string(),
            join_by: Some(Instant::now() + join_timeout),
            join_timeout,
            leaving: BTreeMap::new(),
            is_ready: false,
        }))
    }

    pub(super) fn all_serve(&self) -> bool {
        self.membership.all_serve()
    }

    pub(super) fn tell_ready(&self, base_url: &str) {
        self.hub.tell_all(&Node0Says::Ready { base_url: base_url.to_owned() });
    }

    /// The run ends, for every node.
    pub(super) fn tell_end(&self, failure: Option<&anyhow::Error>) {
        let why = match failure {
            Some(error) => error.to_string().lines().next().unwrap_or_default().to_owned(),
            None => "node 0 was asked to end".to_owned(),
        };
        self.hub.tell_all(&Node0Says::End { why, failed: failure.is_some() });
    }

    /// Returns when no node is connected any more.
    pub(super) async fn ended(&mut self) {
        while self.hub.has_nodes() {
            tokio::select! {
                _ = self.hub.next() => {}
                () = sleep(DRAIN_LOOK) => {}
            }
        }
    }

    fn who_is_missing(&self, config: &Config) -> anyhow::Error {
        let missing = self.membership.missing();
        let named: Vec<String> = missing
            .iter()
            .map(|rank| format!("node {rank} ({})", config.hosts.address(*rank).unwrap_or_default()))
            .collect();
        let first = missing.first().copied().unwrap_or_default();
        anyhow::anyhow!(
            "{} {} not here after {} s (hosts.join_timeout_s): run `pdlink up … --node {first}` there, with the same configuration \
             and secret; from there {} must be reachable",
            named.join(", "),
            if named.len() == 1 { "is" } else { "are" },
            self.join_timeout.as_secs_f64(),
            self.address,
        )
    }
}

impl Run<'_> {
    /// Does what follows from news of the nodes; an error when the run must end for it.
    pub(super) fn hear(&mut self, heard: Heard) -> anyhow::Result<()> {
        match heard {
            Heard::Of(event) => {
                self.take(event)?;
                self.wait_for_the_missing();
                Ok(())
            }
            Heard::JoinTimedOut => match &self.nodes {
                Some(nodes) => Err(nodes.who_is_missing(self.config)),
                None => Ok(()),
            },
            Heard::LookAtLeaving => self.look_at_leaving(),
        }
    }

    /// A node that went before the run was ready has as long to come back as it had to come.
    fn wait_for_the_missing(&mut self) {
        let Some(nodes) = &mut self.nodes else { return };
        nodes.join_by = match nodes.membership.missing().is_empty() {
            true => None,
            false => nodes.join_by.or_else(|| Some(Instant::now() + nodes.join_timeout)),
        };
    }

    /// From here on what happens to a node is its own affair.
    pub(super) fn nodes_are_ready(&mut self) {
        if let Some(nodes) = &mut self.nodes {
            nodes.is_ready = true;
            nodes.membership.on(Event::Ready);
        }
    }

    /// Workers that went between the look at all of them and the start of the proxy.
    pub(super) fn tell_who_went_meanwhile(&self) {
        let Some(nodes) = &self.nodes else { return };
        for name in nodes.membership.waiting_for() {
            self.tell_of(name, false, None);
        }
    }

    fn tell_of(&self, name: &str, serves: bool, why: Option<&str>) {
        self.metrics.serves(name, serves);
        let worker = self.plan.workers.iter().find(|worker| worker.name() == name);
        if let (Some(front), Some(worker)) = (&self.front, worker) {
            front.tell(worker, serves);
            why.into_iter().for_each(|why| front.tell_why(worker, why));
        }
    }

    fn take(&mut self, event: Event) -> anyhow::Result<()> {
        let Some(nodes) = &mut self.nodes else { return Ok(()) };
        for action in nodes.membership.on(event) {
            self.act(action)?;
        }
        Ok(())
    }

    fn act(&mut self, action: Action) -> anyhow::Result<()> {
        let Some(nodes) = &mut self.nodes else { return Ok(()) };
        match action {
            Action::Welcome { line, rank, ports } => {
                nodes.leaving.remove(&rank);
                nodes.hub.tell(line, &Node0Says::Welcome { ports });
            }
            Action::Refuse { line, why, again } => nodes.hub.refuse(line, why, again),
            Action::TellDrained { line } => nodes.hub.tell(line, &Node0Says::Drained),
            Action::Seat(seat) => seat_in(&mut self.plan, &seat),
            Action::Up { worker } => {
                self.tell_of(&worker, true, None);
                if self.front.is_some() {
                    self.meet_again(worker.clone());
                }
                let event = json!({ "event": "worker_ready", "worker": worker });
                self.stage.announce(&event, &format!("  {worker} serves"));
            }
            Action::Down { worker, why } => self.tell_of(&worker, false, why.as_deref()),
            Action::Count { worker, life } => self.metrics.happened(&worker, &life),
            Action::Drain { rank } => self.let_leave(rank),
            Action::Say(Said { event, rank, text, warns }) => {
                let event = json!({ "event": event, "node": rank, "text": text });
                self.stage.tell(&event, &text, warns);
            }
            Action::End { why } => anyhow::bail!(why),
        }
        Ok(())
    }

    fn let_leave(&mut self, rank: usize) {
        let until = Instant::now() + duration(self.config.launcher.drain_s);
        if let Some(nodes) = &mut self.nodes {
            nodes.leaving.insert(rank, until);
        }
        if let Some(front) = &self.front {
            self.plan.on_node(rank).for_each(|worker| front.let_leave(worker));
        }
    }

    fn look_at_leaving(&mut self) -> anyhow::Result<()> {
        let (Some(nodes), Some(front)) = (&mut self.nodes, &self.front) else { return Ok(()) };
        let now = Instant::now();
        let carries = |rank: usize| self.plan.on_node(rank).any(|worker| front.inflight(worker) > 0);
        let done: Vec<usize> = nodes
            .leaving
            .iter()
            .filter(|(rank, until)| now >= **until || !carries(**rank))
            .map(|(rank, _)| *rank)
            .collect();
        nodes.leaving.retain(|rank, _| !done.contains(rank));
        done.into_iter().try_for_each(|rank| self.take(Event::Drained { rank }))
    }
}
