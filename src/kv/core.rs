//! The runtime's thread: owns every transfer, hears every event, and is the only one to act.
//!
//! Events come from the engine, from connections, from copy threads and from timers, in one queue. Each goes to the
//! machine it concerns; what the machine wants done is done in `producer` (prefill) and `consumer` (decode).
//! `clients` holds the decode workers that connected to us, `peers` the prefill workers that we connected to.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::claims::Early;
use super::clients::Client;
use super::consumer::Receiving;
use super::messages::PeerInfo;
use super::past::{Gone, Past};
use super::peers::{Peer, Reached};
use super::producer::Sending;
use super::runtime::{ReportSink, Shared, locked};
use super::shares::{Meeting, Split};
use super::traffic::Account;
use super::{Basis, Begin, BlockId, End, Offer, PairPlan, Progress, Report, TransferFailure, siblings};
use crate::config::{DigestPolicy, Dispatch, KvConfig, KvSendType, Path, Role};
use crate::control::{
    AbortAnswer, AdminAnswer, AdminClient, AdminHandler, AdminReply, AdminRequest, Connection, ControlError, Hello,
    Identity, Inbound, Liveness, Part, Sink, TransferId, VERSIONS, Welcome, admin_sink, serve, to_body,
};
use crate::telemetry::{Side, TransferOutcome, TransferRecord, clock};
use crate::transport::{Board, Copied, Link, Transport, TransportError, export_all};

/// How long a runtime that shuts down waits for copies to end, and for peers to be told.
const SHUTDOWN_MAX: Duration = Duration::from_secs(5);
/// How long after that it waits until the last messages are with the kernel.
const FLUSH_MAX: Duration = Duration::from_secs(1);
/// What is answered where an engine takes no weights by this way.
const NO_WEIGHTS: &str = "this engine takes no weights over the control connection";
/// Told to a launcher that takes a worker for node 0.
const NO_NODES: &str = "this is a worker's KV link, not node 0 of the launcher; look at hosts.port";
/// Events handled between two looks at the timers.
const BATCH: usize = 256;

/// What the engine asks.
pub(super) enum Command {
    Begin {
        begin: Begin,
        weight_version: u64,
    },
    /// Of one layer, or some, and all requests of a step.
    Progress(Vec<Progress>),
    Restart(TransferId),
    Offer {
        offer: Offer,
        weight_version: u64,
    },
    Expect(Expect),
    Fetch {
        transfer_id: TransferId,
        blocks: Vec<Vec<BlockId>>,
        first_token: u32,
    },
    Release(TransferId),
    Abort(TransferId),
    WeightVersion(u64),
    ShutDown,
}

/// What the parameters of an expected transfer say.
pub(super) struct Expect {
    pub(super) transfer_id: TransferId,
    /// The runtimes of prefill, in order, and by what each is claimed at.
    pub(super) runtimes: Vec<(String, Basis)>,
    /// How prefill's ranks are spread over them.
    pub(super) src: Split,
    pub(super) weight_version: u64,
    pub(super) tokens: u32,
}

/// Everything that can happen.
pub(super) enum Event {
    Command(Command),
    Admin(AdminRequest, AdminReply),
    /// A decode worker has connected and proved itself.
    ClientUp {
        client: u64,
        hello: Hello,
        connection: Connection,
    },
    FromClient {
        client: u64,
        inbound: Inbound,
    },
    /// The link over which to push to a client is there, or cannot be made.
    ClientLink {
        client: u64,
        path: Path,
        result: Result<(Arc<dyn Link>, Arc<PairPlan>), TransportError>,
    },
    /// A prefill worker has been reached, or cannot be.
    PeerReached {
        peer: String,
        attempt: u64,
        result: Box<Result<Reached, TransferFailure>>,
    },
    FromPeer {
        peer: String,
        attempt: u64,
        inbound: Inbound,
    },
    /// `serial` tells a transfer from a later one with the same id; `part` is which part, or which reader.
    Copied {
        side: Side,
        transfer_id: TransferId,
        part: usize,
        serial: u64,
        result: Result<Copied, TransportError>,
    },
    Digested {
        side: Side,
        transfer_id: TransferId,
        part: usize,
        serial: u64,
        digest: u64,
    },
    Fenced {
        transfer_id: TransferId,
        part: usize,
        serial: u64,
        fenced: bool,
    },
}

