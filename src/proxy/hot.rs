//! The generation routes: what nearly every request is. They are answered here, straight under hyper; all others go
//! through the router.

use std::borrow::Cow;
use std::sync::Arc;

use http::request::Parts;
use http::{Method, Response, StatusCode};
use hyper::body::Incoming;
use tokio::time::Instant;

use super::affinity::prefix_hashes;
use super::body::{self, ProxyBody};
use super::dialect::common_headers;
use super::flight::Flight;
use super::legs::{Answer, Held, Job};
use super::link::ClientLink;
use super::plan::{Plan, Shape};
use super::shared::Lane;
use super::stream::StreamBody;
use super::upstream::Deadline;
use crate::config::Policy;
use crate::openai::ApiError;
use crate::openai::headers::X_SESSION_ID;
use crate::openai::splice::{BodyError, RequestBody};

/// A generation route: its name in metrics and at the worker, and the shape of its bodies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) path: &'static str,
    pub(crate) shape: Shape,
}

/// PRIME-RL's clients leave out `/v1` in places; workers know the full path only.
pub(crate) fn route_of(path: &str) -> Option<Route> {
    let (path, shape) = match path {
        "/v1/chat/completions" | "/chat/completions" => ("/v1/chat/completions", Shape::Chat),
        "/v1/completions" | "/completions" => ("/v1/completions", Shape::Completion),
        "/v1/chat/completions/tokens" | "/chat/completions/tokens" => ("/v1/chat/completions/tokens", Shape::Chat),
        "/inference/v1/generate" => ("/inference/v1/generate", Shape::Generate),
        _ => return None,
    };
    Some(Route { path, shape })
}

/// Serves one generation request.
pub(crate) async fn generate(
    lane: &Arc<Lane>,
    link: &Arc<ClientLink>,
    route: Route,
    parts: Parts,
    incoming: Incoming,
) -> Response<ProxyBody> {
    let mut flight = match Flight::admit(lane, route.path, &parts.headers) {
        Ok(flight) => flight,
        Err(error) => return error.to_http(),
    };
    match serve(lane, &mut flight, route, &parts, incoming).await {
        Ok(answer) => pass_on(lane, link, flight, answer),
        Err(error) => refuse(flight, error),
    }
}

async fn serve(
    lane: &Arc<Lane>,
    flight: &mut Flight,
    route: Route,
    parts: &Parts,
    incoming: Incoming,
) -> Result<Answer, ApiError> {
    let shared = &lane.shared;
    if parts.method != Method::POST {
        let message = format!("{} takes POST, not {}", route.path, parts.method);
        return Err(ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message));
    }
    let whole = Deadline::after(Instant::from_std(flight.started), shared.limits.request);
    let text = body::read(incoming, &shared.limits).await?;
    let body = RequestBody::scan(text).map_err(|error| bad_body(&error))?;
    let plan = Plan::of(route.shape, &body, shared.mode, shared.limits.short_below_bytes);
    let plan = plan.map_err(|error| bad_body(&error))?;
    let path: Cow<'_, str> = match parts.uri.query() {
        None => Cow::Borrowed(route.path),
        Some(query) => Cow::Owned(format!("{}?{query}", route.path)),
    };
    let prefixes = match shared.policy {
        Policy::Prefix => prefix_hashes(plan.prompt(&body)),
        _ => Vec::new(),
    };
    let common = common_headers(&parts.headers, shared.tracing.is_some());
    let mut job = Job {
        lane,
        flight,
        method: &parts.method,
        path: &path,
        common: &common,
        session: parts.headers.get(X_SESSION_ID).map(http::HeaderValue::as_bytes),
        prefixes: &prefixes,
        whole,
    };
    job.generate(plan, &body).await
}

fn bad_body(error: &BodyError) -> ApiError {
    ApiError { param: error.param().map(str::to_owned), ..ApiError::bad_request(error.to_string()) }
}

/// Ends a flight with an error of our own.
pub(crate) fn refuse(mut flight: Flight, error: ApiError) -> Response<ProxyBody> {
    let mut response = error.to_http();
    if error.status == StatusCode::METHOD_NOT_ALLOWED {
        response.headers_mut().insert(http::header::ALLOW, http::HeaderValue::from_static("POST"));
    }
    flight.mark(response.headers_mut());
    flight.status = error.status.as_u16();
    flight.end = "refused";
    response
}

/// Turns a worker's answer into the client's.
pub(crate) fn pass_on(
    lane: &Arc<Lane>,
    link: &Arc<ClientLink>,
    mut flight: Flight,
    answer: Answer,
) -> Response<ProxyBody> {
    let (status, headers, body) = match answer {
        Answer::Held(Held { status, headers, body }) => {
            flight.end = "done";
            (status, headers, Ok(body))
        }
        Answer::Flowing { exchange, first } => {
            let (status, headers) = (exchange.head.status, exchange.head.headers());
            (status, headers, Err((exchange, first)))
        }
    };
    let mut response = Response::new(ProxyBody::Full(bytes::Bytes::new()));
    *response.status_mut() = status;
    *response.headers_mut() = headers;
    flight.mark(response.headers_mut());
    flight.status = status.as_u16();
    *response.body_mut() = match body {
        Ok(body) => {
            flight.bytes = body.len() as u64;
            ProxyBody::Full(body)
        }
        Err((exchange, first)) => {
            let length = response.headers().get(http::header::CONTENT_LENGTH).cloned();
            StreamBody::start(lane, link, flight, exchange, first, length.as_ref(), is_event_stream(response.headers()))
        }
    };
    response
}

fn is_event_stream(headers: &http::HeaderMap) -> bool {
    const KIND: &[u8] = b"text/event-stream";
    let kind = headers.get(http::header::CONTENT_TYPE).map(http::HeaderValue::as_bytes);
    kind.and_then(|kind| kind.get(..KIND.len())).is_some_and(|kind| kind.eq_ignore_ascii_case(KIND))
}
