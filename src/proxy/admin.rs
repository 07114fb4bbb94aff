//! Admin routes: calls that go to every worker, and what the proxy knows about its workers and transfers.
//!
//! They change what all clients get, so they are for loopback callers, or for holders of the token if one is set.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{Method, StatusCode, header};
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::ask::{Question, Reply, ask};
use super::routes::{Peer, Unread, describe};
use super::shared::Lane;
use super::upstream::{Deadline, UpstreamError, write_headers};
use super::watch;
use super::weights;
use super::worker::Worker;
use crate::control::TransferId;
use crate::openai::ApiError;
use crate::security::tokens_equal;

/// Calls that every worker gets as they are.
const TO_ALL: &[&str] = &[
    "/load_lora_adapter",
    "/unload_lora_adapter",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/reset_prefix_cache",
    "/pause",
    "/resume",
    "/is_paused",
    "/abort_requests",
    "/shutdown_weight_transfer_engine",
    "/start_weight_update",
    "/start_draft_weight_update",
    "/finish_weight_update",
    "/update_weight_version",
    "/weight_info",
    "/weight_checker",
    "/get_world_size",
];

/// All admin routes, behind their gate.
pub(crate) fn routes(lane: &Arc<Lane>) -> Router<Arc<Lane>> {
    let mut router = Router::new()
        .route("/init_broadcaster", post(init_broadcaster))
        .route("/init_weight_transfer_engine", post(init_transfer_engine))
        .route("/update_weights", post(weights::update_weights))
        .route("/reload_weights", post(weights::reload_weights))
        .route("/admin/weights", get(weights::status))
        .route("/admin/weights/update", post(weights::update))
        .route("/admin/workers", get(workers))
        .route("/admin/transfers/{id}", get(transfer));
    for path in TO_ALL {
        router = router.route(path, post(to_all).get(to_all));
    }
    let router = router.route_layer(middleware::from_fn_with_state(Arc::clone(lane), gate));
    let watched = Router::new()
        .route("/", get(watch::page))
        .route("/admin/live", get(watch::events))
        .route("/admin/overview", get(watch::overview))
        .route_layer(middleware::from_fn_with_state(Arc::clone(lane), watch::gate));
    router.merge(watched)
}

/// Lets loopback callers through, or whoever shows the token.
async fn gate(State(lane): State<Arc<Lane>>, request: Request, next: Next) -> Response {
    let refusal = match &lane.shared.gate.token {
        Some(token) => {
            let given = request.headers().get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
            let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
            let message = "admin routes ask for `Authorization: Bearer` with the token of `[proxy] admin_token`";
            (!tokens_equal(given, token.as_bytes())).then_some((StatusCode::UNAUTHORIZED, message))
        }
        None => {
            let local = request.extensions().get::<Peer>().is_some_and(|peer| peer.0.ip().to_canonical().is_loopback());
            let message =
                "admin routes are for loopback clients; set `[proxy] admin_token` to call them from elsewhere";
            (!local).then_some((StatusCode::FORBIDDEN, message))
        }
    };
    match refusal {
        None => next.run(request).await,
        Some((status, message)) => ApiError::new(status, message).into_response(),
    }
}

/// What one call to all workers carries to each of them.
pub(crate) struct Call {
    method: Method,
    path: String,
    headers: Vec<u8>,
}

impl Call {
    pub(crate) async fn read(lane: &Lane, request: Request) -> Result<(Self, bytes::Bytes), ApiError> {
        let (parts, _) = request.into_parts();
        let body = match parts.extensions.get::<Unread>() {
            Some(unread) => unread.read(lane).await?,
            None => bytes::Bytes::new(),
        };
        let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned();
        // The token is the proxy's; without one, the header is the client's key for the workers.
        let own_token = lane.shared.gate.token.is_some();
        let headers = write_headers(&parts.headers, |name| {
            name == header::ACCEPT_ENCODING || (own_token && name == header::AUTHORIZATION)
        });
        Ok((Self { method: parts.method, path, headers }, body))
    }

