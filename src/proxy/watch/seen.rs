//! What each worker says of itself: its runtime over the control connection, its queues on its own metrics page, its weights
//! at their door. One task for each worker, so that one that hangs holds up nobody's picture.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::{Method, StatusCode};
use serde::Serialize;
use tokio::time::sleep;

use super::super::ask::{Question, ask};
use super::super::health::{Standing, State};
use super::super::shared::Lane;
use super::super::upstream::Deadline;
use super::failures::What;
use super::scrape::{self, Queues};
use crate::control::{ControlError, Traffic, WeightsPhase, WeightsRequest};
use crate::telemetry::clock;

/// A page of metrics is long (vLLM: some thousand lines) and costs its worker time to make.
const SCRAPE_EVERY: Duration = Duration::from_secs(5);
/// How often a worker that has no such page, or takes no weights from us, is asked whether it has.
const SELDOM: Duration = Duration::from_secs(60);
/// A worker's end that was told within this time is the one that is seen now.
const TOLD_WITHIN_MS: u64 = 10_000;
/// Most of a transfer id that people need to find it.
const ID_CHARS: usize = 32;

/// What is known of one worker.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<Known>);

/// The last word of each kind.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    pub(crate) traffic: Option<(Instant, Traffic)>,
    pub(crate) clock: Option<Clock>,
    pub(crate) queues: Option<Queues>,
    /// Version and phase, where it takes weights from us.
    pub(crate) weights: Option<(u64, WeightsPhase)>,
    pub(crate) state: Option<State>,
}

/// How far a worker's clock is before ours.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Clock {
    pub(crate) ahead_s: f64,
    /// How far off that may be: half of what the question took.
    pub(crate) within_s: f64,
}

impl Clock {
    /// A worker was asked and has answered at these times of ours, and its own said `theirs` meanwhile; microseconds all.
    fn read(asked: u64, answered: u64, theirs: u64) -> Self {
        let half = answered.saturating_sub(asked) as f64 / 2e6;
        let since_asked = i128::from(theirs) - i128::from(asked);
        Self { ahead_s: since_asked as f64 / 1e6 - half, within_s: half }
    }
}

impl Seen {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn known(&self) -> Known {
        self.lock().clone()
    }

    /// For the metrics page: the version that serves, and the phase of an update.
    pub(crate) fn weights(&self) -> (Option<u64>, Option<WeightsPhase>) {
        let known = self.lock();
        let version = known.weights.map(|(version, _)| version);
        let runtime = known.traffic.as_ref().map(|(_, traffic)| traffic.status.weight_version);
        (version.or(runtime), known.weights.map(|(_, phase)| phase))
    }

    pub(crate) fn clock(&self) -> Option<Clock> {
        self.lock().clock
    }

    pub(crate) fn queues(&self) -> Option<Queues> {
        self.lock().queues
    }
}

/// When to ask what again.
struct Asking {
    lane: Arc<Lane>,
    number: usize,
    scrape_at: Instant,
    weights_at: Instant,
    /// The last failure of each rank's runtime that was noted, and of which life of the worker.
    noted: (u64, BTreeMap<u32, u64>),
}

/// Never ends by itself.
pub(super) async fn ask_again_and_again(lane: Arc<Lane>, number: usize) {
    let now = Instant::now();
    let mut asking = Asking { lane, number, scrape_at: now, weights_at: now, noted: (0, BTreeMap::new()) };
    loop {
        asking.look_at_health();
        if asking.lane.shared.workers[number].health.state() != State::Down {
            asking.ask_runtime().await;
            asking.ask_weights().await;
            asking.ask_queues().await;
        } else {
            let known = Known { state: Some(State::Down), ..Known::default() };
            *asking.seen().lock() = known;
            asking.scrape_at = Instant::now();
        }
        sleep(asking.lane.shared.watch.every).await;
    }
}

impl Asking {
    fn seen(&self) -> &Seen {
        &self.lane.shared.watch.seen[self.number]
    }

