//! The workers of one update: what is said to all of them, and waiting until all have come to a phase.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep};

use super::super::abort::TELL_TIMEOUT;
use super::super::shared::Shared;
use super::super::worker::Worker;
use crate::control::{AdminClient, ControlError, WeightsPhase, WeightsRequest, WeightsStatus};

/// How often a worker is asked how far it is: while bytes move, the more seldom the longer that takes; often while it is paused.
const POLL_MOVING: Duration = Duration::from_millis(20);
const POLL_OFTEN: Duration = Duration::from_millis(2);

/// One rank of a worker, and the way to it.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) worker: Arc<Worker>,
    pub(super) rank: u32,
    pub(super) client: AdminClient,
}

/// Why an update came to nothing: in which phase, and through which worker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the update failed while {doing}, on worker {worker}: {why}")]
pub(super) struct Failed {
    pub(super) doing: &'static str,
    pub(super) worker: String,
    pub(super) why: String,
}

/// A phase that all are to come to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Goal {
    pub(super) update: u64,
    pub(super) phase: WeightsPhase,
    /// In words.
    pub(super) doing: &'static str,
    pub(super) within: Duration,
}

impl Member {
    /// As errors name it.
    pub(super) fn name(&self) -> String {
        let worker = self.worker.name();
        if self.worker.address.tp > 1 { format!("{worker} (rank {})", self.rank) } else { worker.to_owned() }
    }

    /// The other ranks of the worker that gave this status, which is its first one's.
    pub(super) fn others(&self, shared: &Shared, status: &WeightsStatus) -> Vec<Self> {
        let others = status.ranks.iter().zip(0..).skip(1);
        others
            .map(|(addr, rank)| Self {
                worker: Arc::clone(&self.worker),
                rank,
                client: AdminClient::new(addr.clone(), shared.secret.clone(), TELL_TIMEOUT),
            })
            .collect()
    }

    pub(super) fn failed(&self, doing: &'static str, why: impl ToString) -> Failed {
        Failed { doing, worker: self.name(), why: why.to_string() }
    }

    /// Says something, and waits until the worker has come to the goal.
    async fn bring(&self, request: WeightsRequest, goal: Goal) -> Result<WeightsStatus, Failed> {
        let begun = Instant::now();
        let deadline = begun + goal.within;
        let mut answer = self.client.weights(request.clone()).await;
        let most = if goal.phase == WeightsPhase::Staged { POLL_MOVING } else { POLL_OFTEN };
        loop {
            match answer {
                Ok(status) => {
                    if self.has_come(&status, goal)? {
                        return Ok(status);
                    }
                }
                // A worker that is slow to answer is asked until the deadline; one that is gone is not waited for.
                Err(ControlError::TimedOut { .. }) => {}
                Err(error) => return Err(self.failed(goal.doing, error)),
            }
            if Instant::now() >= deadline {
                let why = format!("it did not come to `{}` within {} s", goal.phase.name(), goal.within.as_secs_f64());
                return Err(self.failed(goal.doing, why));
            }
            sleep((begun.elapsed() / 20).clamp(POLL_OFTEN, most)).await;
            answer = self.client.weights(WeightsRequest::Status).await;
        }
    }

    fn has_come(&self, status: &WeightsStatus, goal: Goal) -> Result<bool, Failed> {
        if let Some(failure) = status.failure.as_ref().filter(|failure| failure.update == goal.update) {
            return Err(self.failed(goal.doing, format!("{} (it was {})", failure.why, failure.phase.name())));
        }
        if status.update != Some(goal.update) {
            return Err(self.failed(goal.doing, "it knows nothing of the update; was it restarted?"));
        }
        Ok(status.phase == goal.phase)
    }
}

/// Says to each what `request` makes for it, and waits for all. What each came to, in order.
pub(super) async fn bring_each(
    members: &[Member],
    goal: Goal,
    request: impl Fn(usize) -> WeightsRequest,
) -> Vec<Result<WeightsStatus, Failed>> {
    join_all(members.iter().enumerate().map(|(number, member)| member.bring(request(number), goal))).await
}

/// The same, where one that fails is enough: the others are not waited for.
pub(super) async fn bring_all(
    members: &[Member],
    goal: Goal,
    request: impl Fn(usize) -> WeightsRequest,
) -> Result<Vec<WeightsStatus>, Failed> {
    let each = members.iter().enumerate().map(|(number, member)| member.bring(request(number), goal));
    futures_util::future::try_join_all(each).await
}

/// Tells all, whatever they answer.
pub(super) async fn tell_all(members: &[Member], request: &WeightsRequest) -> Vec<Result<WeightsStatus, ControlError>> {
    join_all(members.iter().map(|member| member.client.weights(request.clone()))).await
}
