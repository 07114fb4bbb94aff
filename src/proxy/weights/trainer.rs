//! Brings all workers into the NCCL group of a trainer that knows nothing of us: PRIME-RL's `/init_broadcaster`.
//!
//! The trainer is rank 0 and waits for all others, so all ranks of all workers are told at once, and each its own number: prefill's first,
//! as many for each worker as its tensor parallelism says. From then on, as the workers' own status says, `/update_weights {"weight_dir"}` means what the group brings.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use serde::Deserialize;
use tokio::time::{Instant, sleep};

use super::super::shared::Shared;
use super::desk::{Refused, members};
use super::members::Member;
use super::versions::all_ranks;
use crate::control::{ControlError, TrainerGroup, TrainerState, WeightsRequest, WeightsStatus};
use crate::openai::ApiError;

/// How often a rank is asked whether it is in the group.
const POLL: Duration = Duration::from_millis(50);
/// How long a rank has to say that it has waited in vain.
const SLACK: Duration = Duration::from_secs(5);
const DOING: &str = "joining the trainer's group";

/// What PRIME-RL's orchestrator says. Old and new ones give the group's size in other words.
#[derive(Debug, Deserialize)]
struct Body {
    host: String,
    port: u16,
    /// Seconds.
    #[serde(default = "timeout_s")]
    timeout: u64,
    #[serde(default)]
    rank_offset: u32,
    inference_world_size: Option<u32>,
    #[serde(default)]
    quantize_in_weight_transfer: bool,
}

/// PRIME-RL's own default.
fn timeout_s() -> u64 {
    1200
}

/// The group, as each rank is told; `tp` are the workers' ranks, in order.
#[derive(Debug)]
struct Places {
    body: Body,
    id: u64,
    /// Of each worker's first rank.
    first: Vec<u32>,
    ranks: u32,
}

impl Places {
    fn new(body: Body, tp: &[u32]) -> Result<Self, String> {
        if body.quantize_in_weight_transfer {
            let why = "weights in the form of vLLM's kernels are not taken, because each worker checks and loads them itself; set \
                       weight_broadcast.quantize_in_weight_transfer = false";
            return Err(why.to_owned());
        }
        let ends = tp.iter().scan(body.rank_offset + 1, |next, &ranks| {
            let first = *next;
            *next += ranks;
            Some((first, *next))
        });
        let (first, ends): (Vec<u32>, Vec<u32>) = ends.unzip();
        let (here, last) = (tp.iter().sum::<u32>(), ends.last().copied().unwrap_or(1));
        let ranks = body.inference_world_size.map_or(last, |others| others + 1);
        if last > ranks {
            let why = format!(
                "the trainer's group has {} ranks beside the trainer's own, and the workers here have {here} from number {} on; set \
                 inference_world_size to all of them",
                ranks - 1,
                body.rank_offset + 1
            );
            return Err(why);
        }
        Ok(Self { body, id: rand::random(), first, ranks })
    }

    fn of(&self, member: &Member) -> TrainerGroup {
        TrainerGroup {
            id: self.id,
            host: self.body.host.clone(),
            port: self.body.port,
            rank: self.first[member.worker.number] + member.rank,
            ranks: self.ranks,
            timeout_ms: self.body.timeout.saturating_mul(1000),
        }
    }
}

/// Has all ranks join, and answers when they have. `None`: the workers here take no weights from us.
pub(crate) async fn join_trainer(shared: &Arc<Shared>, text: &[u8]) -> Option<Result<(), ApiError>> {
    let all = members(shared);
    if all.len() < shared.workers.len() {
        return None;
    }
    let body = match serde_json::from_slice::<Body>(text) {
        Ok(body) => body,
        Err(error) => return Some(Err(ApiError::bad_request(format!("the body of /init_broadcaster: {error}")))),
    };
    let tp: Vec<u32> = shared.workers.iter().map(|worker| worker.address.tp).collect();
    let places = match Places::new(body, &tp) {
        Ok(places) => places,
        Err(why) => return Some(Err(ApiError::bad_request(why))),
    };
    let ranks = match all_ranks(shared, &all).await {
        Ok((_, ranks)) => ranks,
        Err(Refused::NoMembers { .. }) => return None,
        Err(refused) => return Some(Err(super::routes::error_of(&refused))),
    };
    tracing::info!(host = places.body.host, port = places.body.port, ranks = places.ranks, "joining a trainer's group");
    let deadline = Instant::now() + Duration::from_secs(places.body.timeout) + SLACK;
    let joined = join_all(ranks.iter().map(|member| join(member, places.of(member), deadline))).await;
    if let Some(refused) = joined.into_iter().find_map(Result::err) {
        tracing::error!(error = %refused, "no group with the trainer");
        return Some(Err(super::routes::error_of(&refused)));
    }
    Some(Ok(()))
}

async fn join(member: &Member, group: TrainerGroup, deadline: Instant) -> Result<(), Refused> {
    let id = group.id;
    let mut answer = member.client.weights(WeightsRequest::Join(group)).await;
    loop {
        let state = answer.map(|status: WeightsStatus| status.trainer.filter(|link| link.group == id));
        match state {
            Ok(Some(link)) => match link.state {
                TrainerState::Joined => return Ok(()),
                TrainerState::Broken(why) => return Err(member.failed(DOING, why).into()),
                TrainerState::Joining => {}
            },
            Ok(None) => return Err(member.failed(DOING, "it knows nothing of the group; was it restarted?").into()),
            Err(ControlError::TimedOut { .. }) => {}
            Err(error) => return Err(member.failed(DOING, error).into()),
        }
        if Instant::now() >= deadline {
            return Err(member.failed(DOING, "it did not say in time whether it is in it").into());
        }
        sleep(POLL).await;
        answer = member.client.weights(WeightsRequest::Status).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places(text: &str, tp: &[u32]) -> Result<Places, String> {
        Places::new(serde_json::from_str(text).unwrap(), tp)
    }

    #[test]
    fn ranks_follow_the_trainers_and_hold_for_any_tensor_parallelism() {
        let old = r#"{"host": "h", "port": 1, "server_rank": 0, "num_inference_server": 1, "timeout": 30}"#;
        let of_old = places(old, &[2, 1, 4]).unwrap();
        assert_eq!((of_old.first, of_old.ranks, of_old.body.timeout), (vec![1, 3, 4], 8, 30));
        let new = r#"{"host": "h", "port": 1, "rank_offset": 2, "inference_world_size": 5, "session_id": "s"}"#;
        let of_new = places(new, &[1, 2]).unwrap();
        assert_eq!((of_new.first, of_new.ranks, of_new.body.timeout), (vec![3, 4], 6, 1200));
    }

    #[test]
    fn what_would_leave_the_trainer_waiting_is_refused() {
        let few = places(r#"{"host": "h", "port": 1, "inference_world_size": 2}"#, &[2, 1]).unwrap_err();
        assert!(few.contains("has 2 ranks") && few.contains("have 3"), "{few}");
        let quantised = r#"{"host": "h", "port": 1, "quantize_in_weight_transfer": true}"#;
        assert!(places(quantised, &[1]).unwrap_err().contains("quantize_in_weight_transfer = false"));
    }
}
