//! The socket under hyper on the client's side: reads and writes pass through, and a client that takes nothing for too
//! long is cut off. hyper itself has no such bound: while it waits to write, it asks the body for nothing, and no other
//! timer would run (PX-3, PX-4).

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::openai::RefusalIo;

/// How far a client's connection has been written, as the body of an answer sees it.
#[derive(Debug, Default)]
pub(crate) struct ClientLink {
    flushes: AtomicU64,
    awaited: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl ClientLink {
    /// Times that everything buffered had been written.
    pub(crate) fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Acquire)
    }

    /// Whether everything was written once more since `flushes` was read; if not, the task is woken when it has been.
    pub(crate) fn has_flushed_since(&self, flushes: u64, cx: &Context<'_>) -> bool {
        if self.flushes() > flushes {
            return true;
        }
        *self.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        self.awaited.store(true, Ordering::Release);
        self.flushes() > flushes
    }

    fn flushed(&self) {
        self.flushes.fetch_add(1, Ordering::AcqRel);
        if self.awaited.swap(false, Ordering::AcqRel)
            && let Some(waker) = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take()
        {
            waker.wake();
        }
    }
}

/// A client's socket.
#[derive(Debug)]
pub(crate) struct ClientIo {
    stream: TokioIo<RefusalIo<TcpStream>>,
    link: Arc<ClientLink>,
    stall_after: Duration,
    /// Runs while a write waits for the client.
    stall: Option<Pin<Box<Sleep>>>,
}

impl ClientIo {
    pub(crate) fn new(stream: TcpStream, link: Arc<ClientLink>, stall_after: Duration) -> Self {
        Self { stream: TokioIo::new(RefusalIo::new(stream)), link, stall_after, stall: None }
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let after = self.stall_after;
        let stall = self.stall.get_or_insert_with(|| Box::pin(sleep(after)));
        ready!(stall.as_mut().poll(cx));
        // The next write, if there is one, starts a new wait.
        stall.as_mut().reset(Instant::now() + after);
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, format!("the client took nothing for {after:?}"))))
    }

    fn wrote(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if written.is_pending() {
            return self.poll_stalled(cx);
        }
        self.stall = None;
        written
    }
}

impl Read for ClientIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl Write for ClientIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.wrote(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.wrote(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // hyper comes here only once its own buffer is empty; a socket has none to flush.
        self.link.flushed();
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
