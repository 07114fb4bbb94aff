//! Asks each decode runtime to meet each prefill runtime, so that pairs that cannot work are refused at start (KV-6).

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::config::{Path, Role};
use crate::control::{AdminClient, ControlError};
use crate::security::Secret;
use crate::topology::{Plan, WorkerPlan};

/// How long one pair may take to meet: two connections and their handshakes.
const PAIR_TIMEOUT: Duration = Duration::from_secs(10);

/// Pairs that meet at once. More would only queue at the workers.
const PAIRS_AT_ONCE: usize = 32;

/// A pair that cannot work.
#[derive(Debug, thiserror::Error)]
#[error("{decode} cannot take KV from {prefill}: {source}")]
pub(super) struct PairError {
    prefill: String,
    decode: String,
    source: ControlError,
}

/// One pair to meet.
struct Pair {
    prefill: String,
    decode: String,
    prefill_address: String,
    client: AdminClient,
}

/// Lets every pair meet that `involves` a worker of interest. The answer counts pairs by the path they chose.
pub(super) async fn meet(
    plan: &Plan,
    secret: &Secret,
    involves: impl Fn(&WorkerPlan, &WorkerPlan) -> bool,
) -> Result<BTreeMap<Path, usize>, PairError> {
    let mut waiting = pairs(plan, secret, involves);
    let mut meeting = JoinSet::new();
    let mut chosen = BTreeMap::new();
    loop {
        while meeting.len() < PAIRS_AT_ONCE
            && let Some(pair) = waiting.pop()
        {
            meeting.spawn(meet_one(pair));
        }
        match meeting.join_next().await {
            Some(Ok(met)) => *chosen.entry(met?).or_insert(0) += 1,
            // A task of ours was neither cancelled nor may it panic; without its answer there is nothing to count.
            Some(Err(_)) => {}
            None => return Ok(chosen),
        }
    }
}

fn pairs(plan: &Plan, secret: &Secret, involves: impl Fn(&WorkerPlan, &WorkerPlan) -> bool) -> Vec<Pair> {
    let with_runtime = |role| plan.of_role(role).filter(|worker| worker.has_runtime);
    let mut pairs = Vec::new();
    for decode in with_runtime(Role::Decode) {
        let (addresses, names) = (decode.kv_addresses(), runtime_names(decode));
        for (rank, (address, name)) in addresses.iter().zip(names).enumerate() {
            let client = AdminClient::new(address.clone(), secret.clone(), PAIR_TIMEOUT);
            for prefill in with_runtime(Role::Prefill).filter(|prefill| involves(prefill, decode)) {
                let needed = needed(rank, addresses.len(), prefill.kv_ports.len());
                let known = prefill.kv_addresses().into_iter().zip(runtime_names(prefill));
                pairs.extend(known.skip(needed.start).take(needed.len()).map(|(prefill_address, prefill)| Pair {
                    prefill,
                    decode: name.clone(),
                    prefill_address,
                    client: client.clone(),
                }));
            }
        }
    }
    pairs
}

/// What its runtimes are called in messages: the worker's name, with the rank where there are several.
fn runtime_names(worker: &WorkerPlan) -> Vec<String> {
    let name = |rank| if worker.kv_ports.len() > 1 { format!("{} rank {rank}", worker.name()) } else { worker.name() };
    (0..worker.kv_ports.len()).map(name).collect()
}

/// The runtimes of a prefill worker whose heads decode's runtime `rank` needs, of so many on either side.
fn needed(rank: usize, decode: usize, prefill: usize) -> std::ops::Range<usize> {
    let decode = decode.max(1);
    rank * prefill / decode..((rank + 1) * prefill).div_ceil(decode)
}

async fn meet_one(pair: Pair) -> Result<Path, PairError> {
    let Pair { prefill, decode, prefill_address, client } = pair;
    let paired = client.pair(&prefill_address).await;
    paired.map(|paired| paired.path).map_err(|source| PairError { prefill, decode, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_meet_those_whose_heads_they_need() {
        let all = |decode: usize, prefill: usize| {
            (0..decode).map(|rank| needed(rank, decode, prefill).collect::<Vec<_>>()).collect::<Vec<_>>()
        };
        assert_eq!(all(1, 1), [[0]]);
        assert_eq!(all(2, 2), [[0], [1]]);
        assert_eq!(all(4, 2), [[0], [0], [1], [1]]);
        assert_eq!(all(2, 4), [[0, 1], [2, 3]]);
        assert_eq!(all(1, 2), [[0, 1]]);
    }
}
