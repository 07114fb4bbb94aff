//! Plain sockets: host memory anywhere. Every process listens on a data port of its own. A link is a few connections to the
//! peer's; both ends prove that they know the run's secret. A pull asks for runs and receives them into place; a push sends
//! them, and the peer writes only what it has granted. Bytes go from region to socket to region, with no copy in between.

mod client;
mod frame;
mod server;

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use self::client::Stream;
use self::frame::{REQUEST_BYTES_MAX, REQUEST_RUNS_MAX};
use self::server::Server;
use super::flight::Inflight;
use super::flight_queue::FlightQueue;
use super::grant_table::GrantTable;
use super::links::Links;
use super::threads::Threads;
use super::wire::{Acceptor, ExportId, Socket, greet};
use super::{
    CLOSE_WAIT_MAX, Completion, Direction, Export, Grant, Link, RunList, TransferRequest, TransferTicket, Transport,
    TransportError,
};
use crate::config::Path;
use crate::memory::Region;
use crate::security::Secret;

/// How long closing a link waits for a peer to answer for pushes, before it closes the connections under them.
const FAREWELL_MAX: Duration = Duration::from_millis(250);

/// How a process takes part in the path.
#[derive(Debug, Clone)]
pub struct TcpSetup {
    /// Where the data port listens. The kernel picks the number.
    pub bind: IpAddr,
    /// The host name or address under which peers reach it.
    pub advertise_host: String,
    /// Connections per link, at least one.
    pub streams: usize,
    /// Silence in the middle of a request after which a peer's connection is closed.
    pub stall_max: Duration,
}

#[derive(Debug, Serialize, Deserialize)]
struct Description {
    export: ExportId,
    host: String,
    port: u16,
    region_lens: Vec<u64>,
}

/// The `tcp` path of this process.
pub struct Tcp {
    regions: Arc<[Arc<Region>]>,
    lens: Arc<[u64]>,
    secret: Secret,
    streams: usize,
    export: Export,
    grants: Arc<GrantTable>,
    acceptor: Acceptor,
    links: Links<TcpLink>,
}

impl Tcp {
    /// Offers `regions` on a data port of its own, to peers that know `secret`.
    pub fn new(regions: &[Arc<Region>], secret: &Secret, setup: &TcpSetup) -> Result<Self, TransportError> {
        let regions: Arc<[Arc<Region>]> = regions.into();
        let lens: Arc<[u64]> = regions.iter().map(|region| region.len()).collect();
        let grants = Arc::new(GrantTable::default());
        let server = Server { regions: regions.clone(), grants: grants.clone(), stall_max: setup.stall_max };
        let acceptor = Acceptor::start("tcp", setup.bind, secret, Arc::new(server))?;
        let (export, host) = (acceptor.export(), setup.advertise_host.clone());
        let description = Description { export, host, port: acceptor.port(), region_lens: lens.to_vec() };
        Ok(Self {
            regions,
            lens,
            secret: secret.clone(),
            streams: setup.streams.max(1),
            export: Export::encode(&description),
            grants,
            acceptor,
            links: Links::default(),
        })
    }
}

impl Transport for Tcp {
    fn path(&self) -> Path {
        Path::Tcp
    }

    fn export(&self) -> Export {
        self.export.clone()
    }

    fn connect(&self, peer: &Export, deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        let description: Description = peer.decode(Path::Tcp)?;
        let link = TcpLink::connect(self, description, deadline)?;
        self.links.keep(&link);
        Ok(link)
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        runs.validate_destinations(&self.lens)?;
        Ok(self.grants.grant(runs))
    }

    fn close(&self) {
        self.links.close();
        self.acceptor.close();
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        self.close();
    }
}

struct TcpLink {
    our_lens: Arc<[u64]>,
    their_lens: Vec<u64>,
    inflight: Arc<Inflight>,
    queue: Arc<FlightQueue<()>>,
    streams: Vec<Arc<Stream>>,
    threads: Threads,
}

