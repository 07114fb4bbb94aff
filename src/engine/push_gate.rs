//! `kv_send_type = "PUT"`: the worker's next step waits until what it pushes has gone out.
//!
//! A thin path around each path counts the pushes in flight; the scheduler's thread waits for none before it steps. With
//! `PUT_ASYNC` and `GET` there is no gate, and steps and copies overlap.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::Path;
use crate::transport::{
    Completion, Direction, Export, Grant, Link, RunList, TransferRequest, TransferTicket, Transport, TransportError,
};

/// Counts pushes in flight.
#[derive(Debug, Default)]
pub(super) struct PushGate {
    pushes: Mutex<usize>,
    none: Condvar,
}

impl PushGate {
    /// Waits until no push is in flight, but no longer than `at_most`: by then the link has failed the transfer.
    pub(super) fn wait(&self, at_most: Duration) {
        let guard = self.pushes();
        drop(self.none.wait_timeout_while(guard, at_most, |pushes| *pushes > 0));
    }

    /// The same path, with its pushes counted here.
    pub(super) fn around(self: &Arc<Self>, inner: Arc<dyn Transport>) -> Arc<dyn Transport> {
        Arc::new(Gated { inner, gate: self.clone() })
    }

    fn pushes(&self) -> MutexGuard<'_, usize> {
        self.pushes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) {
        *self.pushes() += 1;
    }

    fn leave(&self) {
        *self.pushes() -= 1;
        self.none.notify_all();
    }
}

struct Gated {
    inner: Arc<dyn Transport>,
    gate: Arc<PushGate>,
}

struct GatedLink {
    inner: Arc<dyn Link>,
    gate: Arc<PushGate>,
}

impl Transport for Gated {
    fn path(&self) -> Path {
        self.inner.path()
    }

    fn export(&self) -> Export {
        self.inner.export()
    }

    fn connect(&self, peer: &Export, deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        let inner = self.inner.connect(peer, deadline)?;
        Ok(Arc::new(GatedLink { inner, gate: self.gate.clone() }))
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        self.inner.grant(runs)
    }

    fn close(&self) {
        self.inner.close();
    }
}

impl Link for GatedLink {
    fn path(&self) -> Path {
        self.inner.path()
    }

    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket {
        if request.direction != Direction::Push {
            return self.inner.submit(request, done);
        }
        self.gate.enter();
        let gate = self.gate.clone();
        // Every transfer completes once (TR-1), so every push leaves.
        let done = move |result| {
            gate.leave();
            done(result);
        };
        self.inner.submit(request, Box::new(done))
    }

    fn cancel(&self, ticket: TransferTicket) {
        self.inner.cancel(ticket);
    }

    fn usable(&self) -> bool {
        self.inner.usable()
    }

    fn peer_gone(&self) -> bool {
        self.inner.peer_gone()
    }

    fn close(&self) {
        self.inner.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_is_open_without_pushes_and_opens_behind_the_last() {
        let gate = Arc::new(PushGate::default());
        gate.wait(Duration::from_secs(60));
        gate.enter();
        gate.enter();
        gate.wait(Duration::from_millis(1));
        assert_eq!(*gate.pushes(), 2, "it waited no longer than it was told");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                gate.leave();
                gate.leave();
            });
            gate.wait(Duration::from_secs(60));
        });
        assert_eq!(*gate.pushes(), 0);
    }
}
