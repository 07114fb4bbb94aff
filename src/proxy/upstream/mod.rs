//! The client side: one HTTP/1.1 exchange with a worker, driven inline by the request's own task.
//!
//! A pooled connection is a socket and nothing else: no task owns it, no channel leads to it. The request that holds it
//! writes its head and the slices of its body in one vectored write and reads the answer where it runs, so an exchange
//! costs its system calls and little more. Dropping an exchange closes its socket, which is how a worker learns that
//! nobody waits for its answer any more.

mod body;
mod head;
mod sockets;

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

pub(crate) use body::BodyReader;
pub(crate) use head::{Framing, Head, write_headers};
pub(crate) use sockets::Sockets;

/// Bodies up to this size are copied behind the head and written as one buffer: cheaper than a vectored write.
const FLATTEN_BYTES_MAX: usize = 8 << 10;
/// First read of an answer, and the growth limit of later ones.
const READ_BYTES: usize = 4 << 10;
const READ_BYTES_MAX: usize = 64 << 10;

/// Why an exchange with a worker failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UpstreamError {
    #[error("cannot connect to {address}: {source}")]
    Connect { address: String, source: io::Error },
    #[error("{address} did not accept a connection within {after:?}")]
    ConnectTimeout { address: String, after: Duration },
    #[error("cannot connect to {address}: this server is out of sockets ({source}); raise its limit on open files")]
    OutOfSockets { address: String, source: io::Error },
    #[error("sending the request failed: {0}")]
    Send(io::Error),
    #[error("the worker closed the connection before it answered")]
    NoAnswer,
    #[error("reading the answer failed: {0}")]
    Receive(io::Error),
    #[error("the answer is not HTTP/1.1: {0}")]
    BadHead(&'static str),
    #[error("the answer's body ended early")]
    Truncated,
    #[error("the answer's body is longer than {bytes_max} bytes")]
    TooLong { bytes_max: usize },
    #[error("no {what} within {after:?}")]
    Timeout { what: &'static str, after: Duration },
}

impl UpstreamError {
    /// A connection that the worker had closed while it lay idle: worth one try on a new one, and nobody's fault.
    fn is_stale(&self) -> bool {
        matches!(self, Self::NoAnswer | Self::Send(_))
            || matches!(self, Self::Receive(error) if error.kind() == io::ErrorKind::ConnectionReset)
    }
}

/// A point in time and how long the wait for it was meant to be, for the message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    pub(crate) at: Instant,
    pub(crate) after: Duration,
}

impl Deadline {
    pub(crate) fn after(now: Instant, after: Duration) -> Self {
        Self { at: now + after, after }
    }

    /// The earlier of the two.
    pub(crate) fn or(self, other: Self) -> Self {
        if other.at < self.at { other } else { self }
    }

    pub(crate) async fn bound<T>(
        self,
        what: &'static str,
        wait: impl Future<Output = Result<T, UpstreamError>>,
    ) -> Result<T, UpstreamError> {
        let mut wait = pin!(wait);
        // Often it is there already; then no timer is needed.
        if let Poll::Ready(done) = poll_fn(|cx| Poll::Ready(wait.as_mut().poll(cx))).await {
            return done;
        }
        match timeout_at(self.at, wait).await {
            Ok(done) => done,
            Err(_) => Err(UpstreamError::Timeout { what, after: self.after }),
        }
    }
}

/// A connection to a worker, and what was read from it but not used yet.
#[derive(Debug)]
pub(crate) struct Conn {
    stream: TcpStream,
    buffer: BytesMut,
}

impl Conn {
    fn new(stream: TcpStream) -> Self {
        Self { stream, buffer: BytesMut::new() }
    }

