//! Whether the hosts' clocks agree. Leases and timeouts are spans of time, so KV does not depend on it; traces, records and logs of
//! several hosts do: with clocks apart, a transfer ends before its prompt was computed.

use super::super::check::Answer;
use super::super::setting::Shared;
use super::exam::{Clock, Seen, Worker};

/// A request's steps are tens of milliseconds long.
const APART_S: f64 = 0.1;

pub(super) fn check(_: &Shared, seen: &Seen) -> Answer {
    judge(&seen.workers)
}

fn judge(workers: &[Worker]) -> Answer {
    let told: Vec<(&str, Clock)> =
        workers.iter().filter_map(|worker| Some((worker.url.as_str(), worker.clock?))).collect();
    let Some(farthest) = told.iter().max_by(|one, other| apart(one.1).total_cmp(&apart(other.1))) else {
        return Answer::skipped("no worker tells its clock: that takes a runtime of pdlink's that the proxy asks");
    };
    let wrong: Vec<String> =
        told.iter().filter(|(_, clock)| apart(*clock) > APART_S).map(|(url, clock)| in_words(url, *clock)).collect();
    let answer = if wrong.is_empty() {
        Answer::ok(format!(
            "{} workers' clocks agree with the proxy's; farthest: {}",
            told.len(),
            in_words(farthest.0, farthest.1)
        ))
    } else {
        Answer::warn(
            format!("{}: traces, records and logs of these hosts cannot be put in order", wrong.join("; ")),
            "let one time server set the clocks of all hosts (chronyd, systemd-timesyncd); `chronyc tracking` says how far one is off",
        )
    };
    answer.with("ahead_s", told.iter().map(|(_, clock)| clock.ahead_s).collect::<Vec<_>>())
}

/// What a clock is off for certain.
fn apart(clock: Clock) -> f64 {
    (clock.ahead_s.abs() - clock.within_s).max(0.0)
}

fn in_words(url: &str, clock: Clock) -> String {
    let side = if clock.ahead_s < 0.0 { "behind" } else { "ahead" };
    format!("{url} is {:.1} ms {side}, ± {:.1} ms", clock.ahead_s.abs() * 1e3, clock.within_s * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::check::Verdict;

    fn worker(url: &str, clock: Option<(f64, f64)>) -> Worker {
        let clock = clock.map(|(ahead_s, within_s)| Clock { ahead_s, within_s });
        Worker { url: url.to_owned(), role: "decode".to_owned(), state: "up".to_owned(), clock }
    }

    #[test]
    fn a_clock_that_is_off_for_certain_is_named() {
        assert_eq!(judge(&[worker("a", None)]).result, Verdict::Skipped);
        let right = judge(&[worker("a", Some((0.001, 0.002))), worker("b", Some((-0.3, 0.4))), worker("c", None)]);
        assert_eq!((right.result, right.seen.contains("2 workers' clocks")), (Verdict::Ok, true), "{}", right.seen);
        let wrong = judge(&[worker("a", Some((0.0, 0.1))), worker("b", Some((-1.5, 0.001)))]);
        assert_eq!(wrong.result, Verdict::Warn);
        assert!(wrong.seen.starts_with("b is 1500.0 ms behind, ± 1.0 ms: traces"), "{}", wrong.seen);
    }
}
