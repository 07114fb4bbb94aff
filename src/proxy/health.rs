//! Whether one worker may be given a request: a machine with the time as an argument.
//!
//! ```text
//! Starting ── probe answered ──► Up ── failures in a row ──► Quarantined ── time over ──► Trial (one request)
//!     ▲                          ▲ ▲                              ▲                        │        │
//!     │                          │ └── trial succeeded ───────────┼────────────────────────┘        │
//!     │                          │                                └──────── trial failed ───────────┘
//!    (new)                 probe answered ◄── Down ◄── probes failed, or the launcher said so (from any state)
//! ```
//!
//! A request that ends without a verdict (the client left) gives its trial back. PX-2 is held here and in `pool`.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where a worker stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Not heard of yet. It gets requests only if no worker of its role is up.
    Starting,
    Up,
    Quarantined {
        until: Instant,
    },
    /// Half open: one request is out to see whether the worker serves again.
    Trial,
    Down,
}

impl State {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Up => "up",
            Self::Quarantined { .. } => "quarantined",
            Self::Trial => "trial",
            Self::Down => "down",
        }
    }
}

/// How sure one can be that a worker serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    Out,
    /// Not heard of yet: a last resort.
    Unproven,
    /// Out of quarantine: good for one request.
    OnTrial,
    Good,
}

/// When a worker is quarantined and when it counts as down.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    pub(crate) quarantine_after_failures: u32,
    pub(crate) quarantine: Duration,
    pub(crate) down_after_probes: u32,
}

/// The state of one worker, shared by all threads. While it is up and faultless, asking and reporting take no lock.
#[derive(Debug)]
pub(crate) struct Health {
    rules: Rules,
    /// Kept out whatever its state: its weights are not the fleet's (WT-1).
    barred: AtomicBool,
    /// Kept out whatever its state: its node leaves, and it finishes what it has.
    leaves: AtomicBool,
    up: AtomicBool,
    /// Requests that failed in a row.
    failures: AtomicU32,
    /// Probes that failed in a row.
    failed_probes: AtomicU32,
    state: Mutex<State>,
}

