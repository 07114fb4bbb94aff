//! The routes of the page: itself, its events, and the same picture once, for machines.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, StatusCode, header};
use tokio::sync::watch;

use super::super::routes::Peer;
use super::super::shared::{Lane, Shared};
use super::Latest;
use crate::openai::ApiError;
use crate::security::tokens_equal;

/// Viewers at once: each takes a connection, and some writing in each interval.
const VIEWERS_MAX: usize = 64;
/// When a viewer that found it full comes again, and how soon a browser does whose stream has ended.
const RETRY: Duration = Duration::from_secs(2);

/// Lets the same callers through as the admin routes do. A browser cannot be made to send a bearer token: it may give the token
/// as the password of HTTP's basic authentication. That is for these routes alone, which change nothing, because a browser
/// sends such a password along with requests of other sites' making.
pub(crate) async fn gate(State(lane): State<Arc<Lane>>, request: Request, next: Next) -> Response {
    let Some(token) = &lane.shared.gate.token else {
        let local = request.extensions().get::<Peer>().is_some_and(|peer| peer.0.ip().to_canonical().is_loopback());
        if local {
            return next.run(request).await;
        }
        let message = "this page is for loopback clients; set `[proxy] admin_token` to see it from elsewhere, or come by \
                       `ssh -L`";
        return ApiError::new(StatusCode::FORBIDDEN, message).into_response();
    };
    let given = request.headers().get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
    if shows(given, token.as_bytes()) {
        return next.run(request).await;
    }
    let message = "this page asks for the token of `[proxy] admin_token`: as `Authorization: Bearer`, or in a browser as the \
                   password, with any user name";
    let mut response = ApiError::new(StatusCode::UNAUTHORIZED, message).into_response();
    let challenge = HeaderValue::from_static("Basic realm=\"pdlink: the password is proxy.admin_token\"");
    response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
    response
}

fn shows(given: &[u8], token: &[u8]) -> bool {
    if let Some(bearer) = given.strip_prefix(b"Bearer ") {
        return tokens_equal(bearer, token);
    }
    let Some(basic) = given.strip_prefix(b"Basic ") else { return false };
    let Ok(pair) = STANDARD.decode(basic) else { return false };
    let password = pair.iter().position(|&byte| byte == b':').map(|at| &pair[at + 1..]);
    password.is_some_and(|password| tokens_equal(password, token))
}

/// The page. Its script and style may be its own alone, and it talks to nobody but this server.
pub(crate) async fn page() -> Response {
    let nonce = format!("{:032x}", rand::random::<u128>());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (header::CACHE_CONTROL, "no-store".to_owned()),
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::REFERRER_POLICY, "no-referrer".to_owned()),
    ];
    (headers, super::page::page(&nonce)).into_response()
}

/// The latest picture, once.
pub(crate) async fn overview(State(lane): State<Arc<Lane>>) -> Response {
    let latest = lane.shared.watch.latest.borrow().clone();
    let json = latest.map(|frame| frame.json.clone()).unwrap_or_default();
    if json.is_empty() {
        return ApiError::unavailable("there is no picture of the fleet yet", RETRY).into_response();
    }
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

/// The picture again and again, for as long as the viewer takes it.
pub(crate) async fn events(State(lane): State<Arc<Lane>>) -> Response {
    let Some(seat) = Seat::take(&lane.shared) else {
        let message = format!("{VIEWERS_MAX} viewers watch already, as many as may");
        return ApiError::unavailable(message, RETRY).into_response();
    };
    let viewer = Viewer { latest: lane.shared.watch.latest.subscribe(), is_new: true, _seat: seat };
    let body = stream::unfold(viewer, |mut viewer| async move {
        let next = viewer.next().await?;
        Some((Ok::<_, Infallible>(next), viewer))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        // Or a proxy in between gathers what should be seen now.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    (headers, Body::from_stream(body)).into_response()
}

/// One viewer's stream. It holds a place in the pictures, and none of them.
struct Viewer {
    latest: watch::Receiver<Latest>,
    is_new: bool,
    _seat: Seat,
}

impl Viewer {
    async fn next(&mut self) -> Option<Bytes> {
        if !self.is_new {
            self.latest.changed().await.ok()?;
        }
        let frame = self.latest.borrow_and_update().clone()?;
        if std::mem::take(&mut self.is_new) {
            let retry = format!("retry: {}\n", RETRY.as_millis());
            return Some(Bytes::from([retry.as_bytes(), &frame.past, &frame.event].concat()));
        }
        Some(frame.event.clone())
    }
}

/// Counts a viewer, for as long as its stream lives.
struct Seat(Arc<Shared>);

impl Seat {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let taken = |viewers| (viewers < VIEWERS_MAX).then_some(viewers + 1);
        shared.watch.viewers.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).ok()?;
        Some(Self(Arc::clone(shared)))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.watch.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_comes_as_bearer_or_as_a_browsers_password() {
        let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair)).into_bytes();
        for good in [b"Bearer s3cret".to_vec(), basic("me:s3cret"), basic(":s3cret")] {
            assert!(shows(&good, b"s3cret"));
        }
        let bad = [
            Vec::new(),
            b"s3cret".to_vec(),
            basic("s3cret"),
            basic("s3cret:"),
            basic("a:b:s3cret"),
            b"Basic %".to_vec(),
        ];
        assert!(!bad.iter().any(|given| shows(given, b"s3cret")));
    }
}
