//! The side that owns the memory: serves reads of exported regions, and writes into granted ranges.
//!
//! A connection that breaks the protocol, proves nothing, or stalls in the middle of a request is closed; no other notices.
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::frame::{
    ANSWER_BYTES, Answer, Operation, REQUEST_HEADER_BYTES, REQUEST_RUNS_MAX, RUN_BYTES, Request, decode_run,
};
use crate::memory::{Region, to_u64};
use crate::transport::TransportError;
use crate::transport::grant_table::GrantTable;
use crate::transport::wire::{Serve, Socket, Span};

/// What every connection needs.
pub(super) struct Server {
    pub(super) regions: Arc<[Arc<Region>]>,
    pub(super) grants: Arc<GrantTable>,
    /// Silence in the middle of a request after which its connection is closed.
    pub(super) stall_max: Duration,
}

impl Serve for Server {
    fn serve(&self, socket: &Socket, closing: &AtomicBool) -> TransportError {
        let connection = Connection { server: self, socket, closing };
        loop {
            if let Err(error) = connection.serve_one() {
                return error;
            }
        }
    }
}

/// One connection being served.
struct Connection<'a> {
    server: &'a Server,
    socket: &'a Socket,
    closing: &'a AtomicBool,
}

impl Connection<'_> {
    fn serve_one(&self) -> Result<(), TransportError> {
        let socket = self.socket;
        let protocol = |what| TransportError::Protocol { peer: socket.peer().to_owned(), what };
        let mut header = [0; REQUEST_HEADER_BYTES];
        // Between requests a peer may be silent for as long as it likes.
        socket.read_exact(&mut header[..1], &|_| Ok(()))?;
        let patience = |stalled: Duration| self.stalled(stalled);
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
            Operation::Read => self.read(request, runs),
            Operation::Write(_) => self.write(request, runs),
        }
    }

    fn read(&self, request: Request, runs: &[[u8; RUN_BYTES]]) -> Result<(), TransportError> {
        let patience = |stalled: Duration| self.stalled(stalled);
        match self.span(request.region, runs) {
            Ok(mut span) => {
                self.socket.write_all(&Answer::Done.encode(), &patience)?;
                self.socket.send(&mut span, &patience)
            }
            Err(refusal) => self.socket.write_all(&refusal.encode(), &patience),
        }
    }

    /// KV-7: every single write happens under the grant, and none once it is revoked.
    fn write(&self, request: Request, runs: &[[u8; RUN_BYTES]]) -> Result<(), TransportError> {
        let patience = |stalled: Duration| self.stalled(stalled);
        let answer = match self.granted_span(&request, runs) {
            Ok((mut span, granted)) => {
                let written = self.socket.receive(&mut span, &patience, |write| granted.unless_revoked(write))?;
                if written { Answer::Done } else { refused(&request, runs) }
            }
            Err(refusal) => {
                self.socket.discard(request.bytes, &patience)?;
                refusal
            }
        };
        let answer: [u8; ANSWER_BYTES] = answer.encode();
        self.socket.write_all(&answer, &patience)
    }

    fn granted_span<'a>(
        &'a self,
        request: &Request,
        runs: &[[u8; RUN_BYTES]],
    ) -> Result<(Span<'a>, Arc<crate::transport::grant_table::Granted>), Answer> {
        let span = self.span(request.region, runs)?;
        let Operation::Write(token) = request.operation else { return Err(refused(request, runs)) };
        let granted = self.server.grants.find(token).ok_or_else(|| refused(request, runs))?;
        for (offset, len) in runs.iter().map(decode_run) {
            let allowed = granted.check(request.region, offset, len);
            allowed.map_err(|_| Answer::NotGranted { region: request.region, offset, len })?;
        }
        Ok((span, granted))
    }

    /// The bytes that a peer names, once all of them are known to be ours to give.
    fn span(&self, region: u16, runs: &[[u8; RUN_BYTES]]) -> Result<Span<'_>, Answer> {
        let regions = u32::try_from(self.server.regions.len()).unwrap_or(u32::MAX);
        let memory = self.server.regions.get(usize::from(region)).ok_or(Answer::UnknownRegion { region, regions })?;
        let mut span = Span::default();
        for (offset, len) in runs.iter().map(decode_run) {
            let within = span.push(memory, offset, len);
            within.map_err(|_| Answer::OutOfRange { region, offset, len, region_len: memory.len() })?;
        }
        Ok(span)
    }

    fn stalled(&self, stalled: Duration) -> Result<(), TransportError> {
        if stalled <= self.server.stall_max && !self.closing.load(Ordering::SeqCst) {
            return Ok(());
        }
        let what = format!("it stopped in the middle of a request for {} ms", stalled.as_millis());
        Err(TransportError::Protocol { peer: self.socket.peer().to_owned(), what })
    }
}

fn refused(request: &Request, runs: &[[u8; RUN_BYTES]]) -> Answer {
    let (offset, len) = runs.first().map_or((0, 0), decode_run);
    debug_assert!(to_u64(runs.len()) == u64::from(request.runs));
    Answer::NotGranted { region: request.region, offset, len }
}
