//! Node 0's end of the nodes' connections.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::membership::{Event, Line};
use super::messages::{Node0Says, NodeSays};
use crate::control::{
    Connection, ControlError, Hello, Identity, Inbound, Liveness, Part, Role, Sink, VERSIONS, from_body, serve, to_body,
};
use crate::security::{Secret, SecretError};

/// News that may wait for node 0. A node that tells more at once is cut off.
const NEWS_MAX: usize = 4096;

/// How long a node may take to prove that it belongs to the run.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Pings that fit into the silence after which a node counts as lost.
const PINGS: u32 = 6;

/// Why node 0 does not listen.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "node 0 cannot listen for the other nodes on {address}: {source}; check that this is an address of this host and the port \
         free, or change the node's address or `hosts.port`"
    )]
    Listen { address: SocketAddr, source: std::io::Error },
    #[error(transparent)]
    Secret(#[from] SecretError),
}

/// Connections by number.
type Lines = Arc<Mutex<BTreeMap<Line, Connection>>>;

/// Listens for nodes until it is dropped.
pub struct Hub {
    news: mpsc::Receiver<Event>,
    lines: Lines,
    _listener: JoinSet<()>,
}

/// How the nodes' connections tell silence from loss.
pub(super) fn liveness(lost_after: Duration) -> Liveness {
    Liveness { ping_interval: lost_after / PINGS, peer_timeout: lost_after }
}

/// Who one end of a node's connection is.
pub(super) fn identity(secret: &Secret, name: String, incarnation: u64, payload: Vec<u8>) -> Identity {
    let hello = Hello { part: Part::Node, engine_id: name, incarnation, role: Role::Both, payload };
    Identity { secret: secret.clone(), versions: VERSIONS, hello, timeout: HANDSHAKE_TIMEOUT }
}

impl Hub {
    /// Listens on node 0's address.
    pub async fn listen(address: SocketAddr, secret: &Secret, lost_after: Duration) -> Result<Self, HubError> {
        secret.allowed_on(address.ip())?;
        let listener = TcpListener::bind(address).await.map_err(|source| HubError::Listen { address, source })?;
        let (sender, news) = mpsc::channel(NEWS_MAX);
        let lines = Lines::default();
        let (numbers, known) = (AtomicU64::new(0), Arc::clone(&lines));
        let welcome = move |hello: Hello, connection: &Connection| {
            let line = numbers.fetch_add(1, Ordering::Relaxed);
            greet(line, hello, connection, &known, sender.clone())
        };
        let identity = identity(secret, "node 0".to_owned(), rand::random(), Vec::new());
        let mut tasks = JoinSet::new();
        tasks.spawn(serve(listener, Arc::new(identity), liveness(lost_after), Arc::new(welcome)));
        Ok(Self { news, lines, _listener: tasks })
    }

    /// The next thing that a node said or that befell it.
    pub async fn next(&mut self) -> Option<Event> {
        self.news.recv().await
    }

    /// Tells one node. One that is gone does not mind.
    pub fn tell(&self, line: Line, says: &Node0Says) {
        if let Some(connection) = locked(&self.lines).get(&line) {
            let _ = connection.notify(to_body(says));
        }
    }

    /// Says why, and forgets the connection: the node hangs up.
    pub fn refuse(&self, line: Line, why: String, again: bool) {
        self.tell(line, &Node0Says::Refused { why, again });
        locked(&self.lines).remove(&line);
    }

    /// Tells every node.
    pub fn tell_all(&self, says: &Node0Says) {
        for connection in locked(&self.lines).values() {
            let _ = connection.notify(to_body(says));
        }
    }

    /// Whether any node is connected.
    pub fn has_nodes(&self) -> bool {
        !locked(&self.lines).is_empty()
    }
}

fn locked(lines: &Mutex<BTreeMap<Line, Connection>>) -> std::sync::MutexGuard<'_, BTreeMap<Line, Connection>> {
    lines.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is done with one connection.
fn greet(line: Line, hello: Hello, connection: &Connection, lines: &Lines, news: mpsc::Sender<Event>) -> Sink {
    let connection = connection.clone();
    let peer = connection.peer().to_owned();
    let refuse = |why: String| {
        connection.close(ControlError::Refused { peer: peer.clone(), why });
        Box::new(|_| {})
    };
    let card = match (hello.part, from_body(&hello.payload)) {
        (Part::Node, Ok(card)) => card,
        (Part::Node, Err(error)) => {
            return refuse(format!("its card cannot be read ({error}): is it another version?"));
        }
        (part, _) => return refuse(format!("{part:?} has no business at the nodes' door")),
    };
    // Whatever else is not heard: that it is gone is.
    let Ok(place) = news.clone().try_reserve_owned() else {
        return refuse("node 0 has more to hear than it can; it may be tried again".to_owned());
    };
    let mut place = Some(place);
    locked(lines).insert(line, connection.clone());
    let lines = Arc::clone(lines);
    let from = peer.rsplit_once(':').map_or(peer.as_str(), |(host, _)| host).to_owned();
    let tell = move |event: Event| {
        if news.try_send(event).is_err() {
            let why = "it tells more than node 0 can hear".to_owned();
            connection.close(ControlError::Refused { peer: connection.peer().to_owned(), why });
        }
    };
    tell(Event::Hello { line, incarnation: hello.incarnation, card, from });
    Box::new(move |inbound| match inbound {
        Inbound::Notice(message) => match from_body::<NodeSays>(&message.body) {
            Ok(says) => tell(Event::Says { line, says }),
            Err(error) => tracing::warn!(%error, %peer, "a node said something that cannot be read"),
        },
        Inbound::Request(..) => tracing::warn!(%peer, "a node asked where it should tell"),
        Inbound::Closed(why) => {
            locked(&lines).remove(&line);
            if let Some(place) = place.take() {
                place.send(Event::Gone { line, why: why.to_string() });
            }
        }
    })
}
