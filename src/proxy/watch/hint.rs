//! Which pool is short of workers, and by how many: a pure function of what the pools carry.
//!
//! A pool carries as much as its busy workers; what waits there is what it does not get done. So a pool whose workers are
//! busy nine tenths of the time, and where as much waits as is being worked on, needs nearly twice its workers. A queue
//! without busy workers (they load, or the proxy has not sent it yet) and busy workers without a queue are both fine.

use std::fmt;

use serde::Serialize;

/// How busy a pool of the right size is: more leaves no room for the uneven way in which requests come.
const TARGET_UTILISATION: f64 = 0.85;
/// Less than this waiting at each worker, on average, is no queue.
const WAITING_MIN: f64 = 0.5;
/// A queue of a moment says how long people wait, not how many workers are missing: it counts as at most so many times
/// what is being worked on.
const BACKLOG_MAX: f64 = 3.0;
/// A fleet that does less than this says nothing about its balance.
const LOAD_MIN: f64 = 0.05;
/// How often in a row a hint must be found before it is shown.
const STEADY_TIMES: u32 = 5;

/// What one pool carried lately, on average.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub(crate) struct PoolLoad {
    /// Workers that serve.
    pub(crate) workers: u32,
    /// Requests being worked on, and requests that wait for their turn, over all workers.
    pub(crate) running: f64,
    pub(crate) waiting: f64,
    /// 0 to 1. Prefill: the part of the time in which a worker had a prompt. Decode: the part of the KV blocks in use.
    pub(crate) utilisation: Option<f64>,
}

/// What to do about the pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub(crate) enum Hint {
    /// Nothing to tell it by.
    #[default]
    Idle,
    Balanced,
    /// `prefill` or `decode` needs so many workers more; the other could give some.
    Short {
        pool: &'static str,
        by: u32,
        spare: u32,
    },
    BothShort {
        prefill: u32,
        decode: u32,
    },
}

impl PoolLoad {
    /// Workers that would carry all of it at the target, as a number with a fraction.
    fn needed(&self) -> f64 {
        let busy = self.utilisation.unwrap_or(if self.waiting > 0.0 { 1.0 } else { 0.0 }).clamp(0.0, 1.0);
        let backlog = (self.waiting / self.running.max(1.0)).min(BACKLOG_MAX);
        f64::from(self.workers) * busy * (1.0 + backlog) / TARGET_UTILISATION
    }

    /// Workers missing. None while nobody waits, however busy all are.
    pub(crate) fn short_by(&self) -> u32 {
        if self.workers == 0 || self.waiting < WAITING_MIN * f64::from(self.workers) {
            return 0;
        }
        whole(self.needed().ceil()).saturating_sub(self.workers)
    }

    /// Workers that could go, without one of them short; the last one never.
    fn spare(&self) -> u32 {
        if self.short_by() > 0 {
            return 0;
        }
        self.workers.saturating_sub(whole(self.needed().ceil()).max(1))
    }

    fn is_idle(&self) -> bool {
        self.running + self.waiting < LOAD_MIN
    }
}

fn whole(number: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number of workers")]
    let whole = number.clamp(0.0, 1e6) as u32;
    whole
}

/// What the two pools' loads say. Plain workers are a decode pool alone.
pub(crate) fn hint(prefill: Option<PoolLoad>, decode: PoolLoad) -> Hint {
    let of_prefill = prefill.unwrap_or_default();
    if of_prefill.is_idle() && decode.is_idle() {
        return Hint::Idle;
    }
    match (of_prefill.short_by(), decode.short_by()) {
        (0, 0) => Hint::Balanced,
        (by, 0) => Hint::Short { pool: "prefill", by, spare: decode.spare() },
        (0, by) => Hint::Short { pool: "decode", by, spare: of_prefill.spare() },
        (prefill, decode) => Hint::BothShort { prefill, decode },
    }
}

impl Hint {
    /// Workers that a pool is short of.
    pub(crate) fn short_of(self, role: &str) -> u32 {
        match self {
            Self::Short { pool, by, .. } if pool == role => by,
            Self::BothShort { prefill, .. } if role == "prefill" => prefill,
            Self::BothShort { decode, .. } if role == "decode" => decode,
            _ => 0,
        }
    }
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let workers = |count: u32| if count == 1 { "worker" } else { "workers" };
        match *self {
            Self::Idle => f.write_str("too little to do to tell"),
            Self::Balanced => f.write_str("balanced: neither pool is short"),
            Self::Short { pool, by, spare: 0 } => write!(f, "{pool} is short by {by} {}", workers(by)),
            Self::Short { pool, by, spare } => {
                let other = if pool == "prefill" { "decode" } else { "prefill" };
                write!(f, "{pool} is short by {by} {}; {other} could give {spare}", workers(by))
            }
            Self::BothShort { prefill, decode } => write!(
                f,
                "both pools are short: prefill by {prefill} {}, decode by {decode} {}",
                workers(prefill),
                workers(decode)
            ),
        }
    }
}

