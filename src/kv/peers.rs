//! The prefill workers that this decode worker fetches from: one connection and one link to each, made when first
//! needed, and anew after either was lost.

use std::collections::{HashSet, VecDeque};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::clients::reason;
use super::core::{Core, Event, Timer, TimerKey};
use super::messages::{CheckedInfo, PeerInfo, ToDecode, ToPrefill};
use super::shares::Split;
use super::{Layout, PairPlan, TransferFailure};
use crate::config::{KvSendType, Path};
use crate::control::{
    AdminAnswer, AdminReply, Connection, ControlError, Identity, Inbound, Liveness, Paired, Sink, TransferId, connect,
    connection, from_body, open, to_body,
};
use crate::telemetry::Side;
use crate::transport::{BoardAt, Link, PeerBoard, Transport, connect_best};

/// Messages that may wait for a connection to be made.
const OUTBOX_MAX: usize = 64 * 1024;
/// Most ids in one renewal.
const RENEW_MAX: usize = 64 * 1024;

/// One prefill worker, by its `host:port`.
pub(super) struct Peer {
    attempt: u64,
    state: State,
    /// Transfers expected from it.
    pub(super) transfers: HashSet<TransferId>,
    /// Copies that run, and those that wait for their turn.
    pub(super) copying: usize,
    pub(super) waiting: VecDeque<(TransferId, usize)>,
    renewal: Option<TimerKey>,
}

enum State {
    Connecting { outbox: Vec<Bytes>, pairing: Vec<AdminReply> },
    Up(Box<Reached>),
}

/// A prefill worker that has been reached.
pub(super) struct Reached {
    pub(super) connection: Connection,
    pub(super) engine_id: String,
    pub(super) incarnation: u64,
    pub(super) send_type: KvSendType,
    /// How its worker spreads ranks over runtimes, and which of them it is.
    pub(super) split: Split,
    pub(super) part: u32,
    pub(super) link: Arc<dyn Link>,
    pub(super) path: Path,
    /// Which of our transports the link belongs to.
    pub(super) transport: usize,
    pub(super) plan: Arc<PairPlan>,
    /// Where its words are, if they can be looked at.
    pub(super) board: Option<PeerBoard>,
}

impl Peer {
    pub(super) fn connection(&self) -> Option<&Connection> {
        self.reached().map(|reached| &reached.connection)
    }

    /// Whether messages wait for a connection.
    pub(super) fn has_unsent(&self) -> bool {
        matches!(&self.state, State::Connecting { outbox, .. } if !outbox.is_empty())
    }

    pub(super) fn reached(&self) -> Option<&Reached> {
        match &self.state {
            State::Up(reached) => Some(reached),
            State::Connecting { .. } => None,
        }
    }
}

impl Core {
    /// Sends, or keeps until the connection is there. A message to a peer that is gone is dropped.
    pub(super) fn tell_peer(&mut self, peer: &str, message: &ToPrefill) {
        match self.peers.get_mut(peer).map(|peer| &mut peer.state) {
            Some(State::Up(reached)) => drop(reached.connection.notify(to_body(message))),
            Some(State::Connecting { outbox, .. }) if outbox.len() < OUTBOX_MAX => outbox.push(to_body(message)),
            Some(State::Connecting { .. }) | None => {}
        }
    }

    /// Makes sure that the peer is connected or being connected.
    pub(super) fn need_peer(&mut self, peer: &str) -> &mut Peer {
        if !self.peers.contains_key(peer) {
            let attempt = self.next_serial();
            let state = State::Connecting { outbox: Vec::new(), pairing: Vec::new() };
            let (transfers, waiting) = (HashSet::new(), VecDeque::new());
            let entry = Peer { attempt, state, transfers, copying: 0, waiting, renewal: None };
            self.peers.insert(peer.to_owned(), entry);
            self.reap();
            let reach = Reach {
                peer: peer.to_owned(),
                attempt,
                identity: Arc::clone(&self.identity),
                liveness: self.kv.liveness,
                timeout: self.kv.connect_timeout,
                layout: Arc::clone(&self.shared.layout),
                transports: self.transports.clone(),
                events: self.events.clone(),
            };
            self.tasks.spawn(reach.run());
        }
        self.peers.get_mut(peer).expect("entered above")
    }

    /// KV-6: asked at start, for every pair.
    pub(super) fn pair(&mut self, peer: &str, reply: AdminReply) {
        match &mut self.need_peer(peer).state {
            State::Up(reached) => reply.send(&AdminAnswer::Pair(paired(reached))),
            State::Connecting { pairing, .. } => pairing.push(reply),
        }
    }

    /// Which runtimes of a prefill worker of one rank each we read, or let go of.
    pub(super) fn peers_of(&mut self, ranks: u32) -> AdminAnswer {
        if let Err(error) = self.shared.layout.check_ranks_of(ranks) {
            return AdminAnswer::Refused(error.to_string());
        }
        let meeting = self.meeting(Split { tp_size: ranks, held: 1 }, self.split);
        let mut peers = meeting.sources_of(self.own_part).to_vec();
        peers.extend(meeting.released_by(self.own_part));
        AdminAnswer::PeersOf(peers)
    }

