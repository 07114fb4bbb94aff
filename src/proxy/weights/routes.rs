//! The HTTP side: our own `/admin/weights`, and PRIME-RL's calls.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use futures_util::future::join_all;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::admin::{Call, to_all_workers};
use super::super::shared::{Lane, Shared};
use super::desk::{Done, Order, Outcome, Refused, members};
use super::members::{Failed, Member, tell_all};
use crate::control::{ControlError, WeightSource, WeightsRequest, WeightsStatus};
use crate::openai::ApiError;

/// `POST /admin/weights/update`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    /// A folder with a checkpoint, as every worker sees it.
    folder: Option<String>,
    /// `host:port` of a sender.
    peer: Option<String>,
    /// Back to what the workers were started with.
    #[serde(default)]
    base: bool,
    version: Option<u64>,
}

impl Body {
    fn order(self) -> Result<Order, ApiError> {
        let source = match (self.folder, self.peer, self.base) {
            (Some(folder), None, false) => WeightSource::Folder(folder),
            (None, Some(peer), false) => WeightSource::Peer(peer),
            (None, None, true) => WeightSource::Base,
            _ => return Err(ApiError::bad_request("name one source: `folder`, `peer` or `base: true`")),
        };
        Ok(Order { version: self.version, source })
    }
}

/// New weights for the whole fleet. Answers when they serve, or do not.
pub(crate) async fn update(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    let (_, text) = match Call::read(&lane, request).await {
        Ok(read) => read,
        Err(error) => return error.into_response(),
    };
    let body = serde_json::from_slice::<Body>(&text)
        .map_err(|error| ApiError::bad_request(format!("the body of /admin/weights/update: {error}")));
    match body.and_then(Body::order) {
        Ok(order) => answer(lane.shared.weights.order(order).await),
        Err(error) => error.into_response(),
    }
}

fn answer(outcome: Outcome) -> Response {
    match outcome {
        Ok(done) => axum::Json(told(&done)).into_response(),
        Err(refused) => error_of(&refused).into_response(),
    }
}

fn told(done: &Done) -> Value {
    let behind = |(member, why): &(Member, String)| json!({"worker": member.name(), "why": why});
    json!({
        "status": "ok",
        "version": done.version,
        "digest": done.committed.digest.map(hex::encode),
        "bytes": done.committed.bytes,
        "staging_s": done.committed.staging.as_secs_f64(),
        "paused_s": done.committed.paused.as_secs_f64(),
        "behind": done.committed.behind.iter().map(behind).collect::<Vec<_>>(),
        "left_out": done.left_out,
    })
}

/// 502 is what PRIME-RL's orchestrator tries again.
pub(super) fn error_of(refused: &Refused) -> ApiError {
    let status = match refused {
        Refused::Busy { .. } | Refused::NotNewer { .. } => StatusCode::CONFLICT,
        Refused::NoMembers { .. } => StatusCode::NOT_IMPLEMENTED,
        Refused::Failed(_) => StatusCode::BAD_GATEWAY,
        Refused::Ending => StatusCode::SERVICE_UNAVAILABLE,
    };
    ApiError::new(status, refused.to_string())
}

/// The fleet's version, the update under way, and every worker's part in it.
pub(crate) async fn status(State(lane): State<Arc<Lane>>) -> Response {
    let desk = &lane.shared.weights;
    let members = members(&lane.shared);
    let asked = join_all(members.iter().map(|member| member.client.weights(WeightsRequest::Status))).await;
    let workers =
        join_all(members.iter().zip(asked).map(|(member, status)| describe(&lane.shared, member, status))).await;
    let fleet = desk.fleet().clone();
    let since = fleet.committed_at.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).as_ref().map(Duration::as_secs);
    let under_way = desk.under_way().map(|order| json!({"source": order.source.to_string(), "version": order.version}));
    axum::Json(json!({
        "version": fleet.version,
        "digest": fleet.digest.map(hex::encode),
        "source": fleet.source.map(|source| source.to_string()),
        "committed_unix_s": since,
        "last_failure": fleet.last_failure,
        "under_way": under_way,
        "update_max_s": desk.times.all.as_secs_f64(),
        "workers": workers,
    }))
    .into_response()
}

/// A worker as it says it stands, with its other ranks if it has several.
async fn describe(shared: &Shared, member: &Member, status: Result<WeightsStatus, ControlError>) -> Value {
    let others = status.as_ref().map(|status| member.others(shared, status)).unwrap_or_default();
    let mut told = rank_status(status);
    if !others.is_empty() {
        let ranks = tell_all(&others, &WeightsRequest::Status).await;
        told["other_ranks"] = ranks.into_iter().map(rank_status).collect();
    }
    told["worker"] = member.worker.name().into();
    told["role"] = member.worker.role.name().into();
    told["kept_out"] = member.worker.health.is_barred().into();
    told
}

