//! What the workers say of themselves while they are killed: the KV that has moved, and the memory they take.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::fleet;
use crate::bench::{client, process};
use crate::telemetry::names;

/// Time between two looks. What a worker moved since the last look is lost with it when it is killed.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Longest wait for one worker's metrics: one that has just been killed does not answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);
/// A worker's memory counts once it has served this long, or a fifth of a shorter soak: by then its blocks are in use.
const AGE_MIN: Duration = Duration::from_secs(60);

/// What the workers said in all.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Workers {
    /// Transfers that brought their KV to a decode worker, and their bytes: at least these, for a killed worker takes what it
    /// counted since the last look with it.
    pub transfers: u64,
    pub moved_bytes: u64,
    /// Transfers of either side that ended in any other way: given up, expired, cut by a kill.
    pub transfers_cut: u64,
    /// The most memory that a worker of age had, in bytes: when there first was one after a fifth of the time, and at the last.
    /// `None` where no worker lived long enough.
    pub own_early_bytes: Option<u64>,
    pub own_end_bytes: Option<u64>,
}

/// The link's counters of one worker.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counters {
    transfers: u64,
    moved_bytes: u64,
    transfers_cut: u64,
}

impl Counters {
    /// Reads a page of metrics. Bytes and transfers are decode's alone: prefill counts the same ones.
    fn read(page: &str) -> Self {
        let mut counters = Self::default();
        for line in page.lines() {
            let Some((series, value)) = line.rsplit_once(' ') else { continue };
            let (Some((name, labels)), Ok(value)) = (series.split_once('{'), value.parse::<u64>()) else { continue };
            let is_decode = labels.contains("side=\"decode\"");
            match name.trim_end_matches("_total") {
                names::KV_TRANSFERS if labels.contains("outcome=\"done\"") => {
                    counters.transfers += if is_decode { value } else { 0 };
                }
                names::KV_TRANSFERS => counters.transfers_cut += value,
                names::KV_TRANSFER_BYTES if is_decode => counters.moved_bytes += value,
                _ => {}
            }
        }
        counters
    }

    fn add(self, other: Self) -> Self {
        Self {
            transfers: self.transfers + other.transfers,
            moved_bytes: self.moved_bytes + other.moved_bytes,
            transfers_cut: self.transfers_cut + other.transfers_cut,
        }
    }

    /// Counters only grow: one that is lower than before is a new process's.
    fn began_again_after(self, last: Self) -> bool {
        self.transfers < last.transfers
            || self.moved_bytes < last.moved_bytes
            || self.transfers_cut < last.transfers_cut
    }
}

/// Counters of one place in the fleet, over the processes that have filled it.
#[derive(Debug, Default)]
struct Place {
    ended: Counters,
    last: Counters,
}

impl Place {
    fn take(&mut self, now: Counters) {
        if now.began_again_after(self.last) {
            self.ended = self.ended.add(self.last);
        }
        self.last = now;
    }
}

/// The largest memory of its own among workers that have lived long enough.
#[derive(Debug)]
struct Memory {
    started: Instant,
    /// From when on the early value is taken, and how old a worker must be.
    early_after: Duration,
    age_min: Duration,
    first_seen: BTreeMap<i32, Instant>,
    early: Option<u64>,
    end: Option<u64>,
}

impl Memory {
    fn new(started: Instant, length: Duration) -> Self {
        let fifth = length / 5;
        let age_min = AGE_MIN.min(fifth);
        Self { started, early_after: fifth, age_min, first_seen: BTreeMap::new(), early: None, end: None }
    }

    fn take(&mut self, now: Instant, own: &[(i32, u64)]) {
        self.first_seen.retain(|pid, _| own.iter().any(|(living, _)| living == pid));
        for (pid, _) in own {
            self.first_seen.entry(*pid).or_insert(now);
        }
        let of_age = own.iter().filter(|(pid, _)| now - self.first_seen[pid] >= self.age_min);
        let Some(most) = of_age.map(|(_, bytes)| *bytes).max() else { return };
        if now - self.started >= self.early_after {
            self.early.get_or_insert(most);
            self.end = Some(most);
        }
    }
}

/// Looks at the workers now and then.
#[derive(Debug)]
pub(super) struct Watch {
    launcher: i32,
    proxy: String,
    /// By address: a worker that comes back has the same.
    places: BTreeMap<String, Place>,
    memory: Memory,
    next: Instant,
    asking: JoinSet<Vec<(String, Counters)>>,
}

