//! One authenticated connection: notices, requests and their answers, and a peer that is known to be alive.
//!
//! [`connection`] gives a handle and a driver. Whoever owns the connection runs the driver, one future, until it ends;
//! the handle may be cloned and used from anywhere. What comes in goes to a sink, in order, and the last thing the sink
//! gets is [`Inbound::Closed`], exactly once, whoever ended the connection and however.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::Instant;

use super::ControlError;
use super::handshake::unreadable;
use super::wire::{Frame, FrameBuffer};

/// Most bytes that may wait to be sent to one peer. A peer that lets more pile up is cut off.
const QUEUED_BYTES_MAX: usize = 64 << 20;
/// Most messages of one peer that may wait to be handled; then its socket is not read for a while.
const UNHANDLED_MAX: usize = 1024;
/// Most of our own requests that may wait for one peer's answers.
const UNANSWERED_MAX: usize = 4096;
/// Outgoing frames are gathered up to this many bytes into one write.
const GATHERED_BYTES: usize = 64 * 1024;
/// Shortest sleep between two looks at a silent peer.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(1);

/// How a connection tells a silent peer from a dead one.
#[derive(Debug, Clone, Copy)]
pub struct Liveness {
    /// A peer that has said nothing for so long is pinged.
    pub ping_interval: Duration,
    /// A peer that has said nothing for so long is dead (KV-8).
    pub peer_timeout: Duration,
}

/// What a connection's owner is told.
#[derive(Debug)]
pub enum Inbound {
    Notice(Message),
    Request(Message, Answerer),
    /// The last thing: the connection has ended.
    Closed(ControlError),
}

/// The body of a message. While it lives it counts against the peer's limit of unhandled messages.
#[derive(Debug)]
pub struct Message {
    pub body: Bytes,
    _counted: OwnedSemaphorePermit,
}

/// Where a connection's messages go. Called by the driver; must not block.
pub type Sink = Box<dyn FnMut(Inbound) + Send>;

/// A handle on a connection.
#[derive(Debug, Clone)]
pub struct Connection {
    shared: Arc<Shared>,
}

/// The right to answer one request, once.
#[derive(Debug)]
pub struct Answerer {
    connection: Connection,
    number: u32,
}

#[derive(Debug)]
struct Shared {
    peer: String,
    outgoing: mpsc::UnboundedSender<Bytes>,
    queued_bytes: AtomicUsize,
    /// Rung when nothing is queued any more, and at the end.
    written: Notify,
    next_number: AtomicU32,
    unanswered: Mutex<HashMap<u32, oneshot::Sender<Bytes>>>,
    /// When the peer last said something, in microseconds after `opened`.
    heard_us: AtomicU64,
    opened: Instant,
    ended: OnceLock<ControlError>,
    end: Notify,
}

/// Makes a handle and a driver of an authenticated stream. `buffer` holds what came after the handshake.
pub fn connection<S>(
    stream: S,
    buffer: FrameBuffer,
    peer: String,
    liveness: Liveness,
    sink: impl FnOnce(&Connection) -> Sink,
) -> (Connection, impl Future<Output = ()> + Send)
where
    S: AsyncRead + AsyncWrite + Send + 'static,
{
    let (outgoing, queue) = mpsc::unbounded_channel();
    let shared = Arc::new(Shared {
        peer,
        outgoing,
        queued_bytes: AtomicUsize::new(0),
        written: Notify::new(),
        next_number: AtomicU32::new(0),
        unanswered: Mutex::new(HashMap::new()),
        heard_us: AtomicU64::new(0),
        opened: Instant::now(),
        ended: OnceLock::new(),
        end: Notify::new(),
    });
    let connection = Connection { shared: Arc::clone(&shared) };
    let mut sink = sink(&connection);
    let driver = async move {
        let (reader, writer) = tokio::io::split(stream);
        let cause = tokio::select! {
            biased;
            () = shared.end.notified() => shared.closed_here(),
            error = read(&shared, reader, buffer, &mut sink) => error,
            error = write(&shared, writer, queue) => error,
            error = watch(&shared, liveness) => error,
        };
        // A cause given by `close` came first, and wins.
        let cause = shared.ended.get_or_init(|| cause).clone();
        // Dropping the senders is what tells those who wait.
        shared.lock_unanswered().clear();
        shared.written.notify_waiters();
        sink(Inbound::Closed(cause));
    };
    (connection, driver)
}

