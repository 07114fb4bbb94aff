//! The workers of one role, and which of them gets the next request.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::affinity::{AffinityTable, hash_of};
use super::health::Standing;
use super::worker::{Load, Worker};
use crate::config::Policy;

/// A worker found by prefix keeps the request while it carries at most this many more than the least loaded one, or
/// half as much again: beyond, waiting costs more than the prefix saves.
const PREFIX_SLACK: usize = 4;

/// What is known of a request when a worker is picked.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Hints<'a> {
    /// `X-Session-ID`.
    pub(crate) session: Option<&'a [u8]>,
    /// Hashes of the prompt's beginnings, shortest first. Empty unless the policy asks for them.
    pub(crate) prefixes: &'a [u64],
    /// Workers that failed this request already: taken only if nobody else can serve.
    pub(crate) avoid: &'a [usize],
}

/// Workers of one role.
#[derive(Debug)]
pub(crate) struct Pool {
    workers: Box<[Arc<Worker>]>,
    policy: Policy,
    /// Where round robin stands, and where the search for the least loaded begins.
    turn: AtomicUsize,
    sessions: AffinityTable,
    prefixes: Option<AffinityTable>,
}

impl Pool {
    pub(crate) fn new(workers: Vec<Arc<Worker>>, policy: Policy) -> Self {
        let prefixes = (policy == Policy::Prefix).then(AffinityTable::new);
        let workers = workers.into_boxed_slice();
        Self { workers, policy, turn: AtomicUsize::new(0), sessions: AffinityTable::new(), prefixes }
    }

    /// Workers of this role, whether they serve or not.
    pub(crate) fn len(&self) -> usize {
        self.workers.len()
    }

    /// Whether any worker is known to serve.
    pub(crate) fn can_serve(&self, now: Instant) -> bool {
        self.workers.iter().any(|worker| worker.health.standing(now) >= Standing::OnTrial)
    }

    /// Takes a worker for one request. `None`: nobody can serve.
    pub(crate) fn pick(&self, hints: Hints<'_>, now: Instant) -> Option<Load> {
        // A worker may go out between the look and the taking; each round has one candidate less.
        for _ in 0..=self.workers.len() {
            let index = self.choose(hints, now)?;
            if let Some(load) = Load::take(&self.workers[index], now) {
                self.remember(hints, index);
                return Some(load);
            }
        }
        None
    }

    /// How good a worker is for this request, before load: `None` if it must not be taken.
    fn rank(&self, index: usize, hints: Hints<'_>, now: Instant) -> Option<(bool, Standing)> {
        let worker = &self.workers[index];
        let standing = worker.health.standing(now);
        (standing != Standing::Out).then(|| (!hints.avoid.contains(&worker.number), standing))
    }

    fn choose(&self, hints: Hints<'_>, now: Instant) -> Option<usize> {
        let count = self.workers.len();
        let start = if count > 1 { self.turn.fetch_add(1, Ordering::Relaxed) % count } else { 0 };
        let order = (0..count).map(|offset| (start + offset) % count);
        // A worker on trial must get its request some time, so it ranks with the good ones.
        let class = |rank: (bool, Standing)| (rank.0, rank.1 >= Standing::OnTrial);
        let best = order.clone().filter_map(|index| self.rank(index, hints, now)).map(class).max()?;
        let mut candidates = order.filter(|&index| self.rank(index, hints, now).map(class) == Some(best));
        match (self.policy, hints.session) {
            (Policy::RoundRobin, _) => candidates.next(),
            (Policy::Session, Some(session)) => candidates.max_by_key(|&index| self.weight(index, session)),
            (Policy::LeastLoaded, Some(session)) => {
                let kept = self.sessions.get(hash_of(&[session]));
                self.keep_or_least(candidates, kept, usize::MAX)
            }
            (Policy::Prefix, _) => {
                let table = self.prefixes.as_ref()?;
                let kept = hints.prefixes.iter().rev().find_map(|&hash| table.get(hash));
                self.keep_or_least(candidates, kept, PREFIX_SLACK)
            }
            (Policy::LeastLoaded | Policy::Session, None) => self.keep_or_least(candidates, None, 0),
        }
    }

    /// `kept`, if it is a candidate and not loaded beyond `slack`; else the least loaded candidate.
    fn keep_or_least(
        &self,
        candidates: impl Iterator<Item = usize>,
        kept: Option<usize>,
        slack: usize,
    ) -> Option<usize> {
        let (mut least, mut keeps) = (None, false);
        for index in candidates {
            let load = self.workers[index].inflight();
            if least.is_none_or(|(_, least)| load < least) {
                least = Some((index, load));
            }
            keeps |= Some(index) == kept;
        }
        let (index, load) = least?;
        let bound = (load + load / 2).saturating_add(slack);
        match kept {
            Some(kept) if keeps && self.workers[kept].inflight() <= bound => Some(kept),
            _ => Some(index),
        }
    }

    /// Rendezvous hashing: each session orders the workers its own way, and one that goes moves only its own sessions.
    fn weight(&self, index: usize, session: &[u8]) -> u64 {
        hash_of(&[session, self.workers[index].name().as_bytes()])
    }

