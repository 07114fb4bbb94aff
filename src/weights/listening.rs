//! A door of its own for a worker whose KV is not handed over by us: there is no other control listener to share.

use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::control::{
    self, AdminHandler, Connection, ControlError, Hello, Identity, Liveness, Part, Role, Sink, VERSIONS, WeightsDoor,
    admin_sink,
};
use crate::security::Secret;

const LIVENESS: Liveness = Liveness { ping_interval: Duration::from_secs(1), peer_timeout: Duration::from_secs(10) };
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A listener for what is about weights alone. Dropping it closes it, with all connections.
pub struct Listening {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Listening {
    /// Whoever knows the secret may ask; the caller has checked that the secret is good for the address.
    pub fn start(door: WeightsDoor, listener: TcpListener, secret: Secret) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let hello = Hello {
            part: Part::Weights,
            engine_id: format!("weights of process {}", std::process::id()),
            incarnation: 0,
            role: Role::Both,
            payload: Vec::new(),
        };
        let identity = Identity { secret, versions: VERSIONS, hello, timeout: HANDSHAKE_TIMEOUT };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let listener = {
            let _inside = runtime.enter();
            tokio::net::TcpListener::from_std(listener)?
        };
        let (stop, stopped) = oneshot::channel::<()>();
        let run = async move {
            let welcome = Arc::new(move |hello: Hello, connection: &Connection| welcome(&door, hello, connection));
            tokio::select! {
                _ = stopped => {}
                () = control::serve(listener, Arc::new(identity), LIVENESS, welcome) => {}
            }
        };
        let thread = std::thread::Builder::new().name("pdlink-door".to_owned()).spawn(move || runtime.block_on(run))?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

fn welcome(door: &WeightsDoor, hello: Hello, connection: &Connection) -> Sink {
    match hello.part {
        Part::Admin => {
            let handler: Arc<dyn AdminHandler> = Arc::clone(&door.admin);
            admin_sink(connection, handler)
        }
        Part::Weights => (door.welcome)(hello, connection),
        Part::Engine | Part::Node => {
            let (peer, why) = (connection.peer().to_owned(), "nothing is handed over here but weights".to_owned());
            connection.close(ControlError::Refused { peer, why });
            Box::new(|_| {})
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread of the weights' listener panicked");
        }
    }
}