    /// Sends it to every worker at once, `body` made for each by its number, and waits for all.
    async fn send(self, lane: &Arc<Lane>, body: impl Fn(usize) -> bytes::Bytes) -> Response {
        let call = Arc::new(self);
        let mut asked = JoinSet::new();
        for worker in &lane.shared.workers {
            let (lane, worker, call) = (Arc::clone(lane), Arc::clone(worker), Arc::clone(&call));
            let body = body(worker.number);
            asked.spawn(async move {
                let deadline = Deadline::after(Instant::now(), lane.shared.limits.request);
                let question = Question { method: &call.method, path: &call.path, headers: &call.headers, body: &body };
                let mut reply = ask(&lane, &worker, question, deadline).await;
                if let (Some((path, body)), Ok(Reply { status: StatusCode::NOT_FOUND, .. })) =
                    (in_vllms_words(&call.path, &body), &reply)
                {
                    reply = ask(&lane, &worker, Question { path: &path, body: &body, ..question }, deadline).await;
                }
                (worker, reply)
            });
        }
        let mut replies = asked.join_all().await;
        replies.sort_by_key(|(worker, _)| worker.number);
        summarise(&call.path, &replies)
    }
}

/// PRIME-RL's servers have a route of their own for adapters, which takes new files for a name that is there. vLLM's has another
/// path, and does that if it is told to.
fn in_vllms_words(path: &str, body: &bytes::Bytes) -> Option<(String, bytes::Bytes)> {
    match path {
        "/unload_lora_adapter" => Some((format!("/v1{path}"), body.clone())),
        "/load_lora_adapter" => {
            let mut told = serde_json::from_slice::<Map<String, Value>>(body).ok()?;
            told.entry("load_inplace").or_insert(true.into());
            Some((format!("/v1{path}"), Value::Object(told).to_string().into()))
        }
        _ => None,
    }
}

/// `{"status": "ok"}` if every worker did it, with each worker's own answer beside it.
fn summarise(path: &str, replies: &[(Arc<Worker>, Result<Reply, UpstreamError>)]) -> Response {
    let mut statuses = Vec::new();
    let results: Vec<Value> = replies
        .iter()
        .map(|(worker, reply)| {
            let mut result = Map::new();
            result.insert("worker".to_owned(), worker.name().into());
            result.insert("role".to_owned(), worker.role.name().into());
            match reply {
                Ok(reply) => {
                    statuses.push(reply.status);
                    result.insert("status".to_owned(), reply.status.as_u16().into());
                    result.insert("body".to_owned(), text_or_json(&reply.body));
                }
                Err(error) => {
                    tracing::warn!(worker = worker.name(), path, %error, "an admin call failed on a worker");
                    statuses.push(StatusCode::BAD_GATEWAY);
                    result.insert("error".to_owned(), error.to_string().into());
                }
            }
            Value::Object(result)
        })
        .collect();
    let failed: Vec<StatusCode> = statuses.iter().copied().filter(|status| !status.is_success()).collect();
    let Some(&first) = failed.first() else {
        return axum::Json(json!({"status": "ok", "results": results})).into_response();
    };
    // All of one mind about the caller's mistake: that is the answer. Anything else is a fleet out of step, which
    // PRIME-RL's orchestrator tries again at 502.
    let agreed = first.is_client_error() && failed.len() == statuses.len() && failed.iter().all(|&one| one == first);
    let status = if agreed { first } else { StatusCode::BAD_GATEWAY };
    let message = format!("{path} failed on {} of {} workers", failed.len(), statuses.len());
    let mut body = serde_json::to_value(ApiError::new(status, message).body()).unwrap_or_default();
    body["status"] = "error".into();
    body["results"] = results.into();
    (status, axum::Json(body)).into_response()
}

fn text_or_json(body: &[u8]) -> Value {
    serde_json::from_slice(body).unwrap_or_else(|_| String::from_utf8_lossy(body).into())
}

/// Passes a call on to every worker as it is.
pub(crate) async fn to_all_workers(lane: &Arc<Lane>, call: Call, body: bytes::Bytes) -> Response {
    call.send(lane, |_| body.clone()).await
}