impl Health {
    pub(crate) fn new(rules: Rules) -> Self {
        Self {
            rules,
            barred: AtomicBool::new(false),
            leaves: AtomicBool::new(false),
            up: AtomicBool::new(false),
            failures: AtomicU32::new(0),
            failed_probes: AtomicU32::new(0),
            state: Mutex::new(State::Starting),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, state: &mut State, to: State) {
        *state = to;
        self.up.store(to == State::Up, Ordering::Release);
    }

    pub(crate) fn state(&self) -> State {
        *self.lock()
    }

    pub(crate) fn standing(&self, now: Instant) -> Standing {
        if self.is_kept_out() {
            return Standing::Out;
        }
        if self.up.load(Ordering::Acquire) {
            return Standing::Good;
        }
        match *self.lock() {
            State::Up => Standing::Good,
            State::Quarantined { until } if now >= until => Standing::OnTrial,
            State::Starting => Standing::Unproven,
            State::Quarantined { .. } | State::Trial | State::Down => Standing::Out,
        }
    }

    /// Keeps the worker out, or lets it in again. True if that was not so before.
    pub(crate) fn bar(&self, barred: bool) -> bool {
        self.barred.swap(barred, Ordering::AcqRel) != barred
    }

    pub(crate) fn is_barred(&self) -> bool {
        self.barred.load(Ordering::Acquire)
    }

    fn is_kept_out(&self) -> bool {
        self.is_barred() || self.leaves.load(Ordering::Acquire)
    }

    /// Takes the worker for one request. `None` if it went out meanwhile; `Some(true)` if the request is its trial.
    pub(crate) fn admit(&self, now: Instant) -> Option<bool> {
        if self.is_kept_out() {
            return None;
        }
        if self.up.load(Ordering::Acquire) {
            return Some(false);
        }
        let mut state = self.lock();
        match *state {
            State::Up | State::Starting => Some(false),
            State::Quarantined { until } if now >= until => {
                self.set(&mut state, State::Trial);
                Some(true)
            }
            State::Quarantined { .. } | State::Trial | State::Down => None,
        }
    }

    /// A request was answered. That says as much as an answered probe: a server too busy for `/health` still serves.
    pub(crate) fn succeeded(&self) {
        if self.failed_probes.load(Ordering::Relaxed) != 0 {
            self.failed_probes.store(0, Ordering::Relaxed);
        }
        if self.up.load(Ordering::Acquire) && self.failures.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut state = self.lock();
        self.failures.store(0, Ordering::Relaxed);
        if matches!(*state, State::Trial | State::Starting) {
            self.set(&mut state, State::Up);
        }
    }

    /// A request failed by the worker's fault. True if that put it in quarantine.
    pub(crate) fn failed(&self, now: Instant) -> bool {
        let mut state = self.lock();
        let failures = self.failures.fetch_add(1, Ordering::Relaxed) + 1;
        let quarantine = match *state {
            State::Trial => true,
            State::Up | State::Starting => failures >= self.rules.quarantine_after_failures,
            State::Quarantined { .. } | State::Down => false,
        };
        if quarantine {
            self.set(&mut state, State::Quarantined { until: now + self.rules.quarantine });
        }
        quarantine
    }

    /// So many hand-overs of its KV failed in a row, whatever it answered itself. True if that put it in quarantine.
    pub(crate) fn distrusted(&self, handovers: u32, now: Instant) -> bool {
        let mut state = self.lock();
        let quarantine = handovers >= self.rules.quarantine_after_failures
            && matches!(*state, State::Up | State::Starting | State::Trial);
        if quarantine {
            self.set(&mut state, State::Quarantined { until: now + self.rules.quarantine });
        }
        quarantine
    }

    /// A trial ended without a verdict: the next request may be one.
    pub(crate) fn undecided(&self, now: Instant) {
        let mut state = self.lock();
        if *state == State::Trial {
            self.set(&mut state, State::Quarantined { until: now });
        }
    }

    /// `/health` was answered. True if that brought the worker up.
    pub(crate) fn probe_answered(&self) -> bool {
        self.failed_probes.store(0, Ordering::Relaxed);
        let mut state = self.lock();
        let rises = matches!(*state, State::Starting | State::Down);
        if rises {
            self.failures.store(0, Ordering::Relaxed);
            self.set(&mut state, State::Up);
        }
        rises
    }

    /// `/health` was not answered. True if that took the worker down.
    pub(crate) fn probe_failed(&self) -> bool {
        let failed = self.failed_probes.fetch_add(1, Ordering::Relaxed) + 1;
        let mut state = self.lock();
        let falls = failed >= self.rules.down_after_probes && !matches!(*state, State::Down | State::Starting);
        if falls {
            self.set(&mut state, State::Down);
        }
        falls
    }

    /// Somebody who knows (the launcher) says that the worker has ended.
    pub(crate) fn went_down(&self) {
        let mut state = self.lock();
        self.set(&mut state, State::Down);
    }

    /// Somebody who knows says that it takes nothing more, until it is said to serve again: it still answers probes.
    pub(crate) fn leaves(&self) {
        self.leaves.store(true, Ordering::Release);
    }

    /// Somebody who knows says that it serves.
    pub(crate) fn came_up(&self) {
        let mut state = self.lock();
        self.leaves.store(false, Ordering::Release);
        self.failures.store(0, Ordering::Relaxed);
        self.failed_probes.store(0, Ordering::Relaxed);
        self.set(&mut state, State::Up);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules =
        Rules { quarantine_after_failures: 2, quarantine: Duration::from_secs(5), down_after_probes: 2 };

    fn up() -> (Health, Instant) {
        let health = Health::new(RULES);
        assert_eq!(health.standing(Instant::now()), Standing::Unproven);
        assert!(health.probe_answered());
        (health, Instant::now())
    }

    #[test]
    // PX-2.
    fn px_2_failures_in_a_row_quarantine_and_one_trial_brings_back() {
        let (health, now) = up();
        assert!(!health.failed(now));
        health.succeeded();
        assert!(!health.failed(now), "a success in between starts the count anew");
        assert!(health.failed(now));
        assert_eq!(health.standing(now), Standing::Out);
        let later = now + RULES.quarantine;
        assert_eq!(health.standing(later), Standing::OnTrial);
        assert_eq!(health.admit(later), Some(true));
        assert_eq!(health.admit(later), None, "half open lets one through");
        health.succeeded();
        assert_eq!(health.admit(later), Some(false));
    }

    #[test]
    fn a_worker_that_leaves_is_kept_out_though_it_answers_probes_until_it_is_said_to_serve() {
        let (health, now) = up();
        health.leaves();
        health.probe_answered();
        assert_eq!((health.standing(now), health.admit(now)), (Standing::Out, None));
        health.came_up();
        assert_eq!(health.admit(now), Some(false));
    }

    #[test]
    // PX-2.
    fn px_2_failed_hand_overs_quarantine_a_worker_that_answers_everything_itself() {
        let (health, now) = up();
        health.succeeded();
        assert!(!health.distrusted(RULES.quarantine_after_failures - 1, now));
        assert!(health.distrusted(RULES.quarantine_after_failures, now));
        assert!(!health.distrusted(RULES.quarantine_after_failures, now), "it is there already");
        assert_eq!(health.standing(now), Standing::Out);
        assert_eq!(health.standing(now + RULES.quarantine), Standing::OnTrial);
    }

    #[test]
    // PX-2.
    fn px_2_a_failed_trial_is_a_new_quarantine_and_an_undecided_one_is_not() {
        let (health, now) = up();
        health.failed(now);
        health.failed(now);
        let later = now + RULES.quarantine;
        assert_eq!(health.admit(later), Some(true));
        health.undecided(later);
        assert_eq!(health.admit(later), Some(true));
        assert!(health.failed(later));
        assert_eq!(health.standing(later), Standing::Out);
        assert_eq!(health.standing(later + RULES.quarantine), Standing::OnTrial);
    }

    #[test]
    fn probes_take_a_worker_down_and_bring_it_back() {
        let (health, now) = up();
        assert!(!health.probe_failed());
        assert!(health.probe_failed());
        assert_eq!(health.standing(now), Standing::Out);
        assert!(health.probe_answered());
        assert_eq!(health.standing(now), Standing::Good);
    }

    #[test]
    fn a_worker_that_answers_requests_is_not_down_for_want_of_a_health_answer() {
        let (health, now) = up();
        for _ in 0..5 {
            assert!(!health.probe_failed());
            health.succeeded();
        }
        assert_eq!(health.standing(now), Standing::Good);
    }

    #[test]
    fn a_probe_does_not_cut_a_quarantine_short() {
        let (health, now) = up();
        health.failed(now);
        health.failed(now);
        assert!(!health.probe_answered());
        assert_eq!(health.standing(now), Standing::Out);
    }

    #[test]
    fn the_launcher_is_believed_at_once() {
        let (health, now) = up();
        health.went_down();
        assert_eq!(health.standing(now), Standing::Out);
        health.came_up();
        assert_eq!(health.standing(now), Standing::Good);
    }
}
