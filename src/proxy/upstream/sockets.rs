//! Idle connections of one server thread, newest first. Threads share none, so that no wake-up crosses cores.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::Conn;

/// How long an idle connection is kept. uvicorn closes its own after 5 s; one that is about to be closed loses a
/// request that is being sent on it.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// Idle connections per worker that keep their buffer, and the largest that is kept.
const BUFFERED_PER_WORKER_MAX: usize = 64;
const BUFFER_KEPT_BYTES_MAX: usize = 16 << 10;
/// Most idle connections kept per worker.
const IDLE_PER_WORKER_MAX: usize = 512;

/// Probes of a silent host before it counts as gone, and the shortest time between two: the kernel counts whole seconds.
const PROBES: u32 = 4;
const PROBE_INTERVAL_MIN: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Idle {
    conn: Conn,
    since: Instant,
}

/// Idle connections by worker number. The locks are never contended: one thread uses them.
#[derive(Debug)]
pub(crate) struct Sockets {
    workers: Box<[Mutex<Vec<Idle>>]>,
    /// Silence of another host after which a connection to it is dead.
    dead_after: Duration,
}

impl Sockets {
    pub(crate) fn new(workers: usize, dead_after: Duration) -> Self {
        Self { workers: (0..workers).map(|_| Mutex::default()).collect(), dead_after }
    }

    /// Lets the kernel end a connection whose other host is gone: without, a request on it would wait for its last deadline.
    pub(super) fn watch(&self, stream: &TcpStream) -> io::Result<()> {
        if stream.peer_addr()?.ip().is_loopback() {
            return Ok(());
        }
        let socket = SockRef::from(stream);
        let interval = (self.dead_after / PROBES).max(PROBE_INTERVAL_MIN);
        let probes = TcpKeepalive::new().with_time(interval).with_interval(interval).with_retries(PROBES);
        socket.set_tcp_keepalive(&probes)?;
        // Bytes that were sent and not acknowledged have a clock of their own.
        socket.set_tcp_user_timeout(Some(self.dead_after))
    }

    fn of(&self, worker: usize) -> MutexGuard<'_, Vec<Idle>> {
        self.workers[worker].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The connection used last, if it is still good.
    pub(super) fn take(&self, worker: usize) -> Option<Conn> {
        let mut idle = self.of(worker);
        while let Some(mut last) = idle.pop() {
            if last.since.elapsed() > IDLE_MAX {
                // The rest is older still.
                idle.clear();
            } else if !last.conn.is_spent() {
                return Some(last.conn);
            }
        }
        None
    }

    pub(super) fn give(&self, worker: usize, mut conn: Conn) {
        let mut idle = self.of(worker);
        // The connections that are used again and again keep their buffer; the many that a peak left behind do not.
        if idle.len() >= BUFFERED_PER_WORKER_MAX || conn.buffer.capacity() > BUFFER_KEPT_BYTES_MAX {
            conn.buffer = bytes::BytesMut::new();
        }
        if idle.len() < IDLE_PER_WORKER_MAX {
            idle.push(Idle { conn, since: Instant::now() });
        }
    }

    /// Closes all of them.
    pub(super) fn clear(&self) {
        (0..self.workers.len()).for_each(|worker| self.of(worker).clear());
    }

    /// Closes what has been idle for too long. Called about once a second.
    pub(crate) fn sweep(&self, now: Instant) {
        for worker in 0..self.workers.len() {
            let mut idle = self.of(worker);
            let young = idle.iter().position(|idle| now.duration_since(idle.since) <= IDLE_MAX);
            let old = young.unwrap_or(idle.len());
            drop(idle.drain(..old));
        }
    }
}