async fn to_all(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    match Call::read(&lane, request).await {
        Ok((call, body)) => to_all_workers(&lane, call, body).await,
        Err(error) => error.into_response(),
    }
}

/// Gives every worker its place in the weight broadcast. Old and new PRIME-RL read different fields, so both are given:
/// its number among the servers, and its first rank, which holds for any mixture of TP sizes.
async fn init_broadcaster(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    let (call, body) = match Call::read(&lane, request).await {
        Ok(read) => read,
        Err(error) => return error.into_response(),
    };
    let Ok(Value::Object(given)) = serde_json::from_slice::<Value>(&body) else {
        return ApiError::bad_request("the body of /init_broadcaster must be a JSON object").into_response();
    };
    let places =
        broadcaster_bodies(&given, &lane.shared.workers.iter().map(|worker| worker.address.tp).collect::<Vec<_>>());
    let answer = call.send(&lane, |number| places[number].clone()).await;
    if answer.status() != StatusCode::NOT_FOUND {
        return answer;
    }
    match weights::join_trainer(&lane.shared, &body).await {
        Some(Ok(())) => axum::Json(json!({"status": "ok"})).into_response(),
        Some(Err(error)) => error.into_response(),
        None => no_broadcaster().into_response(),
    }
}

/// PRIME-RL's trainer would wait for workers that never join, and its orchestrator takes a 404 for a warning.
fn no_broadcaster() -> ApiError {
    let why = "no worker here joins a trainer's NCCL group: neither has it /init_broadcaster, nor does it take weights from pdlink; set \
               weight_broadcast.type = \"filesystem\", or let the workers take weights: weights.vllm_workers = true, or, without \
               `pdlink up`, the addresses that docs/weights.md names";
    ApiError::new(StatusCode::NOT_IMPLEMENTED, why)
}

/// vLLM's own broadcast: the group's ranks are told once, and each worker's begin where the last one's ended.
async fn init_transfer_engine(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    let (call, body) = match Call::read(&lane, request).await {
        Ok(read) => read,
        Err(error) => return error.into_response(),
    };
    let Ok(Value::Object(given)) = serde_json::from_slice::<Value>(&body) else {
        return ApiError::bad_request("the body of /init_weight_transfer_engine must be a JSON object").into_response();
    };
    let places =
        transfer_engine_bodies(&given, &lane.shared.workers.iter().map(|worker| worker.address.tp).collect::<Vec<_>>());
    call.send(&lane, |number| places[number].clone()).await
}

fn transfer_engine_bodies(given: &Map<String, Value>, tp: &[u32]) -> Vec<bytes::Bytes> {
    let base = given.get("init_info").and_then(|info| info.get("rank_offset")).and_then(Value::as_u64);
    let mut offset = base.unwrap_or(0);
    let body_of = |&ranks: &u32| {
        let mut body = given.clone();
        // A backend whose settings name no rank has no place to be told.
        if let (Some(info), Some(_)) = (body.get_mut("init_info").and_then(Value::as_object_mut), base) {
            info.insert("rank_offset".to_owned(), offset.into());
        }
        offset += u64::from(ranks);
        bytes::Bytes::from(Value::Object(body).to_string())
    };
    tp.iter().map(body_of).collect()
}

fn broadcaster_bodies(given: &Map<String, Value>, tp: &[u32]) -> Vec<bytes::Bytes> {
    let base = given.get("rank_offset").and_then(Value::as_u64).unwrap_or(0);
    let world: u64 = tp.iter().copied().map(u64::from).sum();
    let mut offset = base;
    tp.iter()
        .enumerate()
        .map(|(number, &ranks)| {
            let mut body = given.clone();
            body.insert("server_rank".to_owned(), number.into());
            body.insert("num_inference_server".to_owned(), tp.len().into());
            body.insert("rank_offset".to_owned(), offset.into());
            body.entry("inference_world_size").or_insert_with(|| world.into());
            offset += u64::from(ranks);
            bytes::Bytes::from(Value::Object(body).to_string())
        })
        .collect()
}

