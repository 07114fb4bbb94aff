//! A worker's life as a pure machine: events and the time go in, what to do comes out.
//!
//! ```text
//!          Start            Healthy
//! Idle ───────────► Starting ──────► Ready
//!                     ▲  │             │ Exited, restart = on-failure
//!            time     │  │ time-out    ▼
//!          Waiting ───┘  └► Ending ◄─ Waiting …          any ── Stop, Halt ──► Ending ── Exited ──► Over
//! ```
//!
//! - A worker that ends before it was ever ready ends the run: a wrong setting does not heal by trying again.
//! - Later, `on-failure` starts it again after a pause that doubles with each failure, up to a bound; a worker that was
//!   ready for [`Limits::stable`] counts as healed. Exit status 0 is a failure too: a server was not asked to end.
//! - Nothing is started after `Stop`.

use std::time::Duration;

use super::exit::Exit;
use crate::config::{LauncherConfig, Restart};

/// How long a worker must have been ready for its next failure to count as the first.
const STABLE: Duration = Duration::from_secs(10);

/// The times and the policy that a life obeys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub restart: Restart,
    pub backoff: Duration,
    pub backoff_max: Duration,
    pub ready_timeout: Duration,
    pub stable: Duration,
}

impl Limits {
    pub fn new(config: &LauncherConfig) -> Self {
        Self {
            restart: config.restart,
            backoff: seconds(config.restart_backoff_s),
            backoff_max: seconds(config.restart_backoff_max_s),
            ready_timeout: seconds(config.ready_timeout_s),
            stable: STABLE,
        }
    }

    fn pause(&self, failures: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
        self.backoff.saturating_mul(doubled).min(self.backoff_max)
    }
}

/// A setting in seconds as a time; the configuration has checked its range.
pub fn seconds(value: f64) -> Duration {
    Duration::try_from_secs_f64(value).unwrap_or(Duration::MAX)
}

/// What happens to a worker. Times are since the start of the run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Start,
    /// `/health` and `/v1/models` answered.
    Healthy,
    /// The worker and its whole tree have ended, or it could not be started.
    Exited(Exit),
    /// The time of the last [`Action::WakeAt`] has come.
    Tick,
    /// The run ends in order.
    Stop,
    /// The run ends now.
    Halt,
}

/// What to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start the worker and begin to probe it.
    Spawn {
        attempt: u32,
    },
    /// Ask it to end; its guard kills it after the grace period.
    Terminate,
    /// Kill its tree.
    Kill,
    WakeAt(Duration),
    Tell(Notice),
}

/// What people should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// It serves, this long after its start.
    Ready { took: Duration },
    /// It ended by itself, or did not get ready in time, and is started again after `pause`.
    Restarts { cause: Cause, pause: Duration },
    /// It ended by itself and the run ends for it.
    GivenUp { cause: Cause },
    /// It ended because it was asked to.
    Ended { exit: Exit },
}

/// Why a worker is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    Exited { exit: Exit, was_ready: bool },
    NotReadyInTime { limit: Duration },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Starting {
        since: Duration,
    },
    Ready {
        since: Duration,
    },
    Waiting {
        until: Duration,
    },
    /// Asked to end; started again afterwards if it was asked for being late.
    Ending {
        late: bool,
    },
    Over,
}

/// One worker's life.
#[derive(Debug, Clone)]
pub struct Life {
    limits: Limits,
    state: State,
    attempts: u32,
    failures: u32,
    was_ever_ready: bool,
}

impl Life {
    pub fn new(limits: Limits) -> Self {
        Self { limits, state: State::Idle, attempts: 0, failures: 0, was_ever_ready: false }
    }

    /// Whether nothing more will happen.
    pub fn is_over(&self) -> bool {
        self.state == State::Over
    }

    pub fn is_ready(&self) -> bool {
        matches!(self.state, State::Ready { .. })
    }