    /// A worker that went out is a failure to be told, whatever took it out.
    fn look_at_health(&self) {
        let shared = &self.lane.shared;
        let state = shared.workers[self.number].health.state();
        let before = self.seen().lock().state.replace(state);
        let kind = |state: State| std::mem::discriminant(&state);
        if before.is_none() || before.map(kind) == Some(kind(state)) {
            return;
        }
        match state {
            // The launcher tells how it ended.
            State::Down if shared.watch.failures.has_told_of(self.number, TOLD_WITHIN_MS) => {}
            State::Down => shared.watch.failures.note(What::Worker, Some(self.number), "it is down"),
            State::Quarantined { .. } => {
                let cause = match shared.workers[self.number].is_blamed_for_kv.load(Relaxed) {
                    true => "quarantined: decode workers cannot use the KV that it has",
                    false => "quarantined: its requests failed one after the other",
                };
                shared.watch.failures.note(What::Worker, Some(self.number), cause);
            }
            State::Starting | State::Up | State::Trial => {}
        }
    }

    async fn ask_runtime(&mut self) {
        let Some(runtime) = self.lane.shared.runtimes[self.number].clone() else { return };
        let asked = clock::unix_us();
        let traffic = runtime.traffic().await.ok();
        let answered = clock::unix_us();
        if let Some(traffic) = &traffic {
            self.note_failures(traffic);
        }
        let mut known = self.seen().lock();
        known.clock = traffic.as_ref().map(|traffic| Clock::read(asked, answered, traffic.told_unix_us));
        known.traffic = traffic.map(|traffic| (Instant::now(), traffic));
    }

    fn note_failures(&mut self, traffic: &Traffic) {
        if self.noted.0 != traffic.status.incarnation {
            self.noted = (traffic.status.incarnation, BTreeMap::new());
        }
        for failure in &traffic.failures {
            let last = self.noted.1.entry(failure.rank).or_default();
            if failure.number > *last {
                *last = failure.number;
                let id: String = failure.transfer_id.chars().take(ID_CHARS).collect();
                let cause = match failure.cause.contains(&id) {
                    true => failure.cause.clone(),
                    false => format!("transfer {id}: {}", failure.cause),
                };
                let failures = &self.lane.shared.watch.failures;
                failures.note_at(failure.at_unix_ms, What::Transfer, Some(self.number), &cause);
            }
        }
    }

    async fn ask_weights(&mut self) {
        let Some(door) = self.lane.shared.doors[self.number].clone() else { return };
        if Instant::now() < self.weights_at {
            return;
        }
        let weights = match door.weights(WeightsRequest::Status).await {
            Ok(status) => Some((status.version, status.phase)),
            Err(ControlError::Refused { .. }) => {
                self.weights_at = Instant::now() + SELDOM;
                None
            }
            Err(_) => None,
        };
        self.seen().lock().weights = weights;
    }

    async fn ask_queues(&mut self) {
        let shared = &self.lane.shared;
        let worker = &shared.workers[self.number];
        let now = Instant::now();
        if now < self.scrape_at || worker.health.standing(now) < Standing::OnTrial {
            return;
        }
        let question = Question { method: &Method::GET, path: "/metrics", headers: b"", body: b"" };
        let deadline = Deadline::after(tokio::time::Instant::now(), shared.limits.health);
        let reply = ask(&self.lane, worker, question, deadline).await.ok();
        let page = reply.as_ref().filter(|reply| reply.status.is_success());
        let queues = page.and_then(|page| scrape::read(&page.body));
        // A page that says nothing of queues, or that is not there, will not soon. One that comes late, from a busy worker, will.
        let has_none =
            queues.is_none() && (page.is_some() || reply.is_some_and(|reply| reply.status == StatusCode::NOT_FOUND));
        self.scrape_at = Instant::now() + if has_none { SELDOM } else { SCRAPE_EVERY.max(shared.watch.every) };
        self.seen().lock().queues = queues;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_read_within_half_of_what_the_question_took() {
        assert_eq!(Clock::read(1_000_000, 1_200_000, 1_100_000), Clock { ahead_s: 0.0, within_s: 0.1 });
        assert_eq!(Clock::read(10_000_000, 10_500_000, 12_750_000), Clock { ahead_s: 2.5, within_s: 0.25 });
        assert_eq!(Clock::read(10_000_000, 10_000_000, 9_000_000), Clock { ahead_s: -1.0, within_s: 0.0 });
    }
}