/// Shows a hint only once it has been found several times in a row: a burst is no reason to move workers.
#[derive(Debug, Default)]
pub(crate) struct Steady {
    shown: Hint,
    found: Hint,
    times: u32,
}

impl Steady {
    /// Takes what was found now. `Some`: it is another from now on.
    pub(crate) fn feed(&mut self, found: Hint) -> Option<Hint> {
        self.times = if found == self.found { self.times.saturating_add(1) } else { 1 };
        self.found = found;
        if self.found == self.shown || self.times < STEADY_TIMES {
            return None;
        }
        self.shown = found;
        Some(found)
    }

    pub(crate) fn shown(&self) -> Hint {
        self.shown
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(workers: u32, running: f64, waiting: f64, utilisation: f64) -> PoolLoad {
        PoolLoad { workers, running, waiting, utilisation: Some(utilisation) }
    }

    fn short(pool: &'static str, by: u32, spare: u32) -> Hint {
        Hint::Short { pool, by, spare }
    }

    #[test]
    fn the_pool_where_requests_wait_is_the_short_one() {
        let calm = load(2, 20.0, 0.0, 0.4);
        let cases = [
            ("nothing happens", load(2, 0.0, 0.0, 0.0), load(2, 0.0, 0.0, 0.0), Hint::Idle),
            ("busy, nobody waits", load(2, 2.0, 0.2, 1.0), calm, Hint::Balanced),
            ("as much waits as runs", load(2, 2.0, 2.0, 0.9), calm, short("prefill", 3, 1)),
            ("a little queue", load(4, 4.0, 2.0, 1.0), calm, short("prefill", 4, 1)),
            ("an endless queue counts threefold", load(1, 1.0, 500.0, 1.0), calm, short("prefill", 4, 1)),
            ("decode is full", load(4, 1.0, 0.0, 0.2), load(2, 60.0, 30.0, 0.95), short("decode", 2, 3)),
            ("a queue before idle workers is not for want of them", load(2, 0.0, 5.0, 0.05), calm, Hint::Balanced),
            ("both", load(1, 1.0, 1.0, 1.0), load(1, 30.0, 30.0, 1.0), Hint::BothShort { prefill: 2, decode: 2 }),
            ("nobody serves", load(0, 0.0, 9.0, 0.0), calm, Hint::Balanced),
        ];
        for (name, prefill, decode, want) in cases {
            assert_eq!(hint(Some(prefill), decode), want, "case: {name}");
        }
    }

    #[test]
    fn plain_workers_are_one_pool_and_the_last_worker_is_never_spare() {
        assert_eq!(hint(None, load(2, 8.0, 8.0, 1.0)), short("decode", 3, 0));
        assert_eq!(hint(Some(load(1, 1.0, 1.0, 1.0)), load(1, 1.0, 0.0, 0.01)), short("prefill", 2, 0));
        let unknown = PoolLoad { utilisation: None, ..load(1, 4.0, 4.0, 0.0) };
        assert_eq!(hint(None, unknown), short("decode", 2, 0), "a queue at workers that say nothing of themselves");
    }

    #[test]
    fn more_waiting_never_means_fewer_workers() {
        for utilisation in [0.1, 0.5, 1.0] {
            let by: Vec<u32> =
                (0..100).map(|waiting| load(4, 4.0, f64::from(waiting), utilisation).short_by()).collect();
            assert!(by.is_sorted(), "{by:?}");
        }
    }

    #[test]
    fn a_burst_is_not_told() {
        let mut steady = Steady::default();
        for _ in 0..STEADY_TIMES - 1 {
            assert_eq!(steady.feed(Hint::Balanced), None);
        }
        assert_eq!(steady.feed(Hint::Idle), None);
        for _ in 0..STEADY_TIMES - 1 {
            assert_eq!(steady.feed(Hint::Balanced), None);
        }
        assert_eq!(steady.feed(Hint::Balanced), Some(Hint::Balanced));
        assert_eq!((steady.feed(Hint::Balanced), steady.shown()), (None, Hint::Balanced));
    }

    #[test]
    fn hints_are_words() {
        let told = |hint: Hint| hint.to_string();
        assert_eq!(told(short("prefill", 1, 0)), "prefill is short by 1 worker");
        assert_eq!(told(short("decode", 2, 3)), "decode is short by 2 workers; prefill could give 3");
    }
}