    fn remember(&self, hints: Hints<'_>, index: usize) {
        if let (Policy::LeastLoaded, Some(session)) = (self.policy, hints.session) {
            self.sessions.put(hash_of(&[session]), index);
        }
        if let Some(table) = &self.prefixes {
            for &hash in hints.prefixes {
                table.put(hash, index);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::Duration;

    use super::super::affinity::prefix_hashes;
    use super::super::health::Rules;
    use super::super::worker::WorkerAddress;
    use super::*;
    use crate::control::Role;

    fn pool(count: usize, policy: Policy) -> Pool {
        let rules = Rules { quarantine_after_failures: 1, quarantine: Duration::from_secs(5), down_after_probes: 1 };
        let workers = (0..count).map(|number| {
            let address = WorkerAddress::new(format!("http://127.0.0.1:{}", 8100 + number));
            let worker = Worker::new(number, Role::Decode, address, rules).expect("a worker");
            worker.health.came_up();
            Arc::new(worker)
        });
        Pool::new(workers.collect(), policy)
    }

    fn session(name: &str) -> Hints<'_> {
        Hints { session: Some(name.as_bytes()), ..Hints::default() }
    }

    #[test]
    fn least_loaded_spreads_and_keeps_sessions() {
        let (pool, now) = (pool(3, Policy::LeastLoaded), Instant::now());
        let loads: Vec<_> = (0..6).map(|_| pool.pick(Hints::default(), now).expect("a worker")).collect();
        assert!(pool.workers.iter().all(|worker| worker.inflight() == 2));
        let first = pool.pick(session("a"), now).expect("a worker");
        let held: Vec<_> = (0..9).map(|_| pool.pick(session("a"), now).expect("a worker")).collect();
        assert!(held.iter().all(|load| load.worker().number == first.worker().number));
        drop((loads, first, held));
        assert!(pool.workers.iter().all(|worker| worker.inflight() == 0));
    }

    #[test]
    fn round_robin_takes_turns() {
        let (pool, now) = (pool(3, Policy::RoundRobin), Instant::now());
        let picked: Vec<_> = (0..6).map(|_| pool.pick(Hints::default(), now).expect("one").worker().number).collect();
        assert_eq!(picked[..3], picked[3..]);
        assert_eq!(picked.iter().collect::<HashSet<_>>().len(), 3);
    }

    #[test]
    fn rendezvous_moves_only_the_sessions_of_the_worker_that_went() {
        let (pool, now) = (pool(4, Policy::Session), Instant::now());
        let names: Vec<String> = (0..200).map(|at| format!("session-{at}")).collect();
        let place = |name: &String| pool.pick(session(name), now).expect("one").worker().number;
        let before: Vec<_> = names.iter().map(place).collect();
        assert_eq!(before.iter().collect::<HashSet<_>>().len(), 4);
        pool.workers[2].health.went_down();
        for (name, was) in names.iter().zip(before) {
            let is = place(name);
            assert!(is != 2 && (was == 2 || is == was), "{name} moved from {was} to {is}");
        }
    }

    #[test]
    fn prefix_follows_the_longest_known_beginning_within_the_load_bound() {
        let (pool, now) = (pool(3, Policy::Prefix), Instant::now());
        let long = prefix_hashes(&[b'x'; 4096]);
        let short = prefix_hashes(&[b'x'; 1024]);
        let hints = |prefixes| Hints { prefixes, ..Hints::default() };
        let first = pool.pick(hints(&long), now).expect("one").worker().number;
        assert_eq!(pool.pick(hints(&short), now).expect("one").worker().number, first);
        let held: Vec<_> = (0..30).map(|_| pool.pick(hints(&long), now).expect("one")).collect();
        assert!(held.iter().any(|load| load.worker().number != first), "one worker must not carry everything");
    }

    #[test]
    // PX-2.
    fn px_2_a_failed_worker_is_avoided_while_there_is_another() {
        let (pool, now) = (pool(2, Policy::LeastLoaded), Instant::now());
        let hints = Hints { avoid: &[0], ..Hints::default() };
        for _ in 0..4 {
            assert_eq!(pool.pick(hints, now).expect("one").worker().number, 1);
        }
        pool.workers[1].health.went_down();
        assert_eq!(pool.pick(hints, now).expect("one").worker().number, 0);
        pool.workers[0].health.went_down();
        assert!(pool.pick(hints, now).is_none() && !pool.can_serve(now));
    }

    #[test]
    // PX-2.
    fn px_2_quarantine_lets_one_request_through_when_its_time_is_over() {
        let (pool, now) = (pool(1, Policy::LeastLoaded), Instant::now());
        pool.pick(Hints::default(), now).expect("one").failed(now);
        assert!(pool.pick(Hints::default(), now).is_none());
        let later = now + Duration::from_secs(5);
        let mut trial = pool.pick(Hints::default(), later).expect("the trial");
        assert!(pool.pick(Hints::default(), later).is_none());
        trial.succeeded();
        assert!(pool.pick(Hints::default(), later).is_some());
    }
}
