//! The side that owns the memory: serves reads of exported regions, and writes into granted ranges.
//!
//! A connection that breaks the protocol, proves nothing, or stalls in the middle of a request is closed; no other notices.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::frame::{
    ANSWER_BYTES, Answer, Operation, REQUEST_HEADER_BYTES, REQUEST_RUNS_MAX, RUN_BYTES, Request, decode_run,
};
use super::handshake::{ExportId, welcome};
use super::socket::Socket;
use super::vectored::Span;
use crate::memory::{Region, to_u64};
use crate::security::Secret;
use crate::transport::TransportError;
use crate::transport::flight::locked;
use crate::transport::grant_table::GrantTable;
use crate::transport::threads::Threads;

/// Most connections at once; another is closed as soon as it is accepted. Each is a thread that mostly sleeps.
const CONNECTIONS_MAX: usize = 256;
/// How long a stranger may take to prove that it is none.
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);

/// What every connection needs.
pub(super) struct Server {
    pub(super) export: ExportId,
    pub(super) secret: Secret,
    pub(super) regions: Arc<[Arc<Region>]>,
    pub(super) grants: Arc<GrantTable>,
    /// Silence in the middle of a request after which its connection is closed.
    pub(super) stall_max: Duration,
    pub(super) open: Mutex<HashMap<u64, Arc<Socket>>>,
    pub(super) closing: AtomicBool,
}

