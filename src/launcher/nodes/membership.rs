//! Who is there, as node 0 sees it: a pure machine. What nodes say goes in, what to do comes out.
//!
//! ```text
//! Away ── hello ──► Greeted ── share ──► Here ── silent, hung up ──► Away (its workers are taken out)
//!                                         │ ▲                          │
//!                                         │ └── share, after a hello ──┘ (those that serve come back)
//!                                         └── leaving ──► Leaving ── drained, gone ──► Away
//! ```
//!
//! - A node is one launcher at a time. A second one is sent away, to try again: the first may be gone and not yet missed.
//!   The same launcher may connect again at any time: its old connection is forgotten.
//! - A worker given up before the run was ever ready ends the run, as on one host. Later it costs that node alone, unless
//!   `launcher.restart = "never"` asks for the end.
//! - What comes over a connection that has been replaced means nothing.

use std::collections::{BTreeMap, BTreeSet};

use super::messages::{NodeCard, NodeSays, Seat};
use crate::launcher::metrics::Life;

/// A connection's number: what comes over an old one is told from what comes over its successor.
pub type Line = u64;

/// What happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Hello {
        line: Line,
        incarnation: u64,
        card: NodeCard,
        from: String,
    },
    Says {
        line: Line,
        says: NodeSays,
    },
    /// The connection ended.
    Gone {
        line: Line,
        why: String,
    },
    /// No request of a node that leaves is in flight any more, or it has had its time.
    Drained {
        rank: usize,
    },
    /// The whole run serves from here on.
    Ready,
}

/// What to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Welcome {
        line: Line,
        rank: usize,
        ports: Vec<(String, u16)>,
    },
    /// Says why and hangs up.
    Refuse {
        line: Line,
        why: String,
        again: bool,
    },
    /// Says that no request of it is in flight.
    TellDrained {
        line: Line,
    },
    /// Where a worker of that node listens.
    Seat(Seat),
    /// A worker serves.
    Up {
        worker: String,
    },
    /// A worker is away; why, where its node has told.
    Down {
        worker: String,
        why: Option<String>,
    },
    /// Counts for the metrics page.
    Count {
        worker: String,
        life: Life,
    },
    /// A node asks to leave: wait until its workers carry nothing.
    Drain {
        rank: usize,
    },
    /// Worth saying.
    Say(Said),
    /// The run cannot go on.
    End {
        why: String,
    },
}

/// News of a node, for people and machines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// `node_joined`, `node_lost`, `node_leaves`, `node_left`, `node_failed`, `node_refused`, `worker_away`
    pub event: &'static str,
    pub rank: usize,
    pub text: String,
    /// Whether it is a warning.
    pub warns: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    Away,
    Greeted { line: Line, incarnation: u64, from: String },
    Here { line: Line, incarnation: u64, from: String },
    Leaving { line: Line, incarnation: u64, from: String },
}

impl State {
    fn line(&self) -> Option<(Line, u64, &str)> {
        match self {
            Self::Away => None,
            Self::Greeted { line, incarnation, from }
            | Self::Here { line, incarnation, from }
            | Self::Leaving { line, incarnation, from } => Some((*line, *incarnation, from)),
        }
    }
}

#[derive(Debug)]
struct Node {
    state: State,
    /// Its workers by name, and whether each serves.
    workers: BTreeMap<String, bool>,
    /// The ports it took, by purpose.
    ports: Vec<(String, u16)>,
    /// It has told that it ends, and why.
    has_failed: bool,
    /// Where its workers were when it was here first: the proxy knows them there.
    seats: Vec<Seat>,
}

/// The nodes but node 0, which is here by definition.
#[derive(Debug)]
pub struct Membership {
    nodes: BTreeMap<usize, Node>,
    shape: Vec<String>,
    build: String,
    was_ready: bool,
    /// Whether a worker that is given up ends the run at any time.
    never_restarts: bool,
}

impl Membership {
    /// `workers`: the names of each node's workers, by rank.
    pub fn new(workers: BTreeMap<usize, Vec<String>>, shape: Vec<String>, build: &str, never_restarts: bool) -> Self {
        let node = |names: Vec<String>| Node {
            state: State::Away,
            workers: names.into_iter().map(|name| (name, false)).collect(),
            ports: Vec::new(),
            has_failed: false,
            seats: Vec::new(),
        };
        let nodes = workers.into_iter().filter(|(rank, _)| *rank != 0).map(|(rank, names)| (rank, node(names)));
        Self { nodes: nodes.collect(), shape, build: build.to_owned(), was_ready: false, never_restarts }
    }

    /// Nodes that have not told where their workers are.
    pub fn missing(&self) -> Vec<usize> {
        let is_there = |node: &Node| matches!(node.state, State::Here { .. } | State::Leaving { .. });
        self.nodes.iter().filter(|(_, node)| !is_there(node)).map(|(rank, _)| *rank).collect()
    }

