//! What the proxy and the launcher ask of a worker's runtime.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;

use super::connection::{Answerer, Connection, Inbound, Liveness, Sink, connection};
use super::handshake::{Hello, Identity, VERSIONS, open};
use super::messages::{AbortAnswer, AdminAnswer, AdminRequest, Paired, RankRecords, RuntimeStatus, Traffic};
use super::wire::{from_body, to_body};
use super::{ControlError, Part, Role, TransferId, WeightsRequest, WeightsStatus};
use crate::security::Secret;

/// Proxy and launcher keep many idle connections: they ping more seldom than engines do, and notice a dead worker by
/// their requests' own timeouts.
const LIVENESS: Liveness = Liveness { ping_interval: Duration::from_secs(2), peer_timeout: Duration::from_secs(8) };

/// A client of one worker's KV address. Connects when first asked, and again after the worker went away.
#[derive(Debug, Clone)]
pub struct AdminClient {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    addr: String,
    identity: Identity,
    timeout: Duration,
    current: Mutex<Option<Current>>,
}

#[derive(Debug)]
struct Current {
    connection: Connection,
    /// Turns true when the connection ends.
    ended: watch::Receiver<bool>,
    /// Runs the connection; ends with it.
    _driver: JoinSet<()>,
}

impl AdminClient {
    /// `addr` is `host:port` of the worker's KV listener; `timeout` bounds each request, connecting included.
    pub fn new(addr: String, secret: Secret, timeout: Duration) -> Self {
        let hello = Hello {
            part: Part::Admin,
            engine_id: format!("admin of process {}", std::process::id()),
            incarnation: 0,
            role: Role::Both,
            payload: Vec::new(),
        };
        let identity = Identity { secret, versions: VERSIONS, hello, timeout };
        Self { shared: Arc::new(Shared { addr, identity, timeout, current: Mutex::new(None) }) }
    }

    /// The address it was made for.
    pub fn addr(&self) -> &str {
        &self.shared.addr
    }

    /// Frees what is held for a transfer, on all ranks of this worker and on its partner (KV-9). Idempotent.
    pub async fn abort(&self, transfer_id: TransferId) -> Result<AbortAnswer, ControlError> {
        match self.ask(AdminRequest::Abort(transfer_id)).await? {
            AdminAnswer::Abort(answer) => Ok(answer),
            other => Err(self.unexpected(other)),
        }
    }

    /// The same, but on this one of the worker's ranks alone.
    pub async fn abort_here(&self, transfer_id: TransferId) -> Result<AbortAnswer, ControlError> {
        match self.ask(AdminRequest::AbortHere(transfer_id)).await? {
            AdminAnswer::Abort(answer) => Ok(answer),
            other => Err(self.unexpected(other)),
        }
    }

    /// What the worker knows of a recent transfer, rank by rank.
    pub async fn records(&self, transfer_id: TransferId) -> Result<RankRecords, ControlError> {
        match self.ask(AdminRequest::Records(transfer_id)).await? {
            AdminAnswer::Records(records) => Ok(records),
            other => Err(self.unexpected(other)),
        }
    }

    /// The same, of this one of the worker's runtimes alone.
    pub async fn records_here(&self, transfer_id: TransferId) -> Result<RankRecords, ControlError> {
        match self.ask(AdminRequest::RecordsHere(transfer_id)).await? {
            AdminAnswer::Records(records) => Ok(records),
            other => Err(self.unexpected(other)),
        }
    }

    /// Asked of a decode runtime: which of a prefill worker's runtimes, one for each of `ranks` ranks, it has to do with.
    pub async fn peers_of(&self, ranks: u32) -> Result<Vec<u32>, ControlError> {
        match self.ask(AdminRequest::PeersOf(ranks)).await? {
            AdminAnswer::PeersOf(peers) => Ok(peers),
            other => Err(self.unexpected(other)),
        }
    }

    /// Asked of a decode worker: connects to the prefill worker at `peer_addr` now, checks that the two can work
    /// together, and chooses the path (KV-6).
    pub async fn pair(&self, peer_addr: &str) -> Result<Paired, ControlError> {
        match self.ask(AdminRequest::Pair(peer_addr.to_owned())).await? {
            AdminAnswer::Pair(paired) => Ok(paired),
            other => Err(self.unexpected(other)),
        }
    }

    pub async fn status(&self) -> Result<RuntimeStatus, ControlError> {
        match self.ask(AdminRequest::Status).await? {
            AdminAnswer::Status(status) => Ok(status),
            other => Err(self.unexpected(other)),
        }
    }

    /// What went over the worker's links, all ranks together.
    pub async fn traffic(&self) -> Result<Traffic, ControlError> {
        match self.ask(AdminRequest::Traffic).await? {
            AdminAnswer::Traffic(traffic) => Ok(*traffic),
            other => Err(self.unexpected(other)),
        }
    }

