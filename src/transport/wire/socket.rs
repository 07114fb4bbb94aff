//! A socket on which every wait is bounded by whoever waits.
#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{SockRef, TcpKeepalive};

use super::vectored::Span;
use crate::transport::TransportError;

/// How often a thread that waits for a socket looks whether it should go on waiting.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 25_000_000 };

/// Asked before every wait, with how long nothing has moved. An error ends the operation, and the connection with it.
pub(in crate::transport) type Patience<'a> = &'a dyn Fn(Duration) -> Result<(), TransportError>;

pub(in crate::transport) struct Socket {
    stream: TcpStream,
    peer: String,
}

impl Socket {
    pub(in crate::transport) fn new(stream: TcpStream, peer: String) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        // An idle connection notices a host that vanished without a word.
        let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(10)).with_interval(Duration::from_secs(5));
        SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        Ok(Self { stream, peer })
    }

    /// Connects to the first of `addresses` that answers, before `deadline`.
    pub(in crate::transport) fn connect(
        addresses: &[SocketAddr],
        peer: &str,
        deadline: Instant,
    ) -> Result<Self, TransportError> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                last = io::ErrorKind::TimedOut.into();
                break;
            }
            match TcpStream::connect_timeout(address, left).and_then(|stream| Self::new(stream, peer.to_owned())) {
                Ok(socket) => return Ok(socket),
                Err(error) => last = error,
            }
        }
        Err(TransportError::io("connect", peer, last))
    }

    pub(in crate::transport) fn peer(&self) -> &str {
        &self.peer
    }

    /// Ends both directions: wakes whoever waits, on both sides.
    pub(in crate::transport) fn shutdown(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Whether an idle connection was ended by the peer, or has bytes that nobody asked for.
    pub(in crate::transport) fn is_broken(&self) -> bool {
        self.readable()
    }

    /// Whether something can be read now: bytes, or that there will be none.
    pub(in crate::transport) fn readable(&self) -> bool {
        self.shows(PollFlags::IN | PollFlags::RDHUP)
    }

    /// Whether the peer has closed, or the connection broke.
    pub(in crate::transport) fn hung_up(&self) -> bool {
        self.shows(PollFlags::RDHUP)
    }

    fn shows(&self, wanted: PollFlags) -> bool {
        let mut polled = [PollFd::new(&self.stream, wanted)];
        poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map_or(true, |ready| ready > 0)
    }

    pub(in crate::transport) fn read_exact(
        &self,
        mut bytes: &mut [u8],
        patience: Patience,
    ) -> Result<(), TransportError> {
        self.until_done("read", PollFlags::IN, patience, || {
            match (&self.stream).read(bytes) {
                Ok(0) if !bytes.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => bytes = &mut std::mem::take(&mut bytes)[read..],
                Err(error) => return Err(error),
            }
            Ok(bytes.is_empty())
        })
    }

    pub(in crate::transport) fn write_all(&self, mut bytes: &[u8], patience: Patience) -> Result<(), TransportError> {
        self.until_done("write", PollFlags::OUT, patience, || {
            let written = (&self.stream).write(bytes)?;
            bytes = &bytes[written..];
            Ok(bytes.is_empty())
        })
    }

    pub(in crate::transport) fn send(&self, span: &mut Span, patience: Patience) -> Result<(), TransportError> {
        if span.left() == 0 {
            return Ok(());
        }
        self.until_done("send", PollFlags::OUT, patience, || {
            span.send(&self.stream)?;
            Ok(span.left() == 0)
        })
    }

    /// Receives all of `span`. Every write into its regions goes through `gate`, which must run it or say that it may not
    /// happen any more; what then still arrives is thrown away. Says whether all was written.
    pub(in crate::transport) fn receive(
        &self,
        span: &mut Span,
        patience: Patience,
        gate: impl Fn(&mut dyn FnMut() -> io::Result<()>) -> Option<io::Result<()>>,
    ) -> Result<bool, TransportError> {
        let mut shut = false;
        if span.left() > 0 {
            self.until_done("receive", PollFlags::IN, patience, || {
                match gate(&mut || span.receive(&self.stream)) {
                    Some(received) => received?,
                    None => shut = true,
                }
                Ok(shut || span.left() == 0)
            })?;
        }
        if shut {
            self.discard(span.left(), patience)?;
        }
        Ok(!shut)
    }

    /// Reads `left` bytes and forgets them: keeps the stream in step.
    pub(in crate::transport) fn discard(&self, mut left: u64, patience: Patience) -> Result<(), TransportError> {
        let mut scratch = [0; 16 * 1024];
        while left > 0 {
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(scratch.len());
            self.read_exact(&mut scratch[..len], patience)?;
            left -= len as u64;
        }
        Ok(())
    }

    /// Repeats `step` until it says that it is done, waiting for the socket where it would block.
    fn until_done(
        &self,
        attempt: &'static str,
        ready: PollFlags,
        patience: Patience,
        mut step: impl FnMut() -> io::Result<bool>,
    ) -> Result<(), TransportError> {
        let mut moved_at = None;
        loop {
            match step() {
                Ok(true) => return Ok(()),
                Ok(false) => moved_at = None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let now = Instant::now();
                    patience(now.saturating_duration_since(*moved_at.get_or_insert(now)))?;
                    self.wait(ready);
                }
                Err(error) => return Err(TransportError::io(attempt, &self.peer, error)),
            }
        }
    }

    /// Waits for a tick at most. Errors show at the next attempt to move bytes.
    fn wait(&self, ready: PollFlags) {
        let mut polled = [PollFd::new(&self.stream, ready)];
        let _ = poll(&mut polled, Some(&TICK));
    }
}
