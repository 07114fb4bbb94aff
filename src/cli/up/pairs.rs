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

/// Decode runtimes that meet a prefill worker at once. More would only queue at the workers.
const AT_ONCE: usize = 32;

/// A pair that cannot work.
#[derive(Debug, thiserror::Error)]
#[error("{decode} cannot take KV from {prefill}: {source}")]
pub(super) struct PairError {
    prefill: String,
    decode: String,
    source: ControlError,
}

/// A worker as the launcher knows it: the address of each of its runtimes.
#[derive(Debug, Clone)]
struct Side {
    name: String,
    addresses: Vec<String>,
}

impl Side {
    fn of(worker: &WorkerPlan) -> Self {
        Self { name: worker.name(), addresses: worker.kv_addresses() }
    }

    /// What a runtime is called in messages: the worker's name, with the rank where there are several.
    fn runtime(&self, rank: usize) -> String {
        if self.addresses.len() > 1 { format!("{} rank {rank}", self.name) } else { self.name.clone() }
    }
}

/// Lets every pair of runtimes meet whose workers `involves` a worker of interest. The answer counts pairs by the path
/// they chose.
pub(super) async fn meet(
    plan: &Plan,
    secret: &Secret,
    involves: impl Fn(&WorkerPlan, &WorkerPlan) -> bool,
) -> Result<BTreeMap<Path, usize>, PairError> {
    let with_runtime = |role| plan.of_role(role).filter(|worker| worker.has_runtime);
    let mut waiting = Vec::new();
    for decode in with_runtime(Role::Decode) {
        let of_decode = Side::of(decode);
        for (rank, address) in of_decode.addresses.iter().enumerate() {
            let client = AdminClient::new(address.clone(), secret.clone(), PAIR_TIMEOUT);
            let prefill = with_runtime(Role::Prefill).filter(|prefill| involves(prefill, decode));
            waiting.extend(prefill.map(|prefill| (of_decode.runtime(rank), client.clone(), Side::of(prefill))));
        }
    }
    let mut meeting = JoinSet::new();
    let mut chosen = BTreeMap::new();
    loop {
        while meeting.len() < AT_ONCE
            && let Some((decode, client, prefill)) = waiting.pop()
        {
            meeting.spawn(async move { meet_worker(&decode, &client, &prefill).await });
        }
        match meeting.join_next().await {
            Some(Ok(met)) => met?.into_iter().for_each(|path| *chosen.entry(path).or_insert(0) += 1),
            // A task of ours was neither cancelled nor may it panic; without its answer there is nothing to count.
            Some(Err(_)) => {}
            None => return Ok(chosen),
        }
    }
}

/// One decode runtime meets those of one prefill worker that it has to do with; which these are, it knows itself.
async fn meet_worker(decode: &str, client: &AdminClient, prefill: &Side) -> Result<Vec<Path>, PairError> {
    let fail = |prefill: String| {
        let decode = decode.to_owned();
        move |source| PairError { prefill, decode, source }
    };
    let ranks = match prefill.addresses.len() {
        // It may hold several ranks, or one: there is no other in any case.
        1 => vec![0],
        count => client.peers_of(u32::try_from(count).unwrap_or(u32::MAX)).await.map_err(fail(prefill.name.clone()))?,
    };
    let mut paths = Vec::new();
    for rank in ranks.into_iter().filter_map(|rank| usize::try_from(rank).ok()) {
        let Some(address) = prefill.addresses.get(rank) else { continue };
        let paired = client.pair(address).await.map_err(fail(prefill.runtime(rank)))?;
        paths.push(paired.path);
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::net::TcpListener;

    use super::*;
    use crate::control::{
        AdminAnswer, AdminHandler, AdminReply, AdminRequest, Connection, Hello, Identity, Liveness, Paired, Part, Sink,
        VERSIONS, admin_sink, serve,
    };

    /// A decode runtime that reads ranks 0 and 2 of four, and is refused by one address.
    #[derive(Default)]
    struct Decode {
        asked: Mutex<Vec<String>>,
    }

    impl AdminHandler for Decode {
        fn ask(&self, request: AdminRequest, reply: AdminReply) {
            reply.send(&match request {
                AdminRequest::PeersOf(4) => AdminAnswer::PeersOf(vec![0, 2]),
                AdminRequest::Pair(peer) if peer == "stranger" => AdminAnswer::Refused("it does not fit".to_owned()),
                AdminRequest::Pair(peer) => {
                    self.asked.lock().unwrap().push(peer);
                    AdminAnswer::Pair(Paired { path: Path::Shm, peer_engine_id: String::new() })
                }
                other => AdminAnswer::Refused(format!("{other:?}")),
            });
        }
    }

    fn prefill(addresses: &[&str]) -> Side {
        Side { name: "prefill 0".to_owned(), addresses: addresses.iter().map(|&address| address.to_owned()).collect() }
    }

    #[tokio::test]
    async fn a_decode_rank_meets_the_prefill_ranks_it_names_and_the_one_that_fails_is_named() {
        let (secret, decode) = (Secret::loopback(), Arc::new(Decode::default()));
        let hello = Hello {
            part: Part::Engine,
            engine_id: "decode".to_owned(),
            incarnation: 1,
            role: Role::Decode,
            payload: Vec::new(),
        };
        let identity = Identity { secret: secret.clone(), versions: VERSIONS, hello, timeout: PAIR_TIMEOUT };
        let liveness = Liveness { ping_interval: PAIR_TIMEOUT, peer_timeout: PAIR_TIMEOUT * 3 };
        let handler = Arc::clone(&decode);
        let welcome =
            move |_: Hello, connection: &Connection| -> Sink { admin_sink(connection, Arc::<Decode>::clone(&handler)) };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = AdminClient::new(listener.local_addr().unwrap().to_string(), secret, PAIR_TIMEOUT);
        let mut server = JoinSet::new();
        server.spawn(serve(listener, Arc::new(identity), liveness, Arc::new(welcome)));

        let met = meet_worker("decode 0 rank 1", &client, &prefill(&["a", "b", "c", "d"])).await.unwrap();
        assert_eq!((met.len(), std::mem::take(&mut *decode.asked.lock().unwrap())), (2, vec!["a".into(), "c".into()]));
        meet_worker("decode 0 rank 1", &client, &prefill(&["alone"])).await.unwrap();
        assert_eq!(*decode.asked.lock().unwrap(), ["alone"]);

        let failed = |addresses: &[&str]| {
            let (client, prefill) = (client.clone(), prefill(addresses));
            async move { meet_worker("decode 0 rank 1", &client, &prefill).await.unwrap_err().to_string() }
        };
        let told = failed(&["a", "b", "stranger", "d"]).await;
        assert!(told.starts_with("decode 0 rank 1 cannot take KV from prefill 0 rank 2: "), "{told}");
        let told = failed(&["a", "b", "c"]).await;
        assert!(told.starts_with("decode 0 rank 1 cannot take KV from prefill 0: "), "{told}");
    }
}