impl Watch {
    pub(super) fn new(launcher: i32, proxy: String, length: Duration) -> Self {
        let now = Instant::now();
        let (places, memory) = (BTreeMap::new(), Memory::new(now, length));
        Self { launcher, proxy, places, memory, next: now, asking: JoinSet::new() }
    }

    /// Returns after each look. May be dropped and called again at any time: what is asked meanwhile goes on.
    pub(super) async fn look(&mut self) {
        if self.asking.is_empty() {
            tokio::time::sleep_until(self.next.into()).await;
            self.next = Instant::now() + LOOK_EVERY;
            let workers = fleet::workers(self.launcher);
            let own = |pid| Some((pid, process::anonymous_bytes(pid)?));
            self.memory.take(Instant::now(), &workers.into_iter().filter_map(own).collect::<Vec<_>>());
            self.asking.spawn(counters(self.proxy.clone()));
        }
        if let Some(Ok(counters)) = self.asking.join_next().await {
            self.take(counters);
        }
    }

    /// The last look, once all is at rest, and the sums.
    pub(super) async fn finish(mut self) -> Workers {
        self.asking.shutdown().await;
        self.take(counters(self.proxy.clone()).await);
        let places = self.places.values().flat_map(|place| [place.ended, place.last]);
        let sum = places.fold(Counters::default(), Counters::add);
        Workers {
            transfers: sum.transfers,
            moved_bytes: sum.moved_bytes,
            transfers_cut: sum.transfers_cut,
            own_early_bytes: self.memory.early,
            own_end_bytes: self.memory.end,
        }
    }

    fn take(&mut self, counters: Vec<(String, Counters)>) {
        for (address, now) in counters {
            self.places.entry(address).or_default().take(now);
        }
    }
}

/// The counters of every worker that answers.
async fn counters(proxy: String) -> Vec<(String, Counters)> {
    let mut found = Vec::new();
    for address in fleet::worker_addresses(&proxy, ANSWER_MAX).await.unwrap_or_default() {
        if let Ok(page) = client::get_text(&address, "/metrics", ANSWER_MAX).await {
            found.push((address, Counters::read(&page)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_decode_received_is_counted_once_and_what_failed_on_either_side() {
        let page = "# HELP pdlink_kv_transfers Transfers that ended.\n\
            pdlink_kv_transfers_total{side=\"decode\",path=\"shm\",outcome=\"done\"} 7\n\
            pdlink_kv_transfers_total{side=\"decode\",path=\"tcp\",outcome=\"done\"} 1\n\
            pdlink_kv_transfers_total{side=\"prefill\",path=\"shm\",outcome=\"done\"} 5\n\
            pdlink_kv_transfers_total{side=\"prefill\",path=\"none\",outcome=\"expired\"} 2\n\
            pdlink_kv_transfer_bytes_total{side=\"decode\",path=\"shm\"} 4096\n\
            pdlink_kv_transfer_bytes_total{side=\"prefill\",path=\"shm\"} 9\n\
            pdlink_engine_blocks_held 3\n";
        assert_eq!(Counters::read(page), Counters { transfers: 8, moved_bytes: 4096, transfers_cut: 2 });
    }

    #[test]
    fn a_worker_that_came_back_adds_to_what_it_had_moved_before() {
        let counters = |transfers| Counters { transfers, moved_bytes: 10 * transfers, transfers_cut: 0 };
        let mut place = Place::default();
        [3, 8, 1, 4].map(counters).into_iter().for_each(|now| place.take(now));
        assert_eq!(place.ended.add(place.last), counters(12));
    }

    #[test]
    fn only_workers_of_age_count_in_the_memory() {
        let start = Instant::now();
        let mut memory = Memory::new(start, Duration::from_secs(300));
        let mut at = |seconds, own: &[(i32, u64)]| memory.take(start + Duration::from_secs(seconds), own);
        at(0, &[(1, 10), (2, 20)]);
        at(50, &[(1, 11), (3, 99)]);
        at(70, &[(1, 12), (3, 99)]);
        at(110, &[(3, 30), (4, 99)]);
        at(290, &[(5, 99)]);
        assert_eq!((memory.early, memory.end), (Some(12), Some(30)));
    }
}