/// What a timer is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Timer {
    Transfer(Side, TransferId),
    /// Renew the leases held at this prefill worker.
    Renew(String),
    /// Look whether the dead prefill worker of this part of a transfer can still write.
    Fence(TransferId, usize),
    /// Claims of this transfer have waited for its offer long enough.
    Early(TransferId),
}

/// Names a running timer.
pub(super) type TimerKey = (Instant, u64);

pub(super) struct Core {
    pub(super) kv: Settings,
    pub(super) shared: Arc<Shared>,
    pub(super) transports: Vec<Arc<dyn Transport>>,
    pub(super) events: mpsc::UnboundedSender<Event>,
    pub(super) identity: Arc<Identity>,
    pub(super) sending: HashMap<TransferId, Sending>,
    pub(super) receiving: HashMap<TransferId, Receiving>,
    pub(super) clients: HashMap<u64, Client>,
    pub(super) peers: HashMap<String, Peer>,
    pub(super) past: Past,
    pub(super) traffic: Account,
    /// What was said about transfers that are not offered yet.
    pub(super) early: HashMap<TransferId, Early>,
    /// How our worker spreads its ranks over runtimes, and which of them this is.
    pub(super) split: Split,
    pub(super) own_part: u32,
    /// Words that say to decode workers of this host that blocks are held.
    pub(super) board: Option<Arc<Board>>,
    pub(super) siblings: Vec<AdminClient>,
    meetings: HashMap<(Split, Split), Arc<Meeting>>,
    /// Connections, connection attempts, digests: all that runs beside the loop.
    pub(super) tasks: JoinSet<()>,
    reports: ReportSink,
    timers: BTreeMap<TimerKey, Timer>,
    serial: u64,
    fetches: u64,
    stopping: Option<Instant>,
}

/// The settings, as durations.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) lease: Duration,
    pub(super) transfer_timeout: Duration,
    pub(super) connect_timeout: Duration,
    pub(super) liveness: Liveness,
    pub(super) inflight_max: usize,
    digest: DigestPolicy,
    digest_sample_every: u32,
    pub(super) part_bytes_min: u64,
}

impl Core {
    pub(super) fn new(
        kv: &KvConfig,
        send_type: KvSendType,
        siblings: &[String],
        shared: Arc<Shared>,
        transports: Vec<Arc<dyn Transport>>,
        events: mpsc::UnboundedSender<Event>,
        reports: ReportSink,
    ) -> Self {
        let kv = Settings {
            lease: Duration::from_millis(kv.lease_ms),
            transfer_timeout: Duration::from_millis(kv.transfer_timeout_ms),
            connect_timeout: Duration::from_millis(kv.connect_timeout_ms),
            liveness: Liveness {
                ping_interval: Duration::from_millis(kv.ping_interval_ms),
                peer_timeout: Duration::from_millis(kv.peer_timeout_ms),
            },
            inflight_max: kv.inflight_max.max(1),
            digest: kv.digest,
            digest_sample_every: kv.digest_sample_every.max(1),
            part_bytes_min: kv.part_bytes_min,
        };
        // Decode grants nothing.
        let board = (shared.role != Role::Decode).then(Board::new);
        let info = PeerInfo {
            geometry: shared.layout.geometry().clone(),
            map: shared.layout.map().clone(),
            offers: export_all(&transports),
            send_type,
            board: board.as_ref().and_then(|board| board.at().ok()),
        };
        let hello = Hello {
            part: Part::Engine,
            engine_id: shared.engine_id.clone(),
            incarnation: shared.incarnation,
            role: shared.role,
            payload: to_body(&info).to_vec(),
        };
        let split = Split::of(&shared.layout);
        let own_part = split.part_of(shared.layout.held().start);
        let siblings = siblings::clients(siblings, &shared.secret);
        let identity =
            Identity { secret: shared.secret.clone(), versions: VERSIONS, hello, timeout: kv.connect_timeout };
        Self {
            kv,
            shared,
            transports,
            events,
            identity: Arc::new(identity),
            sending: HashMap::new(),
            receiving: HashMap::new(),
            clients: HashMap::new(),
            peers: HashMap::new(),
            past: Past::default(),
            traffic: Account::default(),
            early: HashMap::new(),
            split,
            own_part,
            board,
            siblings,
            meetings: HashMap::new(),
            tasks: JoinSet::new(),
            reports,
            timers: BTreeMap::new(),
            serial: 0,
            fetches: 0,
            stopping: None,
        }
    }