    pub(super) fn peer_reached(&mut self, peer: &str, attempt: u64, result: Result<Reached, TransferFailure>) {
        let Some(entry) = self.peers.get_mut(peer).filter(|entry| entry.attempt == attempt) else {
            if let Ok(reached) = result {
                self.close_link(reached.link);
            }
            return;
        };
        let reached = match result {
            Ok(reached) => reached,
            Err(failure) => return self.peer_unreachable(peer, &failure),
        };
        let answer = AdminAnswer::Pair(paired(&reached));
        let connection = reached.connection.clone();
        let before = std::mem::replace(&mut entry.state, State::Up(Box::new(reached)));
        if let State::Connecting { outbox, pairing } = before {
            outbox.into_iter().for_each(|body| drop(connection.notify(body)));
            pairing.into_iter().for_each(|reply| reply.send(&answer));
        }
        self.count_peers();
    }

    fn peer_unreachable(&mut self, peer: &str, failure: &TransferFailure) {
        tracing::warn!(peer, %failure, "prefill worker not reached");
        self.shared.metrics.peer_failed(failure.name());
        let Some(entry) = self.peers.remove(peer) else { return };
        if let State::Connecting { pairing, .. } = entry.state {
            pairing.into_iter().for_each(|reply| reply.send(&AdminAnswer::Refused(failure.to_string())));
        }
        self.set_timer(entry.renewal, None, Timer::Renew(String::new()));
        for transfer_id in entry.transfers {
            self.receiving_peer_lost(transfer_id, peer, failure.clone());
        }
    }

    pub(super) fn peer_says(&mut self, peer: &str, attempt: u64, inbound: Inbound) {
        let Some(entry) = self.peers.get(peer).filter(|entry| entry.attempt == attempt) else { return };
        let refuse = |why: String| {
            if let Some(connection) = entry.connection() {
                connection.close(ControlError::Malformed { peer: peer.to_owned(), why });
            }
        };
        match inbound {
            Inbound::Notice(message) => match from_body::<ToDecode>(&message.body) {
                Ok(message) => self.hear_peer(peer, message),
                Err(error) => refuse(error.to_string()),
            },
            Inbound::Request(..) => refuse("a request where notices are due".to_owned()),
            Inbound::Closed(error) => self.peer_down(peer, &error),
        }
    }

    /// KV-8: transfers fail at once, the link is closed and its mappings dropped. The next transfer connects anew.
    pub(super) fn peer_down(&mut self, peer: &str, error: &ControlError) {
        let Some(entry) = self.peers.remove(peer) else { return };
        tracing::warn!(peer, %error, transfers = entry.transfers.len(), "prefill worker lost");
        self.shared.metrics.peer_failed(reason(error));
        self.set_timer(entry.renewal, None, Timer::Renew(String::new()));
        let failure = TransferFailure::PeerLost { peer: peer.to_owned(), why: error.to_string() };
        for transfer_id in entry.transfers {
            self.receiving_peer_lost(transfer_id, peer, failure.clone());
        }
        if let State::Up(reached) = entry.state {
            reached.connection.close(error.clone());
            self.let_go(reached.link);
        }
        self.count_peers();
    }

    fn count_peers(&self) {
        let up = self.peers.values().filter(|peer| peer.reached().is_some()).count();
        self.shared.metrics.peers(Side::Decode, up);
    }

    /// Leases are renewed six times in their length, for all transfers of a peer at once (KV-2).
    pub(super) fn plan_renewal(&mut self, peer: &str) {
        let at = Instant::now() + self.kv.lease / 6;
        if self.peers.get(peer).is_some_and(|entry| entry.renewal.is_none()) {
            let timer = self.set_timer(None, Some(at), Timer::Renew(peer.to_owned()));
            if let Some(entry) = self.peers.get_mut(peer) {
                entry.renewal = timer;
            }
        }
    }

    pub(super) fn renew(&mut self, peer: &str, _now: Instant) {
        let Some(entry) = self.peers.get_mut(peer) else { return };
        entry.renewal = None;
        let held = |id: &&TransferId| self.receiving.get(id).is_some_and(|receiving| receiving.holds_lease(peer));
        let ids: Vec<TransferId> = entry.transfers.iter().filter(held).copied().collect();
        if ids.is_empty() {
            return;
        }
        for chunk in ids.chunks(RENEW_MAX) {
            self.tell_peer(peer, &ToPrefill::Renew(chunk.to_vec()));
        }
        self.shared.metrics.leases_renewed(ids.len() as u64);
        self.plan_renewal(peer);
    }
}

fn paired(reached: &Reached) -> Paired {
    Paired { path: reached.path, peer_engine_id: reached.engine_id.clone() }
}

