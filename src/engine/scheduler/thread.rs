//! The thread that owns a scheduler: takes commands, steps, keeps the pace.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Command, Outcome, Scheduler};
use crate::kv::KvRuntime;

/// How long a step takes.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(in crate::engine) struct Pace {
    pub prefill_us_per_token: f64,
    pub decode_us_per_token: f64,
}

impl Pace {
    /// All sequences of a batch decode in the time of one.
    fn of(self, outcome: &Outcome) -> Duration {
        let prefill_us = self.prefill_us_per_token * outcome.prefill_tokens as f64;
        let decode_us = if outcome.decodes > 0 { self.decode_us_per_token } else { 0.0 };
        Duration::try_from_secs_f64((prefill_us + decode_us) / 1e6).unwrap_or_default()
    }
}

/// The running thread. Ends at [`Command::Stop`].
pub(in crate::engine) struct SchedulerThread(Option<JoinHandle<()>>);

impl SchedulerThread {
    /// `alive` is cleared when the thread ends, however it does.
    pub(in crate::engine) fn start(
        scheduler: Scheduler,
        commands: Receiver<Command>,
        pace: Pace,
        link: Arc<KvRuntime>,
        alive: Arc<AtomicBool>,
    ) -> std::io::Result<Self> {
        let run = move || {
            let _alive = Alive(alive);
            run(scheduler, &commands, pace, &link);
        };
        let thread = std::thread::Builder::new().name("pdlink-engine".to_owned()).spawn(run)?;
        Ok(Self(Some(thread)))
    }

    /// Waits for the end that [`Command::Stop`] brings. False if the thread panicked.
    pub(in crate::engine) fn join(&mut self) -> bool {
        self.0.take().is_none_or(|thread| thread.join().is_ok())
    }
}

struct Alive(Arc<AtomicBool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

fn run(mut scheduler: Scheduler, commands: &Receiver<Command>, pace: Pace, link: &KvRuntime) {
    loop {
        loop {
            match commands.try_recv() {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return scheduler.handle(Command::Stop),
                Ok(command) => scheduler.handle(command),
                Err(TryRecvError::Empty) => break,
            }
        }
        link.wait_for_pushes();
        let outcome = scheduler.step();
        if outcome.is_stuck() {
            match commands.recv() {
                Ok(Command::Stop) | Err(_) => return scheduler.handle(Command::Stop),
                Ok(command) => scheduler.handle(command),
            }
            continue;
        }
        let step_ends = Instant::now() + pace.of(&outcome);
        if wait(&mut scheduler, commands, step_ends).is_err() {
            return scheduler.handle(Command::Stop);
        }
        scheduler.deliver(outcome);
    }
}

/// Takes commands until the step's time has passed. An error means: stop.
fn wait(scheduler: &mut Scheduler, commands: &Receiver<Command>, until: Instant) -> Result<(), ()> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        match commands.recv_timeout(left) {
            Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return Err(()),
            Ok(command) => scheduler.handle(command),
            Err(RecvTimeoutError::Timeout) => return Ok(()),
        }
    }
}