    /// Runs until told to shut down and every transfer has been reported.
    pub(super) async fn run(mut self, listener: tokio::net::TcpListener, mut queue: mpsc::UnboundedReceiver<Event>) {
        let server = serve(listener, Arc::clone(&self.identity), self.kv.liveness, self.welcome());
        self.tasks.spawn(server);
        let mut batch = Vec::with_capacity(BATCH);
        while !self.is_done() {
            let wake = self.timers.first_key_value().map(|((at, _), _)| *at).into_iter().chain(self.stopping).min();
            tokio::select! {
                biased;
                _ = queue.recv_many(&mut batch, BATCH) => {}
                () = sleep_until(wake) => {}
            }
            for event in batch.drain(..) {
                self.handle(event);
            }
            self.fire_timers();
        }
        self.flush().await;
        self.close();
    }

    fn is_done(&self) -> bool {
        // KV-2: blocks may be held for us by peers that are not reached yet; they are told as soon as they are.
        let told = !self.peers.values().any(Peer::has_unsent);
        let idle = told && self.sending.is_empty() && self.receiving.is_empty();
        self.stopping.is_some_and(|until| idle || Instant::now() >= until)
    }

    /// Where each new connection's messages go.
    fn welcome(&self) -> Welcome {
        let events = self.events.clone();
        let admin: Arc<dyn AdminHandler> = Arc::new(AdminEvents(events.clone()));
        let weights = self.shared.weights.clone();
        let numbers = Arc::new(std::sync::atomic::AtomicU64::new(0));
        Arc::new(move |hello: Hello, connection: &Connection| -> Sink {
            match hello.part {
                Part::Admin => admin_sink(connection, Arc::clone(&admin)),
                Part::Weights => match &weights {
                    Some(weights) => (weights.welcome)(hello, connection),
                    None => {
                        let (peer, why) = (connection.peer().to_owned(), NO_WEIGHTS.to_owned());
                        connection.close(ControlError::Refused { peer, why });
                        Box::new(|_| {})
                    }
                },
                Part::Node => {
                    let (peer, why) = (connection.peer().to_owned(), NO_NODES.to_owned());
                    connection.close(ControlError::Refused { peer, why });
                    Box::new(|_| {})
                }
                Part::Engine => {
                    let client = numbers.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                    let events = events.clone();
                    // The loop may be gone already: then so is this connection, in a moment.
                    let _ = events.send(Event::ClientUp { client, hello, connection: connection.clone() });
                    Box::new(move |inbound| drop(events.send(Event::FromClient { client, inbound })))
                }
            }
        })
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Command(command) => self.command(command),
            Event::Admin(request, reply) => self.admin(request, reply),
            Event::ClientUp { client, hello, connection } => self.client_up(client, &hello, connection),
            Event::FromClient { client, inbound } => self.client_says(client, inbound),
            Event::ClientLink { client, path, result } => self.client_link(client, path, result),
            Event::PeerReached { peer, attempt, result } => self.peer_reached(&peer, attempt, *result),
            Event::FromPeer { peer, attempt, inbound } => self.peer_says(&peer, attempt, inbound),
            Event::Copied { side: Side::Prefill, transfer_id, part, serial, result } => {
                self.push_done(transfer_id, serial, part, result);
            }
            Event::Copied { side: Side::Decode, transfer_id, part, serial, result } => {
                self.pull_done(transfer_id, serial, part, result);
            }
            Event::Digested { side: Side::Prefill, transfer_id, part, serial, digest } => {
                self.sending_digested(transfer_id, serial, part, digest);
            }
            Event::Digested { side: Side::Decode, transfer_id, part, serial, digest } => {
                self.receiving_digested(transfer_id, serial, part, digest);
            }
            Event::Fenced { transfer_id, part, serial, fenced } => self.fenced(transfer_id, serial, part, fenced),
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Begin { begin, weight_version } => self.begin(begin, weight_version),
            Command::Progress(progress) => progress.into_iter().for_each(|progress| self.progress(progress)),
            Command::Restart(transfer_id) => self.restart(transfer_id),
            Command::Offer { offer, weight_version } => self.offer(offer, weight_version),
            Command::Expect(expect) => self.expect(&expect),
            Command::Fetch { transfer_id, blocks, first_token } => self.fetch(transfer_id, blocks, first_token),
            Command::Release(transfer_id) => self.release(transfer_id),
            Command::Abort(transfer_id) => {
                self.abort(transfer_id);
            }
            Command::WeightVersion(version) => {
                self.outdate_sending(version);
                self.outdate_receiving(version);
            }
            Command::ShutDown => {
                self.stopping = Some(Instant::now() + SHUTDOWN_MAX);
                self.stop_sending();
                self.stop_receiving();
            }
        }
    }

    fn admin(&mut self, request: AdminRequest, reply: AdminReply) {
        match request {
            AdminRequest::Abort(transfer_id) => self.abort_everywhere(transfer_id, reply),
            AdminRequest::AbortHere(transfer_id) => {
                let answer = self.abort(transfer_id);
                reply.send(&AdminAnswer::Abort(answer));
            }
            AdminRequest::Records(transfer_id) => self.records_everywhere(transfer_id, reply),
            AdminRequest::RecordsHere(transfer_id) => reply.send(&AdminAnswer::Records(self.records_here(transfer_id))),
            AdminRequest::PeersOf(ranks) => reply.send(&self.peers_of(ranks)),
            AdminRequest::Status => reply.send(&AdminAnswer::Status(self.shared.status())),
            AdminRequest::Traffic => self.traffic_everywhere(reply),
            AdminRequest::TrafficHere => reply.send(&AdminAnswer::Traffic(Box::new(self.traffic_here()))),
            AdminRequest::Pair(peer) => self.pair(&peer, reply),
            AdminRequest::Weights(_) => match &self.shared.weights {
                Some(weights) => weights.admin.ask(request, reply),
                None => reply.send(&AdminAnswer::Refused(NO_WEIGHTS.to_owned())),
            },
        }
    }

    /// KV-9. Whichever side is here is told; an id that nobody knows is remembered.
    pub(super) fn abort(&mut self, transfer_id: TransferId) -> AbortAnswer {
        let sending = self.abort_sending(transfer_id);
        let receiving = self.abort_receiving(transfer_id);
        if sending || receiving {
            return AbortAnswer::Aborted;
        }
        match self.past.of(transfer_id) {
            Some(Gone::Ended | Gone::Expired | Gone::Aborted) => AbortAnswer::Ended,
            Some(Gone::AbortedEarly | Gone::ReleasedEarly) | None => {
                self.abort_early(transfer_id);
                AbortAnswer::Unknown
            }
        }
    }

    /// Which runtimes of two workers with such ranks have to do with one another.
    pub(super) fn meeting(&mut self, src: Split, dst: Split) -> Arc<Meeting> {
        let groups = &self.shared.layout.geometry().groups;
        let known = self.meetings.entry((src, dst));
        Arc::clone(known.or_insert_with(|| Arc::new(Meeting::new(groups, src, dst))))
    }

    /// A number that no transfer, attempt or timer had before.
    pub(super) fn next_serial(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    pub(super) fn weight_version(&self) -> u64 {
        self.shared.weight_version.load(std::sync::atomic::Ordering::Relaxed)
    }

    /// Whether the next fetched transfer gets a digest (KV-4).
    pub(super) fn wants_digest(&mut self) -> bool {
        let number = self.fetches;
        self.fetches += 1;
        match self.kv.digest {
            DigestPolicy::Off => false,
            DigestPolicy::Every => true,
            DigestPolicy::Sampled => number.is_multiple_of(u64::from(self.kv.digest_sample_every)),
        }
    }

    /// Sets a timer, and takes back the one that `old` names.
    pub(super) fn set_timer(&mut self, old: Option<TimerKey>, at: Option<Instant>, timer: Timer) -> Option<TimerKey> {
        if let Some(old) = old {
            if at == Some(old.0) {
                return Some(old);
            }
            self.timers.remove(&old);
        }
        let key = (at?, self.next_serial());
        self.timers.insert(key, timer);
        Some(key)
    }

    fn fire_timers(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.timers.first_entry().filter(|entry| entry.key().0 <= now) {
            match entry.remove() {
                Timer::Transfer(Side::Prefill, transfer_id) => self.tick_sending(transfer_id, now),
                Timer::Transfer(Side::Decode, transfer_id) => self.tick_receiving(transfer_id, now),
                Timer::Renew(peer) => self.renew(&peer, now),
                Timer::Fence(transfer_id, part) => self.look_for_fence(transfer_id, part, now),
                Timer::Early(transfer_id) => self.early_over(transfer_id),
            }
        }
    }

    /// The one report of a transfer (KV-1), its record and its count. The engine may act on it before this returns.
    pub(super) fn report(&mut self, transfer_id: TransferId, end: End, blocks: usize, record: TransferRecord) {
        let side = record.side;
        let gone = match end {
            End::Expired => Gone::Expired,
            End::Aborted => Gone::Aborted,
            _ => Gone::Ended,
        };
        self.record_end(transfer_id, &end, record);
        self.past.remember(transfer_id, gone);
        self.shared.leave(side, transfer_id, blocks);
        (self.reports)(Report { transfer_id, side, end });
    }

    /// A transfer that prefill had only begun has ended: the engine hears of it if it offers it all the same.
    pub(super) fn end_begun(&mut self, transfer_id: TransferId, end: &End, record: TransferRecord) {
        self.record_end(transfer_id, end, record);
        let gone = if *end == End::Released { Gone::ReleasedEarly } else { Gone::AbortedEarly };
        self.past.remember(transfer_id, gone);
        self.shared.leave_begun(transfer_id);
    }

    fn record_end(&mut self, transfer_id: TransferId, end: &End, mut record: TransferRecord) {
        let side = record.side;
        let (outcome, name) = match end {
            End::Sent | End::Received => (TransferOutcome::Done, "done"),
            End::Released => (TransferOutcome::Done, "released"),
            End::Aborted => (TransferOutcome::Aborted, "aborted"),
            End::Expired => (TransferOutcome::Expired, "expired"),
            End::Failed { failure, .. } => (TransferOutcome::Failed(failure.to_string()), failure.name()),
        };
        record.outcome = outcome;
        match end {
            End::Failed { failure, fenced } => {
                tracing::warn!(%transfer_id, side = side.name(), fenced, %failure, "transfer failed");
            }
            end => tracing::debug!(%transfer_id, side = side.name(), ?end, bytes = record.bytes, "transfer ended"),
        }
        record.ended_unix_us = clock::unix_us();
        self.traffic.ended(&record, name);
        self.shared.metrics.ended(&record, name);
        locked(&self.shared.records).push(transfer_id, record);
    }

    /// What a record says before anything has happened.
    pub(super) fn blank_record(&self, transfer_id: TransferId, side: Side) -> TransferRecord {
        TransferRecord {
            transfer_id: transfer_id.to_string(),
            side,
            engine_id: self.shared.engine_id.clone(),
            peer_engine_id: None,
            rank: self.shared.layout.held().start,
            path: None,
            bytes: 0,
            runs: 0,
            posts: 0,
            blocks: 0,
            tokens: 0,
            wait_us: 0,
            copy_us: 0,
            validate_us: 0,
            dispatch: Dispatch::Sequential,
            exposed_us: 0,
            digest_checked: false,
            weight_version: self.weight_version(),
            ended_unix_us: 0,
            outcome: TransferOutcome::Aborted,
        }
    }

    /// Reaps what has ended beside the loop.
    pub(super) fn reap(&mut self) {
        while self.tasks.try_join_next().is_some() {}
    }

    /// Lets the last messages out. Peers would notice that we are gone, but not why, nor of what nobody has claimed yet.
    async fn flush(&self) {
        let clients = self.clients.values().map(|client| &client.connection);
        let connections = clients.chain(self.peers.values().filter_map(Peer::connection));
        let all = async {
            for connection in connections {
                connection.flushed().await;
            }
        };
        let _ = tokio::time::timeout(FLUSH_MAX, all).await;
    }

    fn close(mut self) {
        let cause = |connection: &Connection| ControlError::Closed {
            peer: connection.peer().to_owned(),
            why: "this worker shuts down".to_owned(),
        };
        for client in self.clients.values() {
            client.connection.close(cause(&client.connection));
        }
        for connection in self.peers.values().filter_map(Peer::connection) {
            connection.close(cause(connection));
        }
        // Links before transports: each waits until nothing of it can write (TR-3).
        self.clients.clear();
        self.peers.clear();
        self.give_up_receiving();
        self.tasks.abort_all();
        for transport in &self.transports {
            transport.close();
        }
    }
}

/// Microseconds from one moment to a later one; 0 if either is unknown.
pub(super) fn micros(from: Option<Instant>, to: Option<Instant>) -> u64 {
    let (Some(from), Some(to)) = (from, to) else { return 0 };
    u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Admin questions become events.
struct AdminEvents(mpsc::UnboundedSender<Event>);

impl AdminHandler for AdminEvents {
    fn ask(&self, request: AdminRequest, reply: AdminReply) {
        let _ = self.0.send(Event::Admin(request, reply));
    }
}