    /// Whether the peer has closed it, or said something that nobody asked for. Costs no system call: the reactor has
    /// noted it.
    fn is_spent(&mut self) -> bool {
        let mut probe = [0u8; 1];
        !matches!(self.stream.try_read(&mut probe), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Writes the head and the body. Returns early if the worker answers before it has read everything.
    async fn send(&mut self, head: &mut Vec<u8>, body: &[&[u8]]) -> Result<Sent, UpstreamError> {
        let bytes: usize = body.iter().map(|piece| piece.len()).sum();
        if bytes <= FLATTEN_BYTES_MAX {
            for piece in body {
                head.extend_from_slice(piece);
            }
            return self.write_all(&mut [IoSlice::new(head)]).await;
        }
        let mut slices = Vec::with_capacity(body.len() + 1);
        slices.push(IoSlice::new(head));
        slices.extend(body.iter().map(|piece| IoSlice::new(piece)));
        self.write_all(&mut slices).await
    }

    async fn write_all(&mut self, mut slices: &mut [IoSlice<'_>]) -> Result<Sent, UpstreamError> {
        while !slices.is_empty() {
            let written = poll_fn(|cx| match self.poll_write(cx, slices) {
                Poll::Ready(written) => Poll::Ready(written.map(Some)),
                // A worker may refuse a long body before it has read it. Waiting for it to read on would be for ever.
                Poll::Pending => self.stream.poll_read_ready(cx).map_ok(|()| None),
            });
            match written.await {
                Ok(Some(0)) => return Err(UpstreamError::Send(io::ErrorKind::WriteZero.into())),
                Ok(Some(bytes)) => IoSlice::advance_slices(&mut slices, bytes),
                Ok(None) => return Ok(Sent::InPart),
                // The answer may have come before the connection went: then it is what the client should see.
                Err(error) if is_gone(&error) => return Ok(Sent::InPart),
                Err(error) => return Err(UpstreamError::Send(error)),
            }
        }
        Ok(Sent::Whole)
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let stream = Pin::new(&mut self.stream);
        match slices {
            // Plain `send` is the cheaper call.
            [one] => stream.poll_write(cx, one),
            several => stream.poll_write_vectored(cx, several),
        }
    }

    /// Reads more into the buffer. It grows only once the socket has something, so that a waiting request holds none.
    fn poll_fill(&mut self, cx: &mut Context<'_>, room: usize) -> Poll<io::Result<usize>> {
        ready!(self.stream.poll_read_ready(cx))?;
        self.buffer.reserve(room);
        pin!(self.stream.read_buf(&mut self.buffer)).poll(cx)
    }

    async fn head(&mut self, method_has_body: bool) -> Result<Head, UpstreamError> {
        loop {
            if let Some(head) = head::take(&mut self.buffer, method_has_body)? {
                return Ok(head);
            }
            match poll_fn(|cx| self.poll_fill(cx, READ_BYTES)).await {
                Ok(0) if self.buffer.is_empty() => return Err(UpstreamError::NoAnswer),
                Ok(0) => return Err(UpstreamError::Truncated),
                Ok(_) => {}
                Err(error) => return Err(UpstreamError::Receive(error)),
            }
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

#[derive(Debug, PartialEq, Eq)]
enum Sent {
    Whole,
    /// The worker answered, or hung up, before it had everything: the connection cannot be used again.
    InPart,
}

/// One request and what has come of its answer so far.
#[derive(Debug)]
pub(crate) struct Exchange {
    conn: Conn,
    pub(crate) head: Head,
    pub(crate) body: BodyReader,
    reusable: bool,
}

impl Exchange {
    /// The next part of the answer's body, `None` at its proper end.
    pub(crate) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, UpstreamError>> {
        self.body.poll_data(cx, &mut self.conn)
    }

    /// The same, as a future.
    pub(crate) async fn data(&mut self) -> Result<Option<Bytes>, UpstreamError> {
        poll_fn(|cx| self.poll_data(cx)).await
    }

    /// The whole body, up to `bytes_max`.
    pub(crate) async fn whole(&mut self, bytes_max: usize) -> Result<Bytes, UpstreamError> {
        let Some(first) = self.data().await? else { return Ok(Bytes::new()) };
        if self.body.is_done() && first.len() <= bytes_max {
            return Ok(first);
        }
        let mut all = BytesMut::from(first);
        while all.len() <= bytes_max {
            let Some(more) = self.data().await? else { return Ok(all.freeze()) };
            all.extend_from_slice(&more);
        }
        Err(UpstreamError::TooLong { bytes_max })
    }

    /// Whether the body has been read to its proper end.
    pub(crate) fn is_done(&self) -> bool {
        self.body.is_done()
    }

    /// The connection, if another exchange may follow on it.
    fn into_conn(self) -> Option<Conn> {
        (self.reusable && self.body.is_done() && self.head.keep_alive && self.conn.buffer.is_empty())
            .then_some(self.conn)
    }
}

/// What is sent: all parts borrowed, so that a retry sends them again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) method: &'a http::Method,
    pub(crate) path: &'a str,
    /// Header lines that are the same for every worker, each ended by `\r\n`.
    pub(crate) headers: &'a [u8],
    pub(crate) body: &'a [&'a [u8]],
}

impl Outgoing<'_> {
    fn head(&self, origin: &Origin) -> Vec<u8> {
        let bytes: usize = self.body.iter().map(|piece| piece.len()).sum();
        let body = if bytes <= FLATTEN_BYTES_MAX { bytes } else { 0 };
        let host = origin.authority.as_str();
        let mut head = Vec::with_capacity(self.headers.len() + self.path.len() + host.len() + 96 + body);
        for part in [self.method.as_str(), " ", &origin.base, self.path, " HTTP/1.1\r\nhost: ", host, "\r\n"] {
            head.extend_from_slice(part.as_bytes());
        }
        head.extend_from_slice(self.headers);
        // A GET without a body says nothing about one; a POST always does.
        if bytes > 0 || self.method != http::Method::GET {
            head.extend_from_slice(b"content-length: ");
            head.extend_from_slice(bytes.to_string().as_bytes());
            head.extend_from_slice(b"\r\n");
        }
        head.extend_from_slice(b"\r\n");
        head
    }
}

/// Where a worker is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Origin {
    /// `host:port`, also the `Host` header.
    pub(crate) authority: String,
    /// Set when the host is a number: then nothing has to be resolved.
    pub(crate) address: Option<std::net::SocketAddr>,
    /// What stands before every path: empty, or `/base`.
    pub(crate) base: String,
}

/// Sends `request` on an idle connection or a new one and waits for the head of the answer.
pub(crate) async fn exchange(
    sockets: &Sockets,
    worker: usize,
    origin: &Origin,
    request: Outgoing<'_>,
    connect_timeout: Duration,
    deadline: Deadline,
) -> Result<Exchange, UpstreamError> {
    if let Some(conn) = sockets.take(worker) {
        match deadline.bound("answer", converse(conn, origin, &request)).await {
            Err(error) if error.is_stale() => {}
            done => return done,
        }
    }
    let limit = deadline.or(Deadline::after(Instant::now(), connect_timeout)).at;
    let stream = match timeout_at(limit, connect_or_make_room(sockets, origin)).await {
        Ok(connected) => connected?,
        Err(_) => {
            return Err(UpstreamError::ConnectTimeout { address: origin.authority.clone(), after: connect_timeout });
        }
    };
    deadline.bound("answer", converse(Conn::new(stream), origin, &request)).await
}

/// Connects. When the process is out of sockets, idle ones are given up for it; that shortage is no worker's fault.
async fn connect_or_make_room(sockets: &Sockets, origin: &Origin) -> Result<TcpStream, UpstreamError> {
    let mut connected = connect(sockets, origin).await;
    if connected.as_ref().is_err_and(is_out_of_sockets) {
        sockets.clear();
        connected = connect(sockets, origin).await;
    }
    connected.map_err(|source| {
        let address = origin.authority.clone();
        match is_out_of_sockets(&source) {
            true => UpstreamError::OutOfSockets { address, source },
            false => UpstreamError::Connect { address, source },
        }
    })
}

fn is_out_of_sockets(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    [rustix::io::Errno::MFILE, rustix::io::Errno::NFILE].iter().any(|errno| code == Some(errno.raw_os_error()))
}

async fn connect(sockets: &Sockets, origin: &Origin) -> io::Result<TcpStream> {
    let stream = match origin.address {
        Some(address) => TcpStream::connect(address).await?,
        None => TcpStream::connect(origin.authority.as_str()).await?,
    };
    // Every write is a whole message: waiting to fill a segment would only add delay.
    stream.set_nodelay(true)?;
    sockets.watch(&stream)?;
    Ok(stream)
}

async fn converse(mut conn: Conn, origin: &Origin, request: &Outgoing<'_>) -> Result<Exchange, UpstreamError> {
    let mut head = request.head(origin);
    let sent = conn.send(&mut head, request.body).await?;
    drop(head);
    let head = conn.head(request.method != http::Method::HEAD).await?;
    let body = BodyReader::new(head.framing);
    Ok(Exchange { conn, head, body, reusable: sent == Sent::Whole })
}

impl Sockets {
    /// Gives the connection of a finished exchange back for the next one.
    pub(crate) fn finish(&self, worker: usize, exchange: Exchange) {
        if let Some(conn) = exchange.into_conn() {
            self.give(worker, conn);
        }
    }
}