    /// The same, of this one of the worker's runtimes alone.
    pub async fn traffic_here(&self) -> Result<Traffic, ControlError> {
        match self.ask(AdminRequest::TrafficHere).await? {
            AdminAnswer::Traffic(traffic) => Ok(*traffic),
            other => Err(self.unexpected(other)),
        }
    }

    /// Asks the worker's weights runtime.
    pub async fn weights(&self, request: WeightsRequest) -> Result<WeightsStatus, ControlError> {
        match self.ask(AdminRequest::Weights(request)).await? {
            AdminAnswer::Weights(status) => Ok(*status),
            other => Err(self.unexpected(other)),
        }
    }

    /// Returns when the connection to the worker ends: at once where its process died. An error: there is none to be had.
    pub async fn lost(&self) -> Result<(), ControlError> {
        self.connection().await?;
        let ended = self.shared.current.lock().await.as_ref().map(|current| current.ended.clone());
        if let Some(mut ended) = ended {
            // An error means that the connection is gone with its sender.
            let _ = ended.wait_for(|ended| *ended).await;
        }
        Ok(())
    }

    /// Every question may be asked twice without harm, so one that met the end of an old connection is asked again over
    /// a new one, once.
    async fn ask(&self, request: AdminRequest) -> Result<AdminAnswer, ControlError> {
        let deadline = Instant::now() + self.shared.timeout;
        let body = to_body(&request);
        let (connection, is_fresh) = self.connection().await?;
        let left = || deadline.saturating_duration_since(Instant::now());
        let answer = match connection.request(body.clone(), left()).await {
            Err(ControlError::Closed { .. } | ControlError::Silent { .. }) if !is_fresh => {
                let (connection, _) = self.connection().await?;
                connection.request(body, left()).await
            }
            answer => answer,
        }?;
        from_body(&answer).map_err(|error| super::handshake::unreadable(&self.shared.addr, &error))
    }

    /// The open connection, or a new one (then `true`).
    async fn connection(&self) -> Result<(Connection, bool), ControlError> {
        let mut current = self.shared.current.lock().await;
        if let Some(current) = current.as_ref().filter(|current| !current.connection.is_closed()) {
            return Ok((current.connection.clone(), false));
        }
        let opened = self.connect().await?;
        let connection = opened.connection.clone();
        *current = Some(opened);
        Ok((connection, true))
    }

    async fn connect(&self) -> Result<Current, ControlError> {
        let Shared { addr, identity, timeout, .. } = &*self.shared;
        let mut stream = connect(addr, *timeout).await?;
        let (_hello, buffer) = open(&mut stream, identity, addr).await?;
        let (over, ended) = watch::channel(false);
        let sink = |_: &Connection| -> Sink {
            Box::new(move |inbound| {
                if let Inbound::Closed(_) = inbound {
                    over.send_replace(true);
                }
            })
        };
        let (connection, driver) = connection(stream, buffer, addr.clone(), LIVENESS, sink);
        let mut drivers = JoinSet::new();
        drivers.spawn(driver);
        Ok(Current { connection, ended, _driver: drivers })
    }

    fn unexpected(&self, answer: AdminAnswer) -> ControlError {
        let peer = self.shared.addr.clone();
        match answer {
            AdminAnswer::Refused(why) => ControlError::Refused { peer, why },
            other => ControlError::Malformed { peer, why: format!("an answer to another question: {other:?}") },
        }
    }
}

