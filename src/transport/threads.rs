//! Threads that somebody owns and waits for.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Mutex;
use std::thread::{Builder, JoinHandle};

use super::flight::{in_completion, locked};

/// A set of running threads.
#[derive(Default)]
pub(super) struct Threads {
    running: Mutex<Vec<JoinHandle<()>>>,
}

impl Threads {
    /// Starts one more. Forgets those that have ended by themselves.
    pub(super) fn spawn(&self, name: String, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let thread = Builder::new().name(name).spawn(run)?;
        let mut running = locked(&self.running);
        running.retain(|thread| !thread.is_finished());
        running.push(thread);
        Ok(())
    }

    /// Waits for all of them; they have been told to end. A thread of this set, and a completion, waits for none: they then
    /// end by themselves.
    pub(super) fn join(&self) {
        let running = std::mem::take(&mut *locked(&self.running));
        let current = std::thread::current().id();
        if in_completion() || running.iter().any(|thread| thread.thread().id() == current) {
            return;
        }
        for thread in running {
            // A panic in it would be our own mistake, and was printed when it happened.
            let _ = thread.join();
        }
    }
}