impl Connection {
    /// The peer's address, as it is named in errors.
    pub fn peer(&self) -> &str {
        &self.shared.peer
    }

    /// Sends a message that wants no answer. It is queued in order; an error means that the connection has ended.
    pub fn notify(&self, body: Bytes) -> Result<(), ControlError> {
        self.send(&Frame::Notice(body))
    }

    /// Asks, and waits for the answer.
    pub async fn request(&self, body: Bytes, within: Duration) -> Result<Bytes, ControlError> {
        let number = self.shared.next_number.fetch_add(1, Relaxed);
        let (sender, answer) = oneshot::channel();
        {
            let mut unanswered = self.shared.lock_unanswered();
            if unanswered.len() >= UNANSWERED_MAX {
                return Err(ControlError::Backlog { peer: self.shared.peer.clone(), queued: unanswered.len() });
            }
            unanswered.insert(number, sender);
        }
        let forget = Forget { shared: &self.shared, number };
        self.send(&Frame::Request { number, body })?;
        let answered = tokio::time::timeout(within, answer).await;
        drop(forget);
        match answered {
            Ok(Ok(body)) => Ok(body),
            Ok(Err(_)) => Err(self.shared.closed_here()),
            Err(_) => {
                Err(ControlError::TimedOut { peer: self.shared.peer.clone(), doing: "answering a request", within })
            }
        }
    }

    /// Waits until the kernel has all that was sent so far, or the connection has ended.
    pub async fn flushed(&self) {
        loop {
            let written = self.shared.written.notified();
            if self.is_closed() || self.shared.queued_bytes.load(Relaxed) == 0 {
                return;
            }
            written.await;
        }
    }

    /// Ends the connection; what is queued is dropped. The sink is told `cause`, unless it had ended before.
    pub fn close(&self, cause: ControlError) {
        let _ = self.shared.ended.set(cause);
        self.shared.end.notify_one();
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.ended.get().is_some()
    }

    fn send(&self, frame: &Frame) -> Result<(), ControlError> {
        let shared = &self.shared;
        if self.is_closed() {
            return Err(shared.closed_here());
        }
        let bytes = frame.encode().map_err(|error| unreadable(&shared.peer, &error))?;
        let queued = shared.queued_bytes.fetch_add(bytes.len(), Relaxed) + bytes.len();
        if queued > QUEUED_BYTES_MAX {
            self.close(ControlError::Backlog { peer: shared.peer.clone(), queued });
            return Err(shared.closed_here());
        }
        shared.outgoing.send(bytes).map_err(|_| shared.closed_here())
    }
}

impl Answerer {
    /// Answers. A peer that is gone does not mind.
    pub fn answer(self, body: Bytes) {
        let _ = self.connection.send(&Frame::Answer { number: self.number, body });
    }
}

/// Forgets a request that nobody waits for any more, also when the waiting future is dropped.
struct Forget<'a> {
    shared: &'a Shared,
    number: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.lock_unanswered().remove(&self.number);
    }
}

impl Shared {
    fn lock_unanswered(&self) -> std::sync::MutexGuard<'_, HashMap<u32, oneshot::Sender<Bytes>>> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn closed_here(&self) -> ControlError {
        let closed = || ControlError::Closed { peer: self.peer.clone(), why: "closed on this side".to_owned() };
        self.ended.get().cloned().unwrap_or_else(closed)
    }

    fn hear(&self) {
        let now = u64::try_from(self.opened.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.heard_us.store(now, Relaxed);
    }

    fn silent(&self) -> Duration {
        self.opened.elapsed().saturating_sub(Duration::from_micros(self.heard_us.load(Relaxed)))
    }

    fn lost(&self, why: impl ToString) -> ControlError {
        ControlError::Closed { peer: self.peer.clone(), why: why.to_string() }
    }
}

