//! The least that any router of two legs does: takes a request whole, sends it to both workers in turn, and passes the
//! second answer on. It looks at nothing but lengths, retries nothing and notes nothing, so its processor time is mostly
//! the system's own, and shows on the machine of the moment what is left for a proxy to save.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::load::Client;
use super::mock::content_length;

const READ_BYTES: usize = 64 << 10;

/// Serves on a free port of the loopback until its process is ended. `ready` is called with the address.
pub async fn serve(legs: &[SocketAddr], ready: impl FnOnce(SocketAddr)) -> std::io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    ready(listener.local_addr()?);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, legs) = (accepted?.0, legs.to_vec());
                // A connection that breaks is the other side's business.
                connections.spawn(async move { drop(relay(stream, &legs).await) });
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn relay(mut stream: TcpStream, legs: &[SocketAddr]) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut workers: Vec<Client> = legs.iter().map(|&leg| Client::new(leg)).collect();
    let mut request = Vec::new();
    loop {
        request.clear();
        loop {
            request.reserve(READ_BYTES);
            if stream.read_buf(&mut request).await? == 0 {
                return Ok(());
            }
            let Some(head) = memchr::memmem::find(&request, b"\r\n\r\n") else { continue };
            let whole = head + 4 + content_length(&request[..head]);
            if request.len() >= whole {
                break;
            }
            request.reserve(whole - request.len());
        }
        for worker in &mut workers {
            worker.ask(&request).await?;
        }
        let Some(last) = workers.last() else { return Ok(()) };
        stream.write_all(last.answer()).await?;
    }
}