async fn workers(State(lane): State<Arc<Lane>>) -> Response {
    let told = |worker: &Arc<Worker>| {
        let mut told = describe(worker);
        told["clock"] = json!(lane.shared.watch.seen[worker.number].clock());
        told
    };
    let workers: Vec<Value> = lane.shared.workers.iter().map(told).collect();
    axum::Json(json!({"workers": workers})).into_response()
}

/// The records of one transfer, of every runtime that has one.
async fn transfer(State(lane): State<Arc<Lane>>, Path(id): Path<String>) -> Response {
    let Ok(id) = id.parse::<TransferId>() else {
        return ApiError::bad_param("id", "a transfer id is 32 hexadecimal digits").into_response();
    };
    let mut asked = JoinSet::new();
    for (worker, client) in lane.shared.workers.iter().zip(&lane.shared.runtimes) {
        if let Some(client) = client.clone() {
            let worker = Arc::clone(worker);
            asked.spawn(async move { (worker, client.records(id).await) });
        }
    }
    let (mut records, mut errors) = (Vec::new(), Vec::new());
    let mut answers = asked.join_all().await;
    answers.sort_by_key(|(worker, _)| worker.number);
    for (worker, answer) in answers {
        match answer {
            Ok(found) => {
                records.extend(found.records.iter().map(|record| json!({"worker": worker.name(), "record": record})));
                errors.extend(found.unheard.iter().map(|error| json!({"worker": worker.name(), "error": error})));
            }
            Err(error) => errors.push(json!({"worker": worker.name(), "error": error.to_string()})),
        }
    }
    let status = match (records.is_empty(), errors.is_empty()) {
        (false, _) => StatusCode::OK,
        (true, true) => StatusCode::NOT_FOUND,
        (true, false) => StatusCode::BAD_GATEWAY,
    };
    (status, axum::Json(json!({"transfer_id": id, "records": records, "errors": errors}))).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_follow_tp_sizes_and_prefill_comes_first() {
        let given = json!({"host": "h", "port": 1, "server_rank": 0, "num_inference_server": 1, "timeout": 9});
        let bodies = broadcaster_bodies(given.as_object().expect("an object"), &[4, 2, 1]);
        let field = |name: &str| -> Vec<u64> {
            let read = |body| serde_json::from_slice::<Value>(body).expect("JSON")[name].as_u64().expect("a number");
            bodies.iter().map(|body| read(body)).collect()
        };
        assert_eq!(field("server_rank"), [0, 1, 2]);
        assert_eq!(field("num_inference_server"), [3, 3, 3]);
        assert_eq!(field("rank_offset"), [0, 4, 6]);
        assert_eq!(field("inference_world_size"), [7, 7, 7]);
        assert_eq!(field("timeout"), [9, 9, 9]);
    }

    #[test]
    fn vllms_broadcast_gets_a_rank_offset_for_each_worker_if_it_has_one() {
        let given = json!({"init_info": {"rank_offset": 1, "world_size": 8, "packed": true}});
        let bodies = transfer_engine_bodies(given.as_object().expect("an object"), &[4, 2, 1]);
        let info = |body: &bytes::Bytes| serde_json::from_slice::<Value>(body).expect("JSON")["init_info"].clone();
        let offsets: Vec<_> = bodies.iter().map(|body| info(body)["rank_offset"].clone()).collect();
        assert_eq!(offsets, [json!(1), json!(5), json!(7)]);
        assert_eq!(info(&bodies[2])["world_size"], 8);
        let ipc = json!({"init_info": {}});
        let bodies = transfer_engine_bodies(ipc.as_object().expect("an object"), &[1, 1]);
        assert!(bodies.iter().all(|body| info(body) == json!({})));
    }

    #[test]
    fn a_given_offset_is_where_our_ranks_begin() {
        let given = json!({"rank_offset": 8, "inference_world_size": 16});
        let bodies = broadcaster_bodies(given.as_object().expect("an object"), &[2, 2]);
        let last: Value = serde_json::from_slice(&bodies[1]).expect("JSON");
        assert_eq!((&last["rank_offset"], &last["inference_world_size"]), (&json!(10), &json!(16)));
    }
}