    /// Whether every worker of every node serves.
    pub fn all_serve(&self) -> bool {
        self.missing().is_empty() && self.nodes.values().all(|node| node.workers.values().all(|serves| *serves))
    }

    /// Workers of nodes that do not serve.
    pub fn waiting_for(&self) -> Vec<&str> {
        let workers = self.nodes.values().flat_map(|node| &node.workers);
        workers.filter(|(_, serves)| !**serves).map(|(name, _)| name.as_str()).collect()
    }

    pub fn on(&mut self, event: Event) -> Vec<Action> {
        match event {
            Event::Hello { line, incarnation, card, from } => self.hello(line, incarnation, &card, from),
            Event::Says { line, says } => match self.rank_of(line) {
                Some(rank) => self.says(rank, line, says),
                None => Vec::new(),
            },
            Event::Gone { line, why } => match self.rank_of(line) {
                Some(rank) => self.gone(rank, &why),
                None => Vec::new(),
            },
            Event::Drained { rank } => match self.nodes.get(&rank).map(|node| &node.state) {
                Some(State::Leaving { line, .. }) => vec![Action::TellDrained { line: *line }],
                _ => Vec::new(),
            },
            Event::Ready => {
                self.was_ready = true;
                Vec::new()
            }
        }
    }

    fn rank_of(&self, line: Line) -> Option<usize> {
        let has = |node: &Node| node.state.line().is_some_and(|(own, ..)| own == line);
        self.nodes.iter().find(|(_, node)| has(node)).map(|(rank, _)| *rank)
    }

    fn hello(&mut self, line: Line, incarnation: u64, card: &NodeCard, from: String) -> Vec<Action> {
        let rank = card.rank;
        if let Some((why, again)) = self.objection(incarnation, card) {
            let said = Said {
                event: "node_refused",
                rank,
                text: format!("a launcher at {from} asked to be node {rank} and was refused: {why}"),
                warns: true,
            };
            // One that will come again says so again, every second.
            let say = (!again).then_some(Action::Say(said));
            return [Action::Refuse { line, why, again }].into_iter().chain(say).collect();
        }
        let Some(node) = self.nodes.get_mut(&rank) else { return Vec::new() };
        let ports = node.ports.clone();
        node.state = State::Greeted { line, incarnation, from };
        node.has_failed = false;
        vec![Action::Welcome { line, rank, ports }]
    }

    /// Why a launcher cannot be the node it says, and whether that may change by itself.
    fn objection(&self, incarnation: u64, card: &NodeCard) -> Option<(String, bool)> {
        let Some(node) = self.nodes.get(&card.rank) else {
            let why = match card.rank {
                0 => "there is a node 0 already, which is the one asked; say --node RANK".to_owned(),
                rank => format!("there is no node {rank} in [[hosts.nodes]] of node 0"),
            };
            return Some((why, false));
        };
        if card.build != self.build {
            return Some((
                format!("it is pdlink {}, and node 0 is {}; install one version", card.build, self.build),
                false,
            ));
        }
        if let Some((theirs, ours)) = difference(&card.shape, &self.shape) {
            return Some((format!("it has another configuration: {theirs}, where node 0 has {ours}"), false));
        }
        match node.state.line() {
            Some((_, other, from)) if other != incarnation => {
                Some((format!("node {} is here, at {from}; each node is started once", card.rank), true))
            }
            _ => None,
        }
    }

    fn says(&mut self, rank: usize, line: Line, says: NodeSays) -> Vec<Action> {
        match says {
            NodeSays::Share { seats, ports } => self.share(rank, line, seats, ports),
            NodeSays::Worker { worker, serves, why } => self.worker(rank, worker, serves, why),
            NodeSays::Life { worker, life } => vec![Action::Count { worker, life }],
            NodeSays::Failed { why } => self.failed(rank, &why),
            NodeSays::Leaving { by } => self.leaving(rank, &by),
        }
    }