impl TcpLink {
    fn connect(transport: &Tcp, peer: Description, deadline: Instant) -> Result<Arc<Self>, TransportError> {
        let name = format!("{}:{}", peer.host, peer.port);
        let addresses: Vec<SocketAddr> = (peer.host.as_str(), peer.port)
            .to_socket_addrs()
            .map_err(|error| TransportError::io("look up the address", &name, error))?
            .collect();
        let inflight = Inflight::new(name.clone());
        let queue = Arc::new(FlightQueue::new());
        let connect = |_| {
            let socket = Socket::connect(&addresses, &name, deadline)?;
            greet(&socket, peer.export, &transport.secret, deadline)?;
            let (regions, queue, inflight) = (transport.regions.clone(), queue.clone(), inflight.clone());
            Ok(Arc::new(Stream { socket, regions, queue, inflight, broken: AtomicBool::new(false) }))
        };
        let streams = (0..transport.streams).map(connect).collect::<Result<Vec<_>, TransportError>>()?;
        let our_lens = transport.lens.clone();
        let their_lens = peer.region_lens;
        let link = Arc::new(Self { our_lens, their_lens, inflight, queue, streams, threads: Threads::default() });
        for (index, stream) in link.streams.iter().enumerate() {
            // The thread holds the stream and what the link shares with it, not the link: which can then be dropped.
            let (stream, closing) = (stream.clone(), link.closing());
            let run = move || {
                stream.run();
                closing.after_stream();
            };
            link.threads
                .spawn(format!("pdlink-tcp-{index}"), run)
                .map_err(|error| TransportError::io("start a thread", &name, error))?;
        }
        Ok(link)
    }

    fn closing(&self) -> Closing {
        let streams = self.streams.iter().map(Arc::downgrade).collect();
        Closing { inflight: self.inflight.clone(), queue: self.queue.clone(), streams }
    }

    fn closed(&self) -> TransportError {
        TransportError::LinkClosed { peer: self.inflight.peer().to_owned() }
    }
}

/// What is left to do when a connection has ended: with the last one nobody carries what waits, so it ends too.
struct Closing {
    inflight: Arc<Inflight>,
    queue: Arc<FlightQueue<()>>,
    streams: Vec<Weak<Stream>>,
}

impl Closing {
    fn after_stream(&self) {
        let alive =
            |stream: &Weak<Stream>| stream.upgrade().is_some_and(|stream| !stream.broken.load(Ordering::SeqCst));
        if self.streams.iter().any(alive) {
            return;
        }
        let broken = TransportError::LinkClosed { peer: self.inflight.peer().to_owned() };
        self.inflight.close(broken.clone());
        for flight in self.queue.close() {
            flight.end(broken.clone());
        }
    }
}

impl Link for TcpLink {
    fn path(&self) -> Path {
        Path::Tcp
    }

    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket {
        let (ticket, flight) = self.inflight.admit(request, done, |request| {
            let sums = match request.direction {
                Direction::Pull => request.runs.validate(&self.their_lens, &self.our_lens)?,
                Direction::Push => request.runs.validate(&self.our_lens, &self.their_lens)?,
            };
            Ok((sums.totals, request.runs.pieces(&sums, REQUEST_BYTES_MAX, REQUEST_RUNS_MAX)))
        });
        if let Some(Err(refused)) = flight.map(|flight| self.queue.push(flight, ())) {
            refused.end(self.closed());
        }
        ticket
    }

    fn cancel(&self, ticket: TransferTicket) {
        if let Some(flight) = self.inflight.get(ticket) {
            flight.end(TransportError::Cancelled);
        }
    }

    fn usable(&self) -> bool {
        // All of them: a transfer is spread over every connection, so one that is broken would fail it. What has ended is
        // seen on an idle link before the next transfer finds out.
        let idle = self.inflight.is_empty();
        let sound = |stream: &Arc<Stream>| !(stream.broken.load(Ordering::SeqCst) || idle && stream.socket.is_broken());
        !self.inflight.is_closed() && self.streams.iter().all(sound)
    }

    fn peer_gone(&self) -> bool {
        false
    }

    fn close(&self) {
        for flight in self.inflight.close(self.closed()) {
            flight.end(TransportError::Cancelled);
        }
        // Pushes wait for the peer's word, which is what fences them; but not for long.
        self.inflight.wait_empty(FAREWELL_MAX);
        for flight in self.queue.close() {
            flight.end(TransportError::Cancelled);
        }
        self.streams.iter().for_each(|stream| stream.socket.shutdown());
        self.inflight.wait_empty(CLOSE_WAIT_MAX);
        self.threads.join();
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        self.close();
    }
}
