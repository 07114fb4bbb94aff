//! `kv_send_type = "PUT"`: the engine's next step waits until what prefill pushes has gone out.
//!
//! With `PUT_ASYNC` and `GET` there is no gate, and steps and copies overlap.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::runtime::locked;

/// Counts pushes in flight.
#[derive(Debug, Default)]
pub(super) struct PushGate {
    pushes: Mutex<usize>,
    none: Condvar,
}

impl PushGate {
    pub(super) fn enter(&self) {
        *locked(&self.pushes) += 1;
    }

    pub(super) fn leave(&self) {
        *locked(&self.pushes) -= 1;
        self.none.notify_all();
    }

    /// Waits until no push is in flight, but no longer than `at_most`.
    pub(super) fn wait(&self, at_most: Duration) {
        let guard = locked(&self.pushes);
        drop(self.none.wait_timeout_while(guard, at_most, |pushes| *pushes > 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_is_open_without_pushes_and_opens_behind_the_last() {
        let gate = PushGate::default();
        gate.wait(Duration::from_secs(60));
        gate.enter();
        gate.enter();
        gate.wait(Duration::from_millis(1));
        assert_eq!(*locked(&gate.pushes), 2, "it waited no longer than it was told");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                gate.leave();
                gate.leave();
            });
            gate.wait(Duration::from_secs(60));
        });
        assert_eq!(*locked(&gate.pushes), 0);
    }
}