/// One attempt to reach a prefill worker, and then the connection itself.
struct Reach {
    peer: String,
    attempt: u64,
    identity: Arc<Identity>,
    liveness: Liveness,
    timeout: Duration,
    layout: Arc<Layout>,
    transports: Vec<Arc<dyn Transport>>,
    events: mpsc::UnboundedSender<Event>,
}

impl Reach {
    async fn run(self) {
        let failure = match self.shake().await {
            Ok((connection, driver, peer)) => return self.connected(connection, driver, peer).await,
            Err(failure) => failure,
        };
        self.tell(Err(failure));
    }

    async fn shake(&self) -> Result<(Connection, impl Future<Output = ()> + Send + use<>, Found), TransferFailure> {
        let deadline = Instant::now() + self.timeout;
        let mut stream = connect(&self.peer, self.timeout).await.map_err(|error| self.unreachable(&error))?;
        let (hello, buffer) =
            open(&mut stream, &self.identity, &self.peer).await.map_err(|error| self.unreachable(&error))?;
        let info = PeerInfo::read(&hello.payload).map_err(|error| self.incompatible(&error))?;
        if hello.role == crate::config::Role::Decode {
            return Err(self.incompatible(&"it is a decode worker, and holds no KV to fetch"));
        }
        info.layout.check_feeds(&self.layout).map_err(|error| self.incompatible(&error))?;
        let (events, peer, attempt) = (self.events.clone(), self.peer.clone(), self.attempt);
        let sink = move |_: &Connection| -> Sink {
            Box::new(move |inbound| {
                let _ = events.send(Event::FromPeer { peer: peer.clone(), attempt, inbound });
            })
        };
        let (connection, driver) = connection(stream, buffer, self.peer.clone(), self.liveness, sink);
        let (engine_id, incarnation) = (hello.engine_id, hello.incarnation);
        Ok((connection, driver, Found { engine_id, incarnation, info, deadline }))
    }

    /// Runs the connection to its end; meanwhile chooses the path, off the loop, since that may block.
    async fn connected(self, connection: Connection, driver: impl Future<Output = ()>, found: Found) {
        let mut driver = pin!(driver);
        let (ours, transports) = (Arc::clone(&self.layout), self.transports.clone());
        let Found { engine_id, incarnation, info, deadline } = found;
        let CheckedInfo { layout, offers, send_type, board } = info;
        let choose = tokio::task::spawn_blocking(move || {
            let split = Split::of(&layout);
            let part = split.part_of(layout.held().start);
            let plan = PairPlan::new(&layout, &ours).map_err(|error| error.to_string())?;
            let selected = connect_best(&transports, &offers, deadline).map_err(|error| error.to_string())?;
            let board = board.and_then(|at| look_at(at, selected.path));
            Ok::<_, String>((selected, plan, split, part, board))
        });
        let chosen = tokio::select! {
            chosen = choose => chosen.map_err(|error| error.to_string()).and_then(|chosen| chosen),
            // The sink was told; but nobody listens to it before the peer counts as reached.
            () = &mut driver => Err("the connection ended while a path was chosen".to_owned()),
        };
        match chosen {
            Err(why) => self.tell(Err(TransferFailure::Incompatible { peer: self.peer.clone(), why })),
            Ok((selected, plan, split, part, board)) => {
                for (path, error) in &selected.passed_over {
                    tracing::warn!(peer = %self.peer, path = path.name(), %error, "a better path cannot be used");
                }
                let path = selected.path;
                tracing::info!(peer = %self.peer, %engine_id, path = path.name(), "prefill worker reached");
                let (link, transport, plan) = (selected.link, selected.transport, Arc::new(plan));
                self.tell(Ok(Reached {
                    connection: connection.clone(),
                    engine_id,
                    incarnation,
                    send_type,
                    split,
                    part,
                    link,
                    path,
                    transport,
                    plan,
                    board,
                }));
                driver.await;
            }
        }
    }

    fn tell(&self, result: Result<Reached, TransferFailure>) {
        let (peer, attempt) = (self.peer.clone(), self.attempt);
        let _ = self.events.send(Event::PeerReached { peer, attempt, result: Box::new(result) });
    }

    fn unreachable(&self, error: &ControlError) -> TransferFailure {
        TransferFailure::Unreachable { peer: self.peer.clone(), why: error.to_string() }
    }

    fn incompatible(&self, why: &dyn std::fmt::Display) -> TransferFailure {
        TransferFailure::Incompatible { peer: self.peer.clone(), why: why.to_string() }
    }
}

/// What a prefill worker said of itself.
struct Found {
    engine_id: String,
    incarnation: u64,
    info: CheckedInfo,
    deadline: Instant,
}

/// The words of a peer whose memory is open to us anyway. What they do not say is asked.
fn look_at(at: BoardAt, path: Path) -> Option<PeerBoard> {
    if !matches!(path, Path::Shm | Path::CudaIpc) {
        return None;
    }
    let opened = PeerBoard::open(at);
    opened
        .inspect_err(
            |error| tracing::info!(%error, "prefill is asked whether its blocks were held: its memory is closed to us"),
        )
        .ok()
}