    fn share(&mut self, rank: usize, line: Line, seats: Vec<Seat>, ports: Vec<(String, u16)>) -> Vec<Action> {
        let was_ready = self.was_ready;
        let Some(node) = self.nodes.get_mut(&rank) else { return Vec::new() };
        let told: BTreeSet<&str> = seats.iter().map(|seat| seat.worker.as_str()).collect();
        if !told.into_iter().eq(node.workers.keys().map(String::as_str)) {
            let why = "its workers are others than node 0 has for it".to_owned();
            return vec![Action::Refuse { line, why, again: false }];
        }
        let place = |seat: &Seat| Seat { serves: false, ..seat.clone() };
        let places: Vec<Seat> = seats.iter().map(place).collect();
        if was_ready && !node.seats.is_empty() && node.seats != places {
            let why = "its workers listen elsewhere than before, and the proxy knows them there".to_owned();
            return vec![Action::Refuse { line, why, again: false }];
        }
        node.seats = places;
        node.ports = ports;
        let Some((_, incarnation, from)) = node.state.line() else { return Vec::new() };
        let from = from.to_owned();
        let text = format!("node {rank} ({from}) is here, with {}", listed(node.workers.keys()));
        node.state = State::Here { line, incarnation, from };
        let mut actions = vec![Action::Say(Said { event: "node_joined", rank, text, warns: false })];
        for seat in seats {
            let (worker, serves) = (seat.worker.clone(), seat.serves);
            let before = node.workers.insert(worker.clone(), serves);
            actions.push(Action::Seat(seat));
            match (before, serves) {
                (_, true) => actions.push(Action::Up { worker }),
                (Some(true), false) => actions.push(Action::Down { worker, why: None }),
                (_, false) => {}
            }
        }
        actions
    }

    fn worker(&mut self, rank: usize, worker: String, serves: bool, why: String) -> Vec<Action> {
        let Some(node) = self.nodes.get_mut(&rank) else { return Vec::new() };
        let is_here = matches!(node.state, State::Here { .. });
        let Some(known) = node.workers.get_mut(&worker).filter(|known| **known != serves) else { return Vec::new() };
        *known = serves;
        if !serves {
            let text = format!("{worker} of node {rank} is away: {why}");
            let said = Said { event: "worker_away", rank, text, warns: true };
            return vec![Action::Down { worker, why: Some(why) }, Action::Say(said)];
        }
        // One that leaves takes nothing new.
        if is_here { vec![Action::Up { worker }] } else { Vec::new() }
    }

    fn failed(&mut self, rank: usize, why: &str) -> Vec<Action> {
        if !self.was_ready || self.never_restarts {
            return vec![Action::End { why: format!("node {rank}: {why}") }];
        }
        let text = format!("node {rank} ends: {why}");
        let mut actions = self.take_out(rank);
        if let Some(node) = self.nodes.get_mut(&rank) {
            node.has_failed = true;
        }
        actions.push(Action::Say(Said { event: "node_failed", rank, text, warns: true }));
        actions
    }

    fn leaving(&mut self, rank: usize, by: &str) -> Vec<Action> {
        let Some(node) = self.nodes.get_mut(&rank) else { return Vec::new() };
        let Some((line, incarnation, from)) = node.state.line() else { return Vec::new() };
        node.state = State::Leaving { line, incarnation, from: from.to_owned() };
        let text = format!("node {rank} leaves ({by}): its workers get no more requests");
        if !self.was_ready {
            return vec![Action::End { why: format!("node {rank} was asked to end ({by}) before the run was ready") }];
        }
        let mut actions = self.take_out(rank);
        actions.push(Action::Say(Said { event: "node_leaves", rank, text, warns: false }));
        actions.push(Action::Drain { rank });
        actions
    }

    fn gone(&mut self, rank: usize, why: &str) -> Vec<Action> {
        let actions = self.take_out(rank);
        let Some(node) = self.nodes.get_mut(&rank) else { return actions };
        let left = matches!(node.state, State::Leaving { .. }) || node.has_failed;
        let greeted_only = matches!(node.state, State::Greeted { .. });
        node.state = State::Away;
        let (event, text) = if left {
            ("node_left", format!("node {rank} has left"))
        } else {
            let workers = listed(node.workers.keys());
            ("node_lost", format!("node {rank} is lost: {why}; {workers} will be back when it is"))
        };
        let said = Action::Say(Said { event, rank, text, warns: !left && !greeted_only });
        actions.into_iter().chain([said]).collect()
    }

    /// Takes all workers of a node out.
    fn take_out(&mut self, rank: usize) -> Vec<Action> {
        let Some(node) = self.nodes.get_mut(&rank) else { return Vec::new() };
        let serving = node.workers.iter_mut().filter(|(_, serves)| **serves);
        serving
            .map(|(name, serves)| {
                *serves = false;
                Action::Down { worker: name.clone(), why: None }
            })
            .collect()
    }
}

/// The first line in which two configurations differ.
fn difference(theirs: &[String], ours: &[String]) -> Option<(String, String)> {
    let line = |lines: &[String], at: usize| lines.get(at).cloned().unwrap_or_else(|| "nothing".to_owned());
    (0..theirs.len().max(ours.len()))
        .find(|at| theirs.get(*at) != ours.get(*at))
        .map(|at| (line(theirs, at), line(ours, at)))
}

fn listed<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.map(String::as_str).collect();
    if names.is_empty() { "no worker".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
#[path = "membership_tests.rs"]
mod tests;
