//! The server side: accepts, authenticates, and hands connections on.
//!
//! A stranger costs one socket for at most the handshake's timeout, and strangers together at most
//! [`STRANGERS_MAX`] sockets: more wait in the kernel's backlog. What goes wrong with one connection is logged once and
//! touches no other.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::connection::{Connection, Liveness, Sink, connection};
use super::handshake::{Hello, Identity, accept};

/// Connections that may be shaking hands at once.
pub const STRANGERS_MAX: usize = 64;
/// Authenticated connections at once.
pub const CONNECTIONS_MAX: usize = 4096;

/// What is done with each authenticated connection: gets who it is and gives where its messages go, or why it is not
/// wanted.
pub type Welcome = Arc<dyn Fn(Hello, &Connection) -> Sink + Send + Sync>;

/// Accepts until the future is dropped; every connection ends with it.
pub async fn serve(listener: TcpListener, identity: Arc<Identity>, liveness: Liveness, welcome: Welcome) {
    let strangers = Arc::new(Semaphore::new(STRANGERS_MAX));
    let mut tasks = JoinSet::new();
    loop {
        let permit = Arc::clone(&strangers).acquire_owned().await.expect("this semaphore is never closed");
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        while tasks.try_join_next().is_some() {}
        if tasks.len() >= CONNECTIONS_MAX + STRANGERS_MAX {
            tracing::warn!(peer = %address, connections = tasks.len(), "control connection refused: too many");
            continue;
        }
        let (identity, welcome) = (Arc::clone(&identity), Arc::clone(&welcome));
        tasks.spawn(async move {
            let peer = address.to_string();
            let shaken = shake(stream, &identity, &peer).await;
            drop(permit);
            match shaken {
                Ok((stream, hello, buffer)) => {
                    connection(stream, buffer, peer, liveness, |connection| welcome(hello, connection)).1.await;
                }
                Err(error) => tracing::warn!(%error, "control connection refused"),
            }
        });
    }
}

async fn shake(
    mut stream: TcpStream,
    identity: &Identity,
    peer: &str,
) -> Result<(TcpStream, Hello, super::wire::FrameBuffer), super::ControlError> {
    // Messages are small and each is waited for.
    let _ = stream.set_nodelay(true);
    let (hello, buffer) = accept(&mut stream, identity, peer).await?;
    Ok((stream, hello, buffer))
}

/// Out of descriptors, say: to accept again at once would spin.
async fn pause_after(error: &io::Error) {
    tracing::warn!(%error, "accepting a control connection failed");
    tokio::time::sleep(Duration::from_millis(50)).await;
}
