//! The other ranks of our own worker, where each has a runtime of its own.
//!
//! The proxy knows one address of a worker. What it aborts there is aborted on every rank (KV-9): the one that was told
//! tells the others, which pass nothing on.

use std::time::Duration;

use super::core::Core;
use crate::control::{AbortAnswer, AdminAnswer, AdminClient, AdminReply, TransferId};
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
        if self.siblings.is_empty() {
            return reply.send(&AdminAnswer::Abort(ours));
        }
        self.reap();
        let siblings = self.siblings.clone();
        self.tasks.spawn(async move {
            // All at once, so that one that is gone does not hold up the others.
            let mut asked = tokio::task::JoinSet::new();
            for sibling in siblings {
                asked.spawn(async move { (sibling.abort_here(transfer_id).await, sibling) });
            }
            let mut answers = vec![ours];
            while let Some(joined) = asked.join_next().await {
                match joined {
                    Ok((Ok(answer), _)) => answers.push(answer),
                    Ok((Err(error), sibling)) => {
                        let rank = sibling.addr();
                        tracing::warn!(%transfer_id, rank, %error, "cannot abort on another rank; its lease ends it");
                    }
                    Err(_) => {}
                }
            }
            reply.send(&AdminAnswer::Abort(of_all(&answers)));
        });
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
