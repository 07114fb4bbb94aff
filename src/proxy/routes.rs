//! The router: every route that is not a generation route.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use http::{HeaderMap, Method, StatusCode, Uri, header};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::admin;
use super::ask::{Question, Reply, ask};
use super::body::{self, ProxyBody};
use super::dialect::common_headers;
use super::flight::{Flight, RETRY_AFTER};
use super::health::Standing;
use super::hot::{pass_on, refuse};
use super::legs::Job;
use super::link::ClientLink;
use super::plan::Alone;
use super::shared::Lane;
use super::upstream::{Deadline, write_headers};
use super::{Mode, worker::Worker};
use crate::openai::ApiError;
use crate::openai::headers::X_SESSION_ID;

/// Who is at the other end of a client's connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Peer(pub(crate) SocketAddr);

/// A request's body as hyper gives it, kept beside the request on its way through the router.
#[derive(Clone)]
pub(crate) struct Unread(pub(crate) Arc<std::sync::Mutex<Option<Incoming>>>);

impl Unread {
    pub(crate) fn new(incoming: Incoming) -> Self {
        Self(Arc::new(std::sync::Mutex::new(Some(incoming))))
    }

    /// Reads the body, once.
    pub(crate) async fn read(&self, lane: &Lane) -> Result<bytes::Bytes, ApiError> {
        let taken = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        match taken {
            Some(incoming) => body::read(incoming, &lane.shared.limits).await,
            None => Ok(bytes::Bytes::new()),
        }
    }
}

/// The router of the main port. Admin routes are on it unless they have a port of their own.
pub(crate) fn main(lane: &Arc<Lane>) -> Router {
    let router = Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/v1/models", get(models))
        .route("/models", get(models))
        .route("/tokenize", post(forward))
        .route("/detokenize", post(forward))
        .route("/version", get(forward))
        .route("/ping", any(forward))
        .route("/v1/{*rest}", any(forward))
        .route("/inference/{*rest}", any(forward));
    let router = if lane.shared.gate.apart { router } else { router.merge(admin::routes(lane)) };
    finish(router, lane)
}

/// The router of the admin port.
pub(crate) fn admin_only(lane: &Arc<Lane>) -> Router {
    finish(admin::routes(lane).route("/metrics", get(metrics)).route("/health", get(health)), lane)
}

fn finish(router: Router<Arc<Lane>>, lane: &Arc<Lane>) -> Router {
    router.fallback(unknown).method_not_allowed_fallback(wrong_method).with_state(Arc::clone(lane))
}

async fn unknown(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    let message = format!("there is no {} here", request.uri().path());
    answer_error(&lane, "unknown", request.headers(), ApiError::not_found(message))
}

async fn wrong_method(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    answer_error(&lane, "unknown", request.headers(), ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message))
}

/// Ends a request with an error of our own, counted and logged as any other.
fn answer_error(lane: &Arc<Lane>, route: &'static str, headers: &HeaderMap, error: ApiError) -> Response {
    match Flight::admit(lane, route, headers) {
        Ok(flight) => {
            let mut response = refuse(flight, error).map(Body::new);
            // axum knows which methods the route takes, and adds them itself.
            response.headers_mut().remove(header::ALLOW);
            response
        }
        Err(error) => error.into_response(),
    }
}

/// 200 while every role has a worker that can serve; with `all=true`, while every worker can.
async fn health(State(lane): State<Arc<Lane>>, uri: Uri) -> Response {
    let shared = &lane.shared;
    let now = std::time::Instant::now();
    let prefill = shared.mode == Mode::Plain || shared.prefill.can_serve(now);
    let well = |worker: &Arc<Worker>| worker.health.standing(now) >= Standing::OnTrial;
    let all = uri.query().is_some_and(|query| query.split('&').any(|pair| matches!(pair, "all=true" | "all=1")));
    let good = !shared.is_draining()
        && if all { shared.workers.iter().all(well) } else { prefill && shared.decode.can_serve(now) };
    let workers: Vec<Value> = shared.workers.iter().map(|worker| describe(worker)).collect();
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let word = if good { "ok" } else { "unavailable" };
    (status, axum::Json(json!({"status": word, "workers": workers}))).into_response()
}

