//! Asks checks, several at once, each on a thread of its own and no longer than it may take.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use super::check::{Answer, Check, Group};

/// One check that was asked.
#[derive(Debug, Clone)]
pub(super) struct Answered {
    pub(super) group: Group,
    pub(super) name: String,
    pub(super) answer: Answer,
    pub(super) took: Duration,
}

/// How far it has come.
#[derive(Debug)]
pub struct Progress<'a> {
    /// The checks that are being asked.
    pub asking: Vec<&'a str>,
    pub answered: usize,
    pub of: usize,
}

/// A check that is being asked.
struct Open {
    index: usize,
    group: Group,
    name: String,
    within: Duration,
    started: Instant,
}

/// The answers, in the order of the questions. A check that does not answer in time is left to itself: its thread ends
/// with the process.
pub(super) fn ask(checks: Vec<Check>, at_once: usize, tell: &dyn Fn(&Progress<'_>)) -> Vec<Answered> {
    let of = checks.len();
    let mut waiting: VecDeque<(usize, Check)> = checks.into_iter().enumerate().collect();
    let mut open: Vec<Open> = Vec::new();
    let mut answered: Vec<(usize, Answered)> = Vec::new();
    let (done, ended) = mpsc::channel();
    while !waiting.is_empty() || !open.is_empty() {
        while open.len() < at_once
            && let Some((index, check)) = waiting.pop_front()
        {
            open.push(start(index, check, &done));
        }
        let asking = open.iter().map(|open| open.name.as_str()).collect();
        tell(&Progress { asking, answered: answered.len(), of });
        let next = open.iter().map(|open| open.started + open.within).min().unwrap_or_else(Instant::now);
        match ended.recv_timeout(next.saturating_duration_since(Instant::now())) {
            Ok((index, answer)) => answered.extend(close(&mut open, |open| open.index == index, answer)),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let late = |open: &Open| open.started.elapsed() >= open.within;
                let within = open.iter().find(|open| late(open)).map_or(Duration::ZERO, |open| open.within);
                answered.extend(close(&mut open, late, silent(within)));
            }
        }
    }
    answered.sort_by_key(|(index, _)| *index);
    answered.into_iter().map(|(_, answered)| answered).collect()
}

fn silent(within: Duration) -> Answer {
    Answer::fail(
        format!("no answer within {:.0} s", within.as_secs_f64()),
        "what it looks at hangs; run `pdlink doctor` again, and look at that by hand if it hangs again",
    )
}

fn start(index: usize, check: Check, done: &Sender<(usize, Answer)>) -> Open {
    let Check { group, name, within, ask } = check;
    let tell = done.clone();
    let run = move || {
        let answer = catch_unwind(AssertUnwindSafe(ask)).unwrap_or_else(|_| {
            Answer::fail("the check itself broke (its panic is above)", "report this as a fault of pdlink")
        });
        // Nobody listens any more once it was too late.
        let _ = tell.send((index, answer));
    };
    if let Err(error) = std::thread::Builder::new().name(format!("doctor-{name}")).spawn(run) {
        let answer = Answer::fail(format!("no thread for it: {error}"), "raise the limit on processes (`ulimit -u`)");
        let _ = done.send((index, answer));
    }
    Open { index, group, name, within, started: Instant::now() }
}

/// The first open check that is meant, with its answer. An answer that comes too late finds none.
fn close(open: &mut Vec<Open>, meant: impl Fn(&Open) -> bool, answer: Answer) -> Option<(usize, Answered)> {
    let at = open.iter().position(meant)?;
    let Open { index, group, name, started, .. } = open.remove(at);
    Some((index, Answered { group, name, answer, took: started.elapsed() }))
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::*;

    fn check(name: &str, within_ms: u64, ask: impl FnOnce() -> Answer + Send + 'static) -> Check {
        Check::new(Group::Machine, name, Duration::from_millis(within_ms), ask)
    }

    #[test]
    fn one_that_hangs_and_one_that_breaks_are_named_and_hold_up_nobody() {
        let (_keep, never) = mpsc::channel::<()>();
        let hang = move || {
            let _ = never.recv();
            Answer::ok("late")
        };
        let checks = vec![
            check("hangs", 50, hang),
            check("breaks", 60_000, || panic!("on purpose")),
            check("answers", 60_000, || Answer::ok("fine")),
            check("waits", 60_000, || Answer::skipped("not here")),
        ];
        let answered = ask(checks, 2, &|_| {});
        let told: Vec<_> = answered.iter().map(|one| (one.name.as_str(), one.answer.result)).collect();
        let want = [
            ("hangs", Verdict::Fail),
            ("breaks", Verdict::Fail),
            ("answers", Verdict::Ok),
            ("waits", Verdict::Skipped),
        ];
        assert_eq!(told, want);
        assert!(answered[0].answer.seen.contains("no answer"), "{:?}", answered[0].answer);
    }
}
