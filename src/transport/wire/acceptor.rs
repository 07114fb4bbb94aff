//! A data port: accepts connections, lets in who knows the run's secret, and gives each a thread.
//!
//! A connection that proves nothing or breaks the protocol is closed; no other notices.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::handshake::{ExportId, welcome};
use super::socket::Socket;
use crate::security::Secret;
use crate::transport::TransportError;
use crate::transport::flight::locked;
use crate::transport::threads::Threads;

/// Most connections at once; another is closed as soon as it is accepted. Each is a thread that mostly sleeps.
const CONNECTIONS_MAX: usize = 256;
/// How long a stranger may take to prove that it is none.
const HANDSHAKE_MAX: Duration = Duration::from_secs(2);

/// What is done with a connection once both ends are known to each other.
pub(in crate::transport) trait Serve: Send + Sync + 'static {
    /// Serves it to its end, and says why it ended. `closing` is set when everybody is to go.
    fn serve(&self, socket: &Socket, closing: &AtomicBool) -> TransportError;
}

/// The port and whoever is connected to it. Closed when dropped.
pub(in crate::transport) struct Acceptor {
    door: Arc<Door>,
    listener: TcpListener,
    port: u16,
    accepting: Threads,
}

/// What the threads share.
struct Door {
    name: &'static str,
    export: ExportId,
    secret: Secret,
    serve: Arc<dyn Serve>,
    open: Mutex<HashMap<u64, Arc<Socket>>>,
    closing: AtomicBool,
    serving: Threads,
}

impl Acceptor {
    /// Listens on a port of the kernel's choice. `name` is the path's.
    pub(in crate::transport) fn start(
        name: &'static str,
        bind: IpAddr,
        secret: &Secret,
        serve: Arc<dyn Serve>,
    ) -> Result<Self, TransportError> {
        let failed = |error: io::Error| TransportError::io("listen for data", &bind.to_string(), error);
        let listener = TcpListener::bind((bind, 0)).map_err(failed)?;
        let port = listener.local_addr().map_err(failed)?.port();
        let door = Arc::new(Door {
            name,
            export: ExportId::random(),
            secret: secret.clone(),
            serve,
            open: Mutex::default(),
            closing: AtomicBool::new(false),
            serving: Threads::default(),
        });
        let (accepting, doorman) = (Threads::default(), door.clone());
        let accepts = listener.try_clone().map_err(failed)?;
        accepting.spawn(format!("pdlink-{name}-accept"), move || doorman.accept(&accepts)).map_err(failed)?;
        Ok(Self { door, listener, port, accepting })
    }

    pub(in crate::transport) fn export(&self) -> ExportId {
        self.door.export
    }

    pub(in crate::transport) fn port(&self) -> u16 {
        self.port
    }

    /// Ends every connection and waits for their threads. Idempotent.
    pub(in crate::transport) fn close(&self) {
        self.door.closing.store(true, Ordering::SeqCst);
        locked(&self.door.open).values().for_each(|socket| socket.shutdown());
        // Wakes the accepting thread: on a listener this ends every accept.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        self.accepting.join();
        self.door.serving.join();
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.close();
    }
}

impl Door {
    /// Accepts until the listener is shut down.
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        for number in 0.. {
            match listener.accept() {
                _ if self.closing.load(Ordering::SeqCst) => return,
                Ok((stream, address)) => {
                    let socket = Socket::new(stream, address.to_string()).map(Arc::new);
                    let started = socket.and_then(|socket| self.start(number, &socket, address));
                    if let Err(error) = started {
                        tracing::debug!(path = self.name, peer = %address, %error, "data connection refused");
                    }
                }
                // Out of descriptors, or the peer is gone already: nothing that waiting a little would not mend.
                Err(error) => {
                    tracing::debug!(path = self.name, %error, "accepting a data connection failed");
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
    }

    fn start(self: &Arc<Self>, number: u64, socket: &Arc<Socket>, address: SocketAddr) -> io::Result<()> {
        let mut open = locked(&self.open);
        if open.len() >= CONNECTIONS_MAX {
            return Err(io::Error::other(format!("{CONNECTIONS_MAX} connections are open")));
        }
        // Looked at under the lock: whoever closes either finds the socket in the table or has been seen here.
        if self.closing.load(Ordering::SeqCst) {
            return Err(io::Error::other("closing"));
        }
        let (door, served) = (self.clone(), socket.clone());
        self.serving.spawn(format!("pdlink-{}-serve-{number}", self.name), move || {
            let ended = door.serve(&served);
            served.shutdown();
            locked(&door.open).remove(&number);
            tracing::debug!(path = door.name, peer = %address, %ended, "data connection ended");
        })?;
        open.insert(number, socket.clone());
        Ok(())
    }

    fn serve(&self, socket: &Socket) -> TransportError {
        match welcome(socket, self.export, &self.secret, Instant::now() + HANDSHAKE_MAX) {
            Ok(()) => self.serve.serve(socket, &self.closing),
            Err(error) => error,
        }
    }
}