/// A worker as answers show it.
pub(crate) fn describe(worker: &Worker) -> Value {
    use std::sync::atomic::Ordering::Relaxed;
    json!({
        "url": worker.name(),
        "role": worker.role.name(),
        "kv_addr": worker.address.kv_addr,
        "tp": worker.address.tp,
        "state": worker.health.state().name(),
        "kept_out": worker.health.is_barred(),
        "inflight": worker.inflight(),
        "served": worker.served.load(Relaxed),
        "failed": worker.failed.load(Relaxed),
        "quarantines": worker.quarantines.load(Relaxed),
    })
}

async fn metrics(State(lane): State<Arc<Lane>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], lane.shared.metrics.page(&lane.shared)).into_response()
}

/// The models of all workers that serve, each once: what decode workers say comes first.
async fn models(State(lane): State<Arc<Lane>>, headers: HeaderMap) -> Response {
    let now = std::time::Instant::now();
    let mut asked = JoinSet::new();
    let serving = lane.shared.workers.iter().rev().filter(|worker| worker.health.standing(now) >= Standing::Unproven);
    for (order, worker) in serving.enumerate() {
        let (lane, worker) = (Arc::clone(&lane), Arc::clone(worker));
        let lines = write_headers(&headers, |name| name == header::ACCEPT_ENCODING);
        asked.spawn(async move {
            let question = Question { method: &Method::GET, path: "/v1/models", headers: &lines, body: b"" };
            let deadline = Deadline::after(Instant::now(), lane.shared.limits.health);
            (order, ask(&lane, &worker, question, deadline).await)
        });
    }
    let mut replies: Vec<(usize, Reply)> = Vec::new();
    while let Some(done) = asked.join_next().await {
        if let Ok((order, Ok(reply))) = done {
            replies.push((order, reply));
        }
    }
    replies.sort_by_key(|(order, _)| *order);
    merge_models(&lane, &headers, replies.into_iter().map(|(_, reply)| reply))
}

fn merge_models(lane: &Arc<Lane>, headers: &HeaderMap, replies: impl Iterator<Item = Reply>) -> Response {
    let mut models: Vec<Value> = Vec::new();
    let (mut understood, mut refusal) = (false, None);
    for reply in replies {
        let list = serde_json::from_slice::<Value>(&reply.body).ok().filter(|_| reply.status.is_success());
        let Some(Value::Array(list)) = list.and_then(|mut list| list.get_mut("data").map(Value::take)) else {
            refusal = refusal.or(Some(reply));
            continue;
        };
        understood = true;
        for model in list {
            if !models.iter().any(|known| known.get("id") == model.get("id")) {
                models.push(model);
            }
        }
    }
    match refusal {
        _ if understood => axum::Json(json!({"object": "list", "data": models})).into_response(),
        Some(Reply { status, headers, body }) => (status, headers, body).into_response(),
        None => {
            let error = ApiError::unavailable("no worker can say which models there are", RETRY_AFTER);
            answer_error(lane, "/v1/models", headers, error)
        }
    }
}

/// Hands a request to one decode worker as it is.
async fn forward(State(lane): State<Arc<Lane>>, request: Request) -> Response {
    let (parts, _) = request.into_parts();
    let mut flight = match Flight::admit(&lane, "other", &parts.headers) {
        Ok(flight) => flight,
        Err(error) => return error.into_response(),
    };
    let link = parts.extensions.get::<Arc<ClientLink>>().cloned().unwrap_or_default();
    let text = match parts.extensions.get::<Unread>() {
        Some(unread) => unread.read(&lane).await,
        None => Ok(bytes::Bytes::new()),
    };
    let text = match text {
        Ok(text) => text,
        Err(error) => return refuse(flight, error).map(Body::new),
    };
    lane.shared.metrics.alone(Alone::OtherRoute);
    let whole = Deadline::after(Instant::from_std(flight.started), lane.shared.limits.request);
    let common = common_headers(&parts.headers, lane.shared.tracing.is_some());
    let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let session = parts.headers.get(X_SESSION_ID).map(http::HeaderValue::as_bytes);
    let mut job = Job {
        lane: &lane,
        flight: &mut flight,
        method: &parts.method,
        path,
        common: &common,
        session,
        prefixes: &[],
        whole,
    };
    let response: http::Response<ProxyBody> = match job.forward(&text).await {
        Ok(answer) => pass_on(&lane, &link, flight, answer),
        Err(error) => refuse(flight, error),
    };
    response.map(Body::new)
}
