//! The threads that serve: one acceptor, and lanes that share nothing on a request's way.
//!
//! Each lane is one thread with a runtime of its own, its own client connections and its own connections to workers, so
//! that no wake-up crosses cores. The acceptor gives each new connection to the lane that has the fewest.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioTimer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use super::body::ProxyBody;
use super::hot;
use super::link::{ClientIo, ClientLink};
use super::routes::{Peer, Unread};
use super::shared::Lane;
use crate::openai::ApiError;

/// Longest head of a request; a longer one is answered 431.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// What is read at once of a body, and what is buffered for a client that is slow to take its answer.
const BUFFER_BYTES_MAX: usize = 256 << 10;
/// Connections handed to a lane that it has not picked up yet.
pub(crate) const ARRIVALS_MAX: usize = 1024;
/// How long the acceptor rests when the process is out of sockets.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// What a listener's connections may ask for.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) router: Router,
    /// Whether the generation routes are served too, before the router.
    pub(crate) generates: bool,
}

/// A connection on its way to its lane.
pub(crate) type Arrival = (std::net::TcpStream, SocketAddr);

/// The acceptor's end of a lane.
#[derive(Debug)]
pub(crate) struct Door {
    pub(crate) arrivals: mpsc::Sender<Arrival>,
    pub(crate) connections: Arc<AtomicUsize>,
}

/// When a lane should stop taking requests, and when it must stop altogether.
#[derive(Debug, Clone)]
pub(crate) struct Stop {
    pub(crate) drain: CancellationToken,
    pub(crate) kill: CancellationToken,
}

/// Accepts until `stop.drain`, spreading connections evenly.
pub(crate) async fn accept(listener: TcpListener, doors: Vec<Door>, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted.and_then(|(stream, peer)| Ok((prepare(stream)?, peer))) {
            Ok(arrival) => {
                let Some(door) = doors.iter().min_by_key(|door| door.connections.load(Ordering::Relaxed)) else {
                    return;
                };
                door.connections.fetch_add(1, Ordering::Relaxed);
                if door.arrivals.send(arrival).await.is_err() {
                    return;
                }
            }
            Err(error) if is_the_clients(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; raise the limit on open files if it is reached");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn prepare(stream: TcpStream) -> io::Result<std::net::TcpStream> {
    // Every write is a whole part of an answer: waiting to fill a segment would only add delay.
    stream.set_nodelay(true)?;
    stream.into_std()
}

/// A client that was gone before it was accepted.
fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, InvalidInput, NotConnected};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | InvalidInput | NotConnected)
}

/// Serves the connections of one lane until the acceptor is gone and they have ended, or `stop.kill`.
pub(crate) async fn serve(
    lane: Arc<Lane>,
    service: Service,
    mut arrivals: mpsc::Receiver<Arrival>,
    connections: Arc<AtomicUsize>,
    stop: Stop,
) {
    let tracker = TaskTracker::new();
    let mut sweep = interval(SWEEP_INTERVAL);
    sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let all = async {
        loop {
            tokio::select! {
                arrival = arrivals.recv() => {
                    let Some((stream, peer)) = arrival else { break };
                    let connection = connection(Arc::clone(&lane), service.clone(), stream, peer, stop.drain.clone());
                    let count = Arc::clone(&connections);
                    tracker.spawn(async move {
                        let _leaves = Leaves(count);
                        connection.await;
                    });
                }
                _ = sweep.tick() => lane.sockets.sweep(Instant::now()),
            }
        }
        tracker.close();
        tracker.wait().await;
    };
    tokio::select! {
        () = all => {}
        () = stop.kill.cancelled() => {}
    }
}

/// Counts a connection out of its lane, however it ends.
struct Leaves(Arc<AtomicUsize>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn connection(
    lane: Arc<Lane>,
    service: Service,
    stream: std::net::TcpStream,
    peer: SocketAddr,
    drain: CancellationToken,
) {
    let Ok(stream) = TcpStream::from_std(stream) else { return };
    let link = Arc::new(ClientLink::default());
    let limits = &lane.shared.limits;
    let io = ClientIo::new(stream, Arc::clone(&link), limits.idle);
    let header_timeout = limits.body;
    let answer = service_fn(|request: Request<Incoming>| {
        let (lane, link, service) = (&lane, &link, &service);
        async move { Ok::<_, std::convert::Infallible>(respond(lane, link, service, peer, request).await) }
    });
    let mut http = http1::Builder::new();
    // Answers are small, or come in small parts: copying them behind their head is cheaper than a vectored write.
    http.writev(false)
        .timer(TokioTimer::new())
        .header_read_timeout(header_timeout)
        .max_header_size(HEAD_BYTES_MAX)
        .max_buf_size(BUFFER_BYTES_MAX);
    let mut serving = pin!(http.serve_connection(io, answer));
    let ended = tokio::select! {
        biased;
        ended = serving.as_mut() => ended,
        () = drain.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, %error, "a client's connection ended early");
    }
}

async fn respond(
    lane: &Arc<Lane>,
    link: &Arc<ClientLink>,
    service: &Service,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<ProxyBody> {
    match hot::route_of(request.uri().path()).filter(|_| service.generates) {
        Some(route) => {
            let (parts, incoming) = request.into_parts();
            hot::generate(lane, link, route, parts, incoming).await
        }
        // Boxed: the rare routes must not make every connection's future as large as theirs.
        None => Box::pin(routed(link, &service.router, peer, request)).await,
    }
}

async fn routed(
    link: &Arc<ClientLink>,
    router: &Router,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> Response<ProxyBody> {
    let (mut parts, incoming) = request.into_parts();
    parts.extensions.insert(Peer(peer));
    parts.extensions.insert(Arc::clone(link));
    parts.extensions.insert(Unread::new(incoming));
    match router.clone().oneshot(Request::from_parts(parts, Body::empty())).await {
        Ok(response) => response.map(ProxyBody::Routed),
        Err(never) => {
            let never: std::convert::Infallible = never;
            ApiError::internal(never.to_string()).to_http()
        }
    }
}