impl Server {
    /// Accepts until the listener is shut down.
    pub(super) fn accept(self: &Arc<Self>, listener: &TcpListener, threads: &Threads) {
        for number in 0.. {
            match listener.accept() {
                _ if self.closing.load(Ordering::SeqCst) => return,
                Ok((stream, address)) => {
                    let socket = Socket::new(stream, address.to_string()).map(Arc::new);
                    let started = socket.and_then(|socket| self.start(number, &socket, address, threads));
                    if let Err(error) = started {
                        tracing::debug!(peer = %address, %error, "data connection refused");
                    }
                }
                // Out of descriptors, or the peer is gone already: nothing that waiting a little would not mend.
                Err(error) => {
                    tracing::debug!(%error, "accepting a data connection failed");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    fn start(
        self: &Arc<Self>,
        number: u64,
        socket: &Arc<Socket>,
        address: SocketAddr,
        threads: &Threads,
    ) -> io::Result<()> {
        let mut open = locked(&self.open);
        if open.len() >= CONNECTIONS_MAX {
            return Err(io::Error::other(format!("{CONNECTIONS_MAX} connections are open")));
        }
        // Looked at under the lock: whoever closes either finds the socket in the table or has been seen here.
        if self.closing.load(Ordering::SeqCst) {
            return Err(io::Error::other("closing"));
        }
        let (server, served) = (self.clone(), socket.clone());
        threads.spawn(format!("pdlink-tcp-serve-{number}"), move || {
            let ended = server.serve(&served);
            served.shutdown();
            locked(&server.open).remove(&number);
            tracing::debug!(peer = %address, %ended, "data connection ended");
        })?;
        open.insert(number, socket.clone());
        Ok(())
    }

    /// Serves one connection to its end, and says why it ended.
    fn serve(&self, socket: &Socket) -> TransportError {
        if let Err(error) = welcome(socket, self.export, &self.secret, Instant::now() + HANDSHAKE_MAX) {
            return error;
        }
        loop {
            if let Err(error) = self.serve_one(socket) {
                return error;
            }
        }
    }

    fn serve_one(&self, socket: &Socket) -> Result<(), TransportError> {
        let protocol = |what| TransportError::Protocol { peer: socket.peer().to_owned(), what };
        let mut header = [0; REQUEST_HEADER_BYTES];
        // Between requests a peer may be silent for as long as it likes.
        socket.read_exact(&mut header[..1], &|_| Ok(()))?;
        let patience = |stalled: Duration| self.stalled(socket, stalled);
        socket.read_exact(&mut header[1..], &patience)?;
        let request = Request::decode(&header).map_err(protocol)?;

        let mut list = [0; REQUEST_RUNS_MAX * RUN_BYTES];
        let runs = usize::try_from(request.runs).expect("bounded by decode");
        let list = &mut list[..runs * RUN_BYTES];
        socket.read_exact(list, &patience)?;
        let runs = list.as_chunks::<RUN_BYTES>().0;
        let bytes = runs.iter().try_fold(0_u64, |sum, run| sum.checked_add(decode_run(run).1));
        if bytes != Some(request.bytes) {
            return Err(protocol(format!("runs of {bytes:?} bytes in a request of {}", request.bytes)));
        }
        match request.operation {
            Operation::Read => self.read(socket, request, runs),
            Operation::Write(_) => self.write(socket, request, runs),
        }
    }

    fn read(&self, socket: &Socket, request: Request, runs: &[[u8; RUN_BYTES]]) -> Result<(), TransportError> {
        let patience = |stalled: Duration| self.stalled(socket, stalled);
        match self.span(request.region, runs) {
            Ok(mut span) => {
                socket.write_all(&Answer::Done.encode(), &patience)?;
                socket.send(&mut span, &patience)
            }
            Err(refusal) => socket.write_all(&refusal.encode(), &patience),
        }
    }

    /// KV-7: every single write happens under the grant, and none once it is revoked.
    fn write(&self, socket: &Socket, request: Request, runs: &[[u8; RUN_BYTES]]) -> Result<(), TransportError> {
        let patience = |stalled: Duration| self.stalled(socket, stalled);
        let answer = match self.granted_span(&request, runs) {
            Ok((mut span, granted)) => {
                let written = socket.receive(&mut span, &patience, |write| granted.unless_revoked(write))?;
                if written { Answer::Done } else { refused(&request, runs) }
            }
            Err(refusal) => {
                socket.discard(request.bytes, &patience)?;
                refusal
            }
        };
        let answer: [u8; ANSWER_BYTES] = answer.encode();
        socket.write_all(&answer, &patience)
    }

    fn granted_span<'a>(
        &'a self,
        request: &Request,
        runs: &[[u8; RUN_BYTES]],
    ) -> Result<(Span<'a>, Arc<crate::transport::grant_table::Granted>), Answer> {
        let span = self.span(request.region, runs)?;
        let Operation::Write(token) = request.operation else { return Err(refused(request, runs)) };
        let granted = self.grants.find(token).ok_or_else(|| refused(request, runs))?;
        for (offset, len) in runs.iter().map(decode_run) {
            let allowed = granted.check(request.region, offset, len);
            allowed.map_err(|_| Answer::NotGranted { region: request.region, offset, len })?;
        }
        Ok((span, granted))
    }

    /// The bytes that a peer names, once all of them are known to be ours to give.
    fn span(&self, region: u16, runs: &[[u8; RUN_BYTES]]) -> Result<Span<'_>, Answer> {
        let regions = u32::try_from(self.regions.len()).unwrap_or(u32::MAX);
        let memory = self.regions.get(usize::from(region)).ok_or(Answer::UnknownRegion { region, regions })?;
        let mut span = Span::default();
        for (offset, len) in runs.iter().map(decode_run) {
            let within = span.push(memory, offset, len);
            within.map_err(|_| Answer::OutOfRange { region, offset, len, region_len: memory.len() })?;
        }
        Ok(span)
    }

    fn stalled(&self, socket: &Socket, stalled: Duration) -> Result<(), TransportError> {
        if stalled <= self.stall_max && !self.closing.load(Ordering::SeqCst) {
            return Ok(());
        }
        let what = format!("it stopped in the middle of a request for {} ms", stalled.as_millis());
        Err(TransportError::Protocol { peer: socket.peer().to_owned(), what })
    }

    /// Wakes every connection for its end.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        locked(&self.open).values().for_each(|socket| socket.shutdown());
    }
}

fn refused(request: &Request, runs: &[[u8; RUN_BYTES]]) -> Answer {
    let (offset, len) = runs.first().map_or((0, 0), decode_run);
    debug_assert!(to_u64(runs.len()) == u64::from(request.runs));
    Answer::NotGranted { region: request.region, offset, len }
}
