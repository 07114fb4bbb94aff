//! The other ranks of our own worker, where each has a runtime of its own.
//!
//! The proxy knows one address of a worker. What it aborts there is aborted on every rank (KV-9), and what it asks of a
//! transfer is told of every rank: the one that was asked asks the others, which pass nothing on.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;

use super::core::Core;
use super::peers::Peer;
use super::runtime::locked;
use super::traffic;
use crate::control::{
    AbortAnswer, AdminAnswer, AdminClient, AdminReply, ControlError, RankRecords, Traffic, TransferId,
};
use crate::security::Secret;

/// How long another rank may take to answer. Ranks of one worker are on one host, or one hop apart.
const ANSWER_MAX: Duration = Duration::from_secs(1);

pub(super) fn clients(addresses: &[String], secret: &Secret) -> Vec<AdminClient> {
    addresses.iter().map(|address| AdminClient::new(address.clone(), secret.clone(), ANSWER_MAX)).collect()
}

impl Core {
    /// Aborts here and on every other rank. Answers once all have.
    pub(super) fn abort_everywhere(&mut self, transfer_id: TransferId, reply: AdminReply) {
        let ours = self.abort(transfer_id);
        let asked = self.ask_siblings(move |sibling| async move { sibling.abort_here(transfer_id).await });
        self.tasks.spawn(async move {
            let mut answers = vec![ours];
            for (rank, answer) in asked.await {
                match answer {
                    Ok(answer) => answers.push(answer),
                    Err(error) => {
                        tracing::warn!(%transfer_id, rank, %error, "cannot abort on another rank; its lease ends it");
                    }
                }
            }
            reply.send(&AdminAnswer::Abort(of_all(&answers)));
        });
    }

    /// The records of a transfer, of this rank and of every other.
    pub(super) fn records_everywhere(&mut self, transfer_id: TransferId, reply: AdminReply) {
        let mut found = self.records_here(transfer_id);
        let asked = self.ask_siblings(move |sibling| async move { sibling.records_here(transfer_id).await });
        self.tasks.spawn(async move {
            for (_, answer) in asked.await {
                match answer {
                    Ok(theirs) => found.records.extend(theirs.records),
                    Err(error) => found.unheard.push(error.to_string()),
                }
            }
            found.records.sort_by_key(|record| (record.rank, record.side));
            reply.send(&AdminAnswer::Records(found));
        });
    }

    /// What went over the links of this rank and of every other, added up.
    pub(super) fn traffic_everywhere(&mut self, reply: AdminReply) {
        let mut traffic = self.traffic_here();
        let asked = self.ask_siblings(|sibling| async move { sibling.traffic_here().await });
        self.tasks.spawn(async move {
            for (address, answer) in asked.await {
                match answer {
                    Ok(theirs) => traffic::add(&mut traffic, theirs),
                    Err(error) => traffic.unheard.push(format!("the rank at {address}: {error}")),
                }
            }
            reply.send(&AdminAnswer::Traffic(Box::new(traffic)));
        });
    }

    pub(super) fn traffic_here(&self) -> Traffic {
        let connected = self.peers.values().filter_map(Peer::reached);
        let connected = connected.map(|reached| (reached.engine_id.clone(), reached.path)).collect();
        self.traffic.told(self.shared.status(), connected)
    }

    pub(super) fn records_here(&self, transfer_id: TransferId) -> RankRecords {
        let record = locked(&self.shared.records).of(transfer_id);
        RankRecords { records: record.into_iter().collect(), unheard: Vec::new() }
    }

    /// Asks every other rank, all at once, so that one that is gone does not hold up the others. Gives each with its
    /// address.
    fn ask_siblings<T, A, F>(&mut self, ask: A) -> impl Future<Output = Vec<(String, F::Output)>> + Send + use<T, A, F>
    where
        T: Send + 'static,
        A: Fn(AdminClient) -> F,
        F: Future<Output = Result<T, ControlError>> + Send + 'static,
    {
        self.reap();
        let mut asking = JoinSet::new();
        for sibling in &self.siblings {
            let (address, answer) = (sibling.addr().to_owned(), ask(sibling.clone()));
            asking.spawn(async move { (address, answer.await) });
        }
        asking.join_all()
    }
}

/// What the abort found, over all ranks.
fn of_all(answers: &[AbortAnswer]) -> AbortAnswer {
    let found = |answer| answers.contains(&answer);
    match (found(AbortAnswer::Aborted), found(AbortAnswer::Ended)) {
        (true, _) => AbortAnswer::Aborted,
        (false, true) => AbortAnswer::Ended,
        (false, false) => AbortAnswer::Unknown,
    }
}