    /// Takes one event. An event that means nothing in this state (a late probe, a tick that was overtaken) is ignored.
    pub fn on(&mut self, event: Event, now: Duration) -> Vec<Action> {
        match (self.state, event) {
            (State::Idle, Event::Start) => self.start(now),
            (State::Waiting { until }, Event::Tick) if now >= until => self.start(now),
            (State::Starting { since }, Event::Healthy) => {
                self.state = State::Ready { since: now };
                self.was_ever_ready = true;
                vec![Action::Tell(Notice::Ready { took: now.saturating_sub(since) })]
            }
            (State::Starting { since }, Event::Tick) if now >= since + self.limits.ready_timeout => {
                self.state = State::Ending { late: true };
                vec![Action::Terminate]
            }
            (State::Starting { .. }, Event::Exited(exit)) => self.failed(Cause::Exited { exit, was_ready: false }, now),
            (State::Ready { since }, Event::Exited(exit)) => {
                if now.saturating_sub(since) >= self.limits.stable {
                    self.failures = 0;
                }
                self.failed(Cause::Exited { exit, was_ready: true }, now)
            }
            (State::Ending { late: true }, Event::Exited(_)) => {
                self.failed(Cause::NotReadyInTime { limit: self.limits.ready_timeout }, now)
            }
            (State::Ending { late: false }, Event::Exited(exit)) => {
                self.state = State::Over;
                vec![Action::Tell(Notice::Ended { exit })]
            }
            (State::Starting { .. } | State::Ready { .. }, Event::Stop) => {
                self.state = State::Ending { late: false };
                vec![Action::Terminate]
            }
            (State::Starting { .. } | State::Ready { .. } | State::Ending { .. }, Event::Halt) => {
                self.state = State::Ending { late: false };
                vec![Action::Kill]
            }
            (State::Ending { late: true }, Event::Stop) => {
                self.state = State::Ending { late: false };
                Vec::new()
            }
            (State::Idle | State::Waiting { .. }, Event::Stop | Event::Halt) => {
                self.state = State::Over;
                Vec::new()
            }
            _ => Vec::new(),
        }
    }

    fn start(&mut self, now: Duration) -> Vec<Action> {
        self.attempts += 1;
        self.state = State::Starting { since: now };
        let deadline = now.saturating_add(self.limits.ready_timeout);
        vec![Action::Spawn { attempt: self.attempts }, Action::WakeAt(deadline)]
    }

    fn failed(&mut self, cause: Cause, now: Duration) -> Vec<Action> {
        if !self.was_ever_ready || self.limits.restart == Restart::Never {
            self.state = State::Over;
            return vec![Action::Tell(Notice::GivenUp { cause })];
        }
        self.failures += 1;
        let pause = self.limits.pause(self.failures);
        let until = now.saturating_add(pause);
        self.state = State::Waiting { until };
        vec![Action::Tell(Notice::Restarts { cause, pause }), Action::WakeAt(until)]
    }
}

#[cfg(test)]
mod tests {
    use super::Action::{Kill, Spawn, Tell, Terminate, WakeAt};
    use super::Event::{Exited, Halt, Healthy, Start, Stop, Tick};
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn limits(restart: Restart) -> Limits {
        Limits { restart, backoff: s(1), backoff_max: s(5), ready_timeout: s(100), stable: s(60) }
    }

    fn died(code: i32, was_ready: bool) -> Cause {
        Cause::Exited { exit: Exit::Code(code), was_ready }
    }

    fn restarts(cause: Cause, pause: u64) -> Action {
        Tell(Notice::Restarts { cause, pause: s(pause) })
    }

    fn ready(took: u64) -> Action {
        Tell(Notice::Ready { took: s(took) })
    }

    type Step = (u64, Event, Vec<Action>);

    fn spawn(attempt: u32, deadline: u64) -> Vec<Action> {
        vec![Spawn { attempt }, WakeAt(s(deadline))]
    }

    fn check(name: &str, restart: Restart, steps: Vec<Step>, over: bool) {
        let mut life = Life::new(limits(restart));
        for (at, event, want) in steps {
            assert_eq!(life.on(event.clone(), s(at)), want, "case: {name}, at {at} s: {event:?}");
        }
        assert_eq!(life.is_over(), over, "case: {name}");
    }