/// Connects to `host:port`, without delay for small messages.
pub async fn connect(addr: &str, within: Duration) -> Result<TcpStream, ControlError> {
    let peer = || addr.to_owned();
    let connected = tokio::time::timeout(within, TcpStream::connect(addr)).await;
    let stream = connected
        .map_err(|_| ControlError::TimedOut { peer: peer(), doing: "connecting", within })?
        .map_err(|error| ControlError::Connect { peer: peer(), why: error.to_string() })?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// Answers what proxy and launcher ask. `ask` must not block: it answers now, or keeps the reply for later.
pub trait AdminHandler: Send + Sync {
    fn ask(&self, request: AdminRequest, reply: AdminReply);
}

/// The right to answer one admin request.
#[derive(Debug)]
pub struct AdminReply(Answerer);

impl AdminReply {
    pub fn send(self, answer: &AdminAnswer) {
        self.0.answer(to_body(answer));
    }
}

/// A sink that hands admin requests to `handler`, and cuts off whoever sends anything else.
pub fn admin_sink(connection: &Connection, handler: Arc<dyn AdminHandler>) -> Sink {
    let connection = connection.clone();
    Box::new(move |inbound| match inbound {
        Inbound::Request(message, answerer) => match from_body(&message.body) {
            Ok(request) => handler.ask(request, AdminReply(answerer)),
            Err(error) => {
                let error = super::handshake::unreadable(connection.peer(), &error);
                tracing::warn!(%error, "admin connection cut off");
                connection.close(error);
            }
        },
        Inbound::Notice(_) => {
            let why = "a notice where requests are due".to_owned();
            connection.close(ControlError::Malformed { peer: connection.peer().to_owned(), why });
        }
        Inbound::Closed(_) => {}
    })
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::super::listener::serve;
    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    struct Canned;

    impl AdminHandler for Canned {
        fn ask(&self, request: AdminRequest, reply: AdminReply) {
            reply.send(&match request {
                AdminRequest::Abort(_) | AdminRequest::AbortHere(_) => AdminAnswer::Abort(AbortAnswer::Unknown),
                AdminRequest::Records(_) | AdminRequest::RecordsHere(_) => AdminAnswer::Records(RankRecords::default()),
                AdminRequest::PeersOf(ranks) => AdminAnswer::PeersOf((0..ranks).collect()),
                AdminRequest::Pair(peer) => AdminAnswer::Refused(format!("{peer} does not fit")),
                AdminRequest::Status => AdminAnswer::Abort(AbortAnswer::Ended),
                AdminRequest::Weights(_) => AdminAnswer::Refused("no weights".to_owned()),
                AdminRequest::Traffic | AdminRequest::TrafficHere => AdminAnswer::Refused("no links".to_owned()),
            });
        }
    }

    fn spawn_server(tasks: &mut JoinSet<()>, listener: TcpListener, secret: &Secret) {
        let hello = Hello {
            part: Part::Engine,
            engine_id: "canned".to_owned(),
            incarnation: 1,
            role: Role::Both,
            payload: Vec::new(),
        };
        let identity =
            Identity { secret: secret.clone(), versions: VERSIONS, hello, timeout: Duration::from_millis(200) };
        let welcome = |_: Hello, connection: &Connection| -> Sink { admin_sink(connection, Arc::new(Canned)) };
        tasks.spawn(serve(listener, Arc::new(identity), LIVENESS, Arc::new(welcome)));
    }

    async fn server(tasks: &mut JoinSet<()>, secret: &Secret) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        spawn_server(tasks, listener, secret);
        address
    }

    #[tokio::test]
    async fn questions_are_answered_and_refusals_are_errors() {
        let (mut tasks, secret) = (JoinSet::new(), Secret::generate().unwrap());
        let client = AdminClient::new(server(&mut tasks, &secret).await.to_string(), secret, SOON);
        assert_eq!(client.abort(TransferId::random()).await.unwrap(), AbortAnswer::Unknown);
        assert_eq!(client.records(TransferId::random()).await.unwrap(), RankRecords::default());
        assert_eq!(client.peers_of(2).await.unwrap(), [0, 1]);
        let refused = client.pair("1.2.3.4:5").await.unwrap_err();
        assert!(matches!(&refused, ControlError::Refused { why, .. } if why == "1.2.3.4:5 does not fit"), "{refused}");
        assert!(matches!(client.status().await, Err(ControlError::Malformed { .. })));
    }

    #[tokio::test]
    async fn strangers_are_refused_and_do_not_disturb_others() {
        let (mut tasks, secret) = (JoinSet::new(), Secret::generate().unwrap());
        let address = server(&mut tasks, &secret).await;
        let client = AdminClient::new(address.to_string(), secret, SOON);
        client.abort(TransferId::random()).await.unwrap();

        let impostor = AdminClient::new(address.to_string(), Secret::generate().unwrap(), SOON);
        assert!(matches!(impostor.status().await, Err(ControlError::WrongSecret { .. })));
        let mut garbage = TcpStream::connect(address).await.unwrap();
        garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        // Closed with bytes unread: an end or a reset, but an end.
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(SOON, garbage.read_to_end(&mut answer)).await.expect("hung up on");
        assert!(answer.is_empty());

        assert_eq!(client.abort(TransferId::random()).await.unwrap(), AbortAnswer::Unknown);
    }

    #[tokio::test]
    async fn silent_strangers_hold_up_a_friend_no_longer_than_the_handshake_may_take() {
        let (mut tasks, secret) = (JoinSet::new(), Secret::generate().unwrap());
        let address = server(&mut tasks, &secret).await;
        let mut silent = Vec::new();
        for _ in 0..super::super::listener::STRANGERS_MAX + 8 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let client = AdminClient::new(address.to_string(), secret, SOON);
        assert_eq!(client.abort(TransferId::random()).await.unwrap(), AbortAnswer::Unknown);
    }

    #[tokio::test]
    async fn a_worker_that_came_back_is_asked_without_any_other_restart() {
        let (mut tasks, secret) = (JoinSet::new(), Secret::generate().unwrap());
        let address = server(&mut tasks, &secret).await;
        let client = AdminClient::new(address.to_string(), secret.clone(), SOON);
        client.abort(TransferId::random()).await.unwrap();
        let lost = tokio::time::timeout(SOON, client.lost());
        let (lost, ()) = tokio::join!(lost, tasks.shutdown());
        lost.expect("told in time").expect("it was connected");
        assert!(client.abort(TransferId::random()).await.is_err());
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(address).unwrap();
        spawn_server(&mut tasks, socket.listen(64).unwrap(), &secret);
        assert_eq!(client.abort(TransferId::random()).await.unwrap(), AbortAnswer::Unknown);
    }
}