/// Reads and hands on until the connection fails.
async fn read<R>(shared: &Arc<Shared>, mut reader: R, mut buffer: FrameBuffer, sink: &mut Sink) -> ControlError
where
    R: AsyncRead + Unpin,
{
    let unhandled = Arc::new(Semaphore::new(UNHANDLED_MAX));
    loop {
        loop {
            match buffer.next_frame() {
                Ok(Some(frame)) => {
                    if let Err(error) = handle(shared, frame, &unhandled, sink).await {
                        return error;
                    }
                }
                Ok(None) => break,
                Err(error) => return unreadable(&shared.peer, &error),
            }
        }
        match reader.read_buf(buffer.space()).await {
            Ok(0) => return shared.lost("the peer closed it"),
            Ok(_) => shared.hear(),
            Err(error) => return shared.lost(error),
        }
    }
}

async fn handle(
    shared: &Arc<Shared>,
    frame: Frame,
    unhandled: &Arc<Semaphore>,
    sink: &mut Sink,
) -> Result<(), ControlError> {
    let connection = || Connection { shared: Arc::clone(shared) };
    let message = |body| async {
        let permit = Arc::clone(unhandled).acquire_owned().await.expect("this semaphore is never closed");
        Message { body, _counted: permit }
    };
    match frame {
        Frame::Ping => connection().send(&Frame::Pong)?,
        Frame::Pong => {}
        Frame::Hello(_) => return Err(shared.lost("the peer said hello twice")),
        Frame::Notice(body) => sink(Inbound::Notice(message(body).await)),
        Frame::Request { number, body } => {
            sink(Inbound::Request(message(body).await, Answerer { connection: connection(), number }));
        }
        Frame::Answer { number, body } => {
            // An answer that nobody waits for came after its request timed out.
            if let Some(waiting) = shared.lock_unanswered().remove(&number) {
                let _ = waiting.send(body);
            }
        }
    }
    Ok(())
}

/// Writes what is queued, several frames at once where several wait.
async fn write<W>(shared: &Shared, mut writer: W, mut queue: mpsc::UnboundedReceiver<Bytes>) -> ControlError
where
    W: AsyncWrite + Unpin,
{
    let mut gathered = BytesMut::new();
    while let Some(first) = queue.recv().await {
        let mut written = first.len();
        let result = match queue.try_recv() {
            Err(_) => writer.write_all(&first).await,
            Ok(second) => {
                gathered.clear();
                gathered.extend_from_slice(&first);
                gathered.extend_from_slice(&second);
                while gathered.len() < GATHERED_BYTES
                    && let Ok(next) = queue.try_recv()
                {
                    gathered.extend_from_slice(&next);
                }
                written = gathered.len();
                writer.write_all(&gathered).await
            }
        };
        if let Err(error) = result {
            return shared.lost(error);
        }
        if shared.queued_bytes.fetch_sub(written, Relaxed) == written {
            shared.written.notify_waiters();
        }
    }
    shared.closed_here()
}