    #[test]
    fn a_worker_lives_by_the_policy() {
        use Restart::{Never, OnFailure};
        let exit = |code| Exited(Exit::Code(code));
        let cases: Vec<(&str, Restart, Vec<Step>, bool)> = vec![
            (
                "started, ready, ended in order",
                OnFailure,
                vec![
                    (0, Start, spawn(1, 100)),
                    (3, Healthy, vec![ready(3)]),
                    (9, Stop, vec![Terminate]),
                    (10, exit(0), vec![Tell(Notice::Ended { exit: Exit::Code(0) })]),
                    (11, Start, vec![]),
                ],
                true,
            ),
            (
                "ended before it was ever ready",
                OnFailure,
                vec![(0, Start, spawn(1, 100)), (1, exit(2), vec![Tell(Notice::GivenUp { cause: died(2, false) })])],
                true,
            ),
            (
                "never restarted",
                Never,
                vec![
                    (0, Start, spawn(1, 100)),
                    (1, Healthy, vec![ready(1)]),
                    (2, exit(1), vec![Tell(Notice::GivenUp { cause: died(1, true) })]),
                ],
                true,
            ),
            (
                "restarted with a pause that doubles up to its bound, and heals",
                OnFailure,
                vec![
                    (0, Start, spawn(1, 100)),
                    (1, Healthy, vec![ready(1)]),
                    (2, exit(0), vec![restarts(died(0, true), 1), WakeAt(s(3))]),
                    (3, Tick, spawn(2, 103)),
                    (4, exit(1), vec![restarts(died(1, false), 2), WakeAt(s(6))]),
                    (5, Tick, vec![]),
                    (6, Tick, spawn(3, 106)),
                    (7, exit(1), vec![restarts(died(1, false), 4), WakeAt(s(11))]),
                    (11, Tick, spawn(4, 111)),
                    (12, exit(1), vec![restarts(died(1, false), 5), WakeAt(s(17))]),
                    (17, Tick, spawn(5, 117)),
                    (20, Healthy, vec![ready(3)]),
                    (80, exit(1), vec![restarts(died(1, true), 1), WakeAt(s(81))]),
                ],
                false,
            ),
            (
                "late at the first start",
                OnFailure,
                vec![
                    (0, Start, spawn(1, 100)),
                    (99, Tick, vec![]),
                    (100, Tick, vec![Terminate]),
                    (101, Healthy, vec![]),
                    (102, exit(0), vec![Tell(Notice::GivenUp { cause: Cause::NotReadyInTime { limit: s(100) } })]),
                ],
                true,
            ),
            (
                "late at a restart",
                OnFailure,
                vec![
                    (0, Start, spawn(1, 100)),
                    (1, Healthy, vec![ready(1)]),
                    (2, exit(1), vec![restarts(died(1, true), 1), WakeAt(s(3))]),
                    (3, Tick, spawn(2, 103)),
                    (103, Tick, vec![Terminate]),
                    (104, exit(0), vec![restarts(Cause::NotReadyInTime { limit: s(100) }, 2), WakeAt(s(106))]),
                ],
                false,
            ),
            (
                "stopped while it waits to be restarted",
                OnFailure,
                vec![
                    (0, Start, spawn(1, 100)),
                    (1, Healthy, vec![ready(1)]),
                    (2, exit(1), vec![restarts(died(1, true), 1), WakeAt(s(3))]),
                    (2, Stop, vec![]),
                    (3, Tick, vec![]),
                ],
                true,
            ),
            (
                "halted while it ends",
                OnFailure,
                vec![
                    (0, Start, spawn(1, 100)),
                    (1, Stop, vec![Terminate]),
                    (2, Halt, vec![Kill]),
                    (2, Exited(Exit::Signal(9)), vec![Tell(Notice::Ended { exit: Exit::Signal(9) })]),
                ],
                true,
            ),
            ("stopped before it was started", OnFailure, vec![(0, Stop, vec![]), (1, Start, vec![])], true),
        ];
        for (name, restart, steps, over) in cases {
            check(name, restart, steps, over);
        }
    }
}
