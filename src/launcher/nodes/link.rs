//! A node's way to node 0: connects, and connects again for as long as it lives.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::hub::{HANDSHAKE_TIMEOUT, identity, liveness};
use super::messages::{Node0Says, NodeCard, NodeSays};
use crate::control::{Connection, ControlError, Inbound, Sink, connect, connection, from_body, open, to_body};
use crate::security::Secret;

/// Pause between two tries to reach node 0.
const PAUSE: Duration = Duration::from_millis(500);

/// What node 0 says may wait here; it says little.
const NEWS_MAX: usize = 256;

/// What happens between this node and node 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    Says(Node0Says),
    /// The connection ended, or could not be made; the next try follows.
    Away {
        why: String,
    },
}

/// Tries until it is dropped.
pub struct Link {
    news: mpsc::Receiver<News>,
    current: Arc<Mutex<Option<Connection>>>,
    _driver: JoinSet<()>,
}

impl Link {
    /// Begins to look for node 0 at `address` (`host:port`).
    pub fn start(address: String, secret: &Secret, card: &NodeCard, lost_after: Duration) -> Self {
        let (sender, news) = mpsc::channel(NEWS_MAX);
        let current = Arc::new(Mutex::new(None));
        let slot = Arc::clone(&current);
        let name = format!("node {}", card.rank);
        // Drawn once: who connects again is the same launcher.
        let who = identity(secret, name, rand::random(), to_body(card).to_vec());
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            loop {
                let why = live(&address, &who, lost_after, &slot, &sender).await;
                *slot.lock().unwrap_or_else(PoisonError::into_inner) = None;
                if sender.send(News::Away { why: why.to_string() }).await.is_err() {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        });
        Self { news, current, _driver: driver }
    }

    pub async fn next(&mut self) -> News {
        match self.news.recv().await {
            Some(news) => news,
            None => std::future::pending().await,
        }
    }

    /// Tells node 0. False where it is away: what it must know is told when it is back.
    pub fn tell(&self, says: &NodeSays) -> bool {
        self.connection().is_some_and(|connection| connection.notify(to_body(says)).is_ok())
    }

    /// Ends this connection, on which node 0 has refused us; the next try follows.
    pub fn hang_up(&self, why: String) {
        if let Some(connection) = self.connection() {
            connection.close(ControlError::Refused { peer: connection.peer().to_owned(), why });
        }
    }

    /// Waits until the kernel has what was told, within a bound.
    pub async fn flushed(&self) {
        if let Some(connection) = self.connection() {
            let _ = tokio::time::timeout(HANDSHAKE_TIMEOUT, connection.flushed()).await;
        }
    }

    fn connection(&self) -> Option<Connection> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One connection, to its end.
async fn live(
    address: &str,
    who: &crate::control::Identity,
    lost_after: Duration,
    slot: &Mutex<Option<Connection>>,
    news: &mpsc::Sender<News>,
) -> ControlError {
    let opened = async {
        let mut stream = connect(address, HANDSHAKE_TIMEOUT).await?;
        let (_, buffer) = open(&mut stream, who, address).await?;
        Ok((stream, buffer))
    };
    let (stream, buffer) = match opened.await {
        Ok(opened) => opened,
        Err(error) => return error,
    };
    let (ended, mut end) = mpsc::channel(1);
    let heard = news.clone();
    let sink = |connection: &Connection| -> Sink {
        let connection = connection.clone();
        Box::new(move |inbound| match inbound {
            Inbound::Notice(message) => hear(&message.body, &heard, &connection),
            Inbound::Request(..) => {}
            Inbound::Closed(why) => _ = ended.try_send(why),
        })
    };
    let (handle, driver) = connection(stream, buffer, address.to_owned(), liveness(lost_after), sink);
    *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(handle);
    driver.await;
    let unknown = || ControlError::Closed { peer: address.to_owned(), why: "it ended".to_owned() };
    end.recv().await.unwrap_or_else(unknown)
}

fn hear(body: &Bytes, news: &mpsc::Sender<News>, connection: &Connection) {
    match from_body::<Node0Says>(body) {
        Ok(says) => {
            if news.try_send(News::Says(says)).is_err() {
                // Connected anew, it is told what matters again.
                let why = "it tells more than this node can hear".to_owned();
                connection.close(ControlError::Refused { peer: connection.peer().to_owned(), why });
            }
        }
        Err(error) => tracing::warn!(%error, "node 0 said something that cannot be read"),
    }
}