fn rank_status(status: Result<WeightsStatus, ControlError>) -> Value {
    status.map_or_else(|error| json!({"error": error.to_string()}), |status| worker_status(&status))
}

fn worker_status(status: &WeightsStatus) -> Value {
    json!({
        "version": status.version,
        "digest": status.digest.map(hex::encode),
        "phase": status.phase.name(),
        "staged_bytes": status.staged_bytes,
        "total_bytes": status.total_bytes,
        "path": status.path,
        "serves_peers": status.serves_peers,
        "staging": status.staging.name(),
        "old_version_is_safe": status.staging.keeps_the_old(),
        "failure": status.failure.as_ref().map(|failure| json!({"phase": failure.phase.name(), "why": failure.why})),
    })
}

/// PRIME-RL's `{"weight_dir"}` is one transaction over all workers that take weights from us. Anything else, vLLM's own
/// `{"update_info"}` above all, goes to every worker as it is.
pub(crate) async fn update_weights(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    let (call, text) = match Call::read(&lane, request).await {
        Ok(read) => read,
        Err(error) => return error.into_response(),
    };
    let body = serde_json::from_slice::<Value>(&text).unwrap_or_default();
    match body.get("weight_dir").and_then(Value::as_str) {
        Some(folder) => {
            // Where workers are in a trainer's group the folder holds markers, and its name is the step's. One that was restarted is not
            // in it any more, and will say so.
            let source = |told: &[WeightsStatus]| match told.iter().find_map(|status| status.trainer.as_ref()) {
                Some(link) => WeightSource::Trainer { group: link.group, step: folder.to_owned() },
                None => WeightSource::Folder(folder.to_owned()),
            };
            for_all(&lane, source, step_of(folder), call, &text).await
        }
        None => to_all_workers(&lane, call, text).await,
    }
}

/// PRIME-RL's way back to the base model.
pub(crate) async fn reload_weights(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    match Call::read(&lane, request).await {
        Ok((call, text)) => for_all(&lane, |_| WeightSource::Base, None, call, &text).await,
        Err(error) => error.into_response(),
    }
}

/// One transaction over all workers that take weights from us, from the source that follows from what they say.
async fn for_all(
    lane: &Arc<Lane>,
    source: impl FnOnce(&[WeightsStatus]) -> WeightSource,
    step: Option<u64>,
    call: Call,
    text: &bytes::Bytes,
) -> Response {
    let (mut told, mut failed) = (Vec::new(), None);
    for answer in tell_all(&members(&lane.shared), &WeightsRequest::Status).await {
        match answer {
            Ok(status) => told.push(status),
            // Such a worker is updated by routes of its own.
            Err(ControlError::Refused { .. }) => {}
            Err(error) => failed = Some(error),
        }
    }
    let first = match (told.first(), failed) {
        (Some(first), _) => first,
        (None, Some(error)) => return error_of(&unreachable(lane, &error)).into_response(),
        (None, None) => return to_all_workers(lane, call, text.clone()).await,
    };
    // A run that went back to an earlier step still gets a version of its own.
    let version = step.filter(|step| *step > first.version);
    answer(lane.shared.weights.order(Order { version, source: source(&told) }).await)
}

fn unreachable(lane: &Lane, error: &ControlError) -> Refused {
    let worker = lane.shared.workers.first().map_or("?", |worker| worker.name()).to_owned();
    Refused::Failed(Failed { doing: "asking for versions", worker, why: error.to_string() })
}

/// The step that a folder of PRIME-RL's trainer is of: `…/step_12`.
fn step_of(folder: &str) -> Option<u64> {
    folder.trim_end_matches('/').rsplit('/').next()?.strip_prefix("step_")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_read_off_the_folders_name() {
        let cases = [
            ("/out/broadcasts/step_12", Some(12)),
            ("step_3/", Some(3)),
            ("/out/step_x", None),
            ("/step_4/final", None),
        ];
        for (folder, step) in cases {
            assert_eq!(step_of(folder), step, "case: {folder}");
        }
    }

    #[test]
    fn one_source_is_named() {
        let order = |text: &str| serde_json::from_str::<Body>(text).ok().and_then(|body| body.order().ok());
        let folder = Order { version: Some(4), source: WeightSource::Folder("/w".to_owned()) };
        assert_eq!(order(r#"{"folder": "/w", "version": 4}"#), Some(folder));
        assert_eq!(order(r#"{"base": true}"#), Some(Order { version: None, source: WeightSource::Base }));
        assert_eq!(order("{}"), None);
        assert_eq!(order(r#"{"base": true, "folder": "/w"}"#), None);
        assert_eq!(order(r#"{"folder": "/w", "surprise": 1}"#), None);
    }
}
