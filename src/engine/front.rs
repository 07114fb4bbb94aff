//! The door to the scheduler that every HTTP handler has.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::oneshot;

use super::request::{Event, Group, NewSequence, Slot, Slots, Source, TokenEvent};
use super::scheduler::Command;
use crate::openai::ApiError;

/// When a client that met the bound should come back.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Hands requests to the scheduler, within the bound.
#[derive(Debug, Clone)]
pub(super) struct Front(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    commands: Sender<Command>,
    slots: Arc<Slots>,
    next_group: AtomicU64,
    draining: AtomicBool,
}

impl Front {
    pub(super) fn new(commands: Sender<Command>, requests_max: usize) -> Self {
        let (slots, next_group) = (Slots::new(requests_max), AtomicU64::new(0));
        Self(Arc::new(Inner { commands, slots, next_group, draining: AtomicBool::new(false) }))
    }

    /// Takes places for `count` answers, or says why there are none.
    pub(super) fn reserve(&self, count: usize) -> Result<Vec<Slot>, ApiError> {
        if self.is_draining() {
            return Err(ApiError::unavailable("the worker is shutting down", RETRY_AFTER));
        }
        let max = self.0.slots.max();
        if count > max {
            return Err(ApiError::bad_request(format!("{count} answers in one request, at most {max} are allowed")));
        }
        let full = || ApiError::too_many(format!("{max} requests wait or run already"), RETRY_AFTER);
        self.0.slots.take(count).ok_or_else(full)
    }

    /// Starts a request. Its answers end when the returned value is dropped.
    pub(super) fn submit(&self, external_id: String, sequences: Vec<NewSequence>) -> Answers {
        let (events, receiver) = unbounded_channel();
        let id = self.0.next_group.fetch_add(1, Ordering::Relaxed);
        let left = sequences.len();
        self.send(Command::Submit(Group { id, external_id, sequences, events }));
        Answers { events: receiver, left, group: id, front: self.clone() }
    }

    /// A request that names a transfer will not be served: prefill need not keep its blocks.
    pub(super) fn decline(&self, source: Source) {
        self.send(Command::Decline(source));
    }

    /// Ends requests by name, or all; how many answers that were. `None` if the scheduler has ended.
    pub(super) async fn abort_named(&self, names: Option<Vec<String>>) -> Option<usize> {
        let (answer, ended) = oneshot::channel();
        self.send(Command::AbortNamed(names, answer));
        ended.await.ok()
    }

    /// Forgets cached KV; false while blocks are in use. `None` if the scheduler has ended.
    pub(super) async fn reset_prefix_cache(&self) -> Option<bool> {
        let (answer, done) = oneshot::channel();
        self.send(Command::ResetPrefixCache(answer));
        done.await.ok()
    }

    /// Answers that wait or run.
    pub(super) fn load(&self) -> usize {
        self.0.slots.used()
    }

    /// From now on new requests are refused.
    pub(super) fn drain(&self) {
        self.0.draining.store(true, Ordering::Release);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.0.draining.load(Ordering::Acquire)
    }

    pub(super) fn send(&self, command: Command) {
        // A scheduler that has ended drops what it was sent; whoever waits for an answer sees its channel close.
        let _ = self.0.commands.send(command);
    }
}

/// What comes of a request's answers.
#[derive(Debug)]
pub(super) enum Told {
    Token(TokenEvent),
    /// What was told of this answer before is void. Never of an answer that streams and has begun.
    Restarted {
        index: usize,
    },
}

/// The answers of one request as they come. Dropping it ends what is not finished (KV-9).
#[derive(Debug)]
pub(super) struct Answers {
    events: UnboundedReceiver<Event>,
    left: usize,
    group: u64,
    front: Front,
}

impl Answers {
    /// What comes next of any answer; `None` when all have ended. After an error nothing more comes.
    pub(super) async fn next(&mut self) -> Option<Result<Told, ApiError>> {
        if self.left == 0 {
            return None;
        }
        match self.events.recv().await {
            Some(Event::Token(event)) => {
                self.left -= usize::from(event.finish.is_some());
                Some(Ok(Told::Token(event)))
            }
            Some(Event::Restarted { index }) => Some(Ok(Told::Restarted { index })),
            Some(Event::Failed(error)) => {
                self.left -= 1;
                Some(Err(error))
            }
            None => {
                self.left = 0;
                Some(Err(ApiError::internal("the engine has stopped")))
            }
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        if self.left > 0 {
            self.front.send(Command::Abort(self.group));
        }
    }
}