/// Pings a silent peer, and returns when it is dead.
async fn watch(shared: &Arc<Shared>, liveness: Liveness) -> ControlError {
    let connection = Connection { shared: Arc::clone(shared) };
    let mut pinged = Duration::ZERO;
    loop {
        let silent = shared.silent();
        if silent >= liveness.peer_timeout {
            // It may be this process that was stopped, with the peer's bytes waiting in the socket: look once more.
            tokio::task::yield_now().await;
            let silent = shared.silent();
            if silent >= liveness.peer_timeout {
                return ControlError::Silent { peer: shared.peer.clone(), silent };
            }
            continue;
        }
        if silent >= liveness.ping_interval && shared.opened.elapsed() - pinged >= liveness.ping_interval {
            pinged = shared.opened.elapsed();
            if let Err(error) = connection.send(&Frame::Ping) {
                return error;
            }
        }
        let until_dead = liveness.peer_timeout - silent;
        let until_ping = liveness.ping_interval.saturating_sub(silent.min(shared.opened.elapsed() - pinged));
        // Not `clamp`: less than the shortest sleep may be left of the bound.
        tokio::time::sleep(until_ping.max(LOOK_INTERVAL_MIN).min(until_dead)).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::task::JoinSet;

    use super::*;

    const BRISK: Liveness =
        Liveness { ping_interval: Duration::from_millis(10), peer_timeout: Duration::from_millis(60) };
    const SOON: Duration = Duration::from_secs(10);

    fn ends() -> (tokio::io::DuplexStream, tokio::io::DuplexStream) {
        duplex(1 << 16)
    }

    fn start(
        drivers: &mut JoinSet<()>,
        stream: tokio::io::DuplexStream,
        liveness: Liveness,
    ) -> (Connection, mpsc::UnboundedReceiver<Inbound>) {
        let (sender, inbound) = mpsc::unbounded_channel();
        let sink = |_: &Connection| -> Sink {
            Box::new(move |message| {
                let _ = sender.send(message);
            })
        };
        let (connection, driver) = connection(stream, FrameBuffer::default(), "peer".to_owned(), liveness, sink);
        drivers.spawn(driver);
        (connection, inbound)
    }

    async fn closed(inbound: &mut mpsc::UnboundedReceiver<Inbound>) -> ControlError {
        loop {
            match tokio::time::timeout(SOON, inbound.recv()).await.expect("an end in time").expect("an end") {
                Inbound::Closed(error) => return error,
                Inbound::Notice(_) | Inbound::Request(..) => {}
            }
        }
    }

    #[tokio::test]
    async fn requests_are_answered_and_notices_come_in_order() {
        let mut drivers = JoinSet::new();
        let (near, far) = ends();
        let (near, _near_inbound) = start(&mut drivers, near, BRISK);
        let (_far, mut far_inbound) = start(&mut drivers, far, BRISK);
        near.notify(Bytes::from_static(b"one")).unwrap();
        near.notify(Bytes::from_static(b"two")).unwrap();
        let serve = async {
            for want in [b"one", b"two"] {
                let Some(Inbound::Notice(message)) = far_inbound.recv().await else { panic!("no notice") };
                assert_eq!(&message.body[..], want);
            }
            let Some(Inbound::Request(message, answerer)) = far_inbound.recv().await else { panic!("no request") };
            answerer.answer(message.body);
        };
        let (answer, ()) = tokio::join!(near.request(Bytes::from_static(b"echo"), SOON), serve);
        assert_eq!(&answer.unwrap()[..], b"echo");
    }

    #[tokio::test]
    async fn an_idle_pair_stays_alive_by_pings() {
        let mut drivers = JoinSet::new();
        let (near, far) = ends();
        // A generous bound on silence, many pings: starved test machines must not end it.
        let liveness = Liveness { ping_interval: Duration::from_millis(5), peer_timeout: SOON };
        let (near, _near_inbound) = start(&mut drivers, near, liveness);
        let (far, _far_inbound) = start(&mut drivers, far, liveness);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!near.is_closed() && !far.is_closed());
        assert!(near.shared.heard_us.load(Relaxed) > 0, "a pong was heard");
    }

    #[tokio::test]
    async fn kv_8_a_silent_peer_is_dead_after_the_bound() {
        let mut drivers = JoinSet::new();
        let (near, _far) = ends();
        let (near, mut inbound) = start(&mut drivers, near, BRISK);
        let asked = near.request(Bytes::new(), SOON).await;
        assert!(matches!(asked, Err(ControlError::Silent { .. })), "{asked:?}");
        assert!(matches!(closed(&mut inbound).await, ControlError::Silent { .. }));
        assert!(inbound.recv().await.is_none(), "the end is told once");
        assert!(near.notify(Bytes::new()).is_err());
    }

    #[tokio::test]
    async fn kv_8_a_bound_shorter_than_a_look_is_kept_too() {
        let mut drivers = JoinSet::new();
        let (near, _far) = ends();
        let hasty = Liveness { ping_interval: SOON, peer_timeout: LOOK_INTERVAL_MIN / 2 };
        let (_near, mut inbound) = start(&mut drivers, near, hasty);
        assert!(matches!(closed(&mut inbound).await, ControlError::Silent { .. }));
    }

    #[tokio::test]
    async fn kv_8_a_peer_that_is_gone_is_noticed_at_once() {
        let mut drivers = JoinSet::new();
        let (near, far) = ends();
        let unhurried = Liveness { ping_interval: SOON, peer_timeout: SOON * 2 };
        let (_near, mut inbound) = start(&mut drivers, near, unhurried);
        drop(far);
        assert!(matches!(closed(&mut inbound).await, ControlError::Closed { .. }));
    }

    #[tokio::test]
    async fn garbage_ends_the_connection_by_name() {
        for (bytes, want_oversize) in [(&[0xff; 64][..], true), (&[2, 0, 0, 0, 99, 0][..], false)] {
            let mut drivers = JoinSet::new();
            let (near, mut far) = ends();
            let (_near, mut inbound) = start(&mut drivers, near, BRISK);
            far.write_all(bytes).await.unwrap();
            let error = closed(&mut inbound).await;
            assert_eq!(matches!(error, ControlError::Oversize { .. }), want_oversize, "{error}");
            assert_eq!(matches!(error, ControlError::Malformed { .. }), !want_oversize, "{error}");
        }
    }

    #[tokio::test]
    async fn closing_is_told_with_its_cause() {
        let mut drivers = JoinSet::new();
        let (near, _far) = ends();
        let (near, mut inbound) = start(&mut drivers, near, BRISK);
        let cause = ControlError::Refused { peer: "peer".to_owned(), why: "test".to_owned() };
        near.close(cause.clone());
        assert_eq!(closed(&mut inbound).await, cause);
    }

    #[tokio::test]
    async fn what_was_flushed_arrives_though_the_connection_is_closed_at_once() {
        let mut drivers = JoinSet::new();
        let (near, far) = ends();
        let (near, _near_inbound) = start(&mut drivers, near, BRISK);
        let (_far, mut far_inbound) = start(&mut drivers, far, BRISK);
        near.notify(Bytes::from_static(b"last words")).unwrap();
        tokio::time::timeout(SOON, near.flushed()).await.expect("written in time");
        near.close(ControlError::Closed { peer: "peer".to_owned(), why: "test".to_owned() });
        let Some(Inbound::Notice(message)) = far_inbound.recv().await else { panic!("no notice") };
        assert_eq!(&message.body[..], b"last words");
        tokio::time::timeout(SOON, near.flushed()).await.expect("nothing to wait for after the end");
    }

    #[tokio::test]
    async fn a_peer_that_does_not_read_is_cut_off_before_memory_grows() {
        let mut drivers = JoinSet::new();
        let (near, _far) = ends();
        let (near, mut inbound) = start(&mut drivers, near, Liveness { ping_interval: SOON, peer_timeout: SOON * 2 });
        let body = Bytes::from(vec![0; 1 << 20]);
        let refused = (0..70).find_map(|_| near.notify(body.clone()).err()).expect("a bound");
        assert!(matches!(refused, ControlError::Backlog { .. }));
        assert!(matches!(closed(&mut inbound).await, ControlError::Backlog { .. }));
    }
}
