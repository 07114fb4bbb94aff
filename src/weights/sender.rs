//! A process that sends weights: a source, the listener that receivers find it at, and the thread that runs both.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use super::paths::Paths;
use super::source::{Progress, Source, SourceError};
use super::tensors::TensorBytes;
use crate::control::{self, Connection, Hello, Identity, Liveness, Part, Role, VERSIONS};
use crate::security::SecretError;

/// Receivers are told from dead ones as the sender is from a dead one: by pings.
const LIVENESS: Liveness = Liveness { ping_interval: Duration::from_secs(1), peer_timeout: Duration::from_secs(10) };
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a sender does not start.
#[derive(Debug, thiserror::Error)]
pub enum SenderError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("cannot listen for workers: {0}")]
    Listen(io::Error),
    #[error("cannot start the sender's thread: {0}")]
    Thread(io::Error),
}

/// Ends what waits for tensors when the sender's task ends, however it ends: its thread waits for the packer.
struct Closes(Arc<dyn TensorBytes>);

impl Drop for Closes {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A running sender of one version. Dropping it ends it, whoever still receives.
pub struct Sender {
    address: String,
    progress: watch::Receiver<Progress>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Sender {
    /// Serves `bytes` as `version` at `listener`. Nothing is read before the first receiver comes.
    pub fn start(
        version: u64,
        bytes: Arc<dyn TensorBytes>,
        paths: &Paths,
        listener: TcpListener,
    ) -> Result<Self, SenderError> {
        let bound = listener.local_addr().map_err(SenderError::Listen)?;
        paths.secret.allowed_on(bound.ip())?;
        listener.set_nonblocking(true).map_err(SenderError::Listen)?;
        let host = &paths.advertise_host;
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.clone() };
        let address = format!("{host}:{}", bound.port());
        let closes = Closes(Arc::clone(&bytes));
        let (source, running) = Source::packing(version, bytes, paths)?;
        let progress = source.progress();
        let hello = Hello {
            part: Part::Weights,
            engine_id: format!("sender of process {}", std::process::id()),
            incarnation: 0,
            role: Role::Both,
            payload: Vec::new(),
        };
        let identity = Identity { secret: paths.secret.clone(), versions: VERSIONS, hello, timeout: HANDSHAKE_TIMEOUT };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(2)
            .build()
            .map_err(SenderError::Thread)?;
        let (stop, stopped) = oneshot::channel::<()>();
        let run = async move {
            let _closes = closes;
            let listener = match tokio::net::TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => return tracing::error!(%error, "the sender cannot use its listener"),
            };
            let welcome = Arc::new(move |_: Hello, connection: &Connection| source.welcome(connection));
            tokio::select! {
                _ = stopped => {}
                () = running => {}
                () = control::serve(listener, Arc::new(identity), LIVENESS, welcome) => {}
            }
        };
        let thread = std::thread::Builder::new()
            .name("pdlink-sender".to_owned())
            .spawn(move || runtime.block_on(run))
            .map_err(SenderError::Thread)?;
        Ok(Self { address, progress, stop: Some(stop), thread: Some(thread) })
    }

    /// `host:port`, as workers are told.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How far the sending is; changes as it goes.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the sender's thread panicked");
        }
    }
}
