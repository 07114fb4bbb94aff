//! One request from its head to the end of its answer: admission, the account of it, and what is left when it ends.
//!
//! The flight travels with the request and then with the body of its answer, so that whatever ends first (the answer,
//! the client, a worker) ends in one place: `Drop` here, and in what the flight holds.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use http::{HeaderMap, HeaderValue};

use super::abort::Transfer;
use super::access::{self, Line};
use super::dialect::hex;
use super::shared::Lane;
use super::trace::{Ended, RequestTrace};
use super::worker::{Load, Worker};
use crate::config::Dispatch;
use crate::control::TransferId;
use crate::openai::ApiError;
use crate::openai::headers::{
    REQUEST_ID_BYTES_MAX, X_PDLINK_DISPATCH, X_PDLINK_TRANSFER_ID, X_PDLINK_WEIGHT_VERSION, X_REQUEST_ID,
};

/// What a client that found the proxy full, or a role empty, is told to wait.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The account of one request.
#[derive(Debug)]
pub(crate) struct Flight {
    pub(crate) lane: Arc<Lane>,
    pub(crate) route: &'static str,
    pub(crate) started: Instant,
    pub(crate) request_id: HeaderValue,
    /// The last transfer that was drawn for it.
    pub(crate) transfer_id: Option<TransferId>,
    /// The transfer, while nobody else is sure to look after it.
    pub(crate) transfer: Option<Transfer>,
    /// The worker that answers.
    pub(crate) load: Option<Load>,
    pub(crate) prefill: Option<Arc<Worker>>,
    /// How its last pair of legs went out; none for one that went to decode alone.
    pub(crate) dispatch: Option<Dispatch>,
    /// The weights that decode began with, as far as they are known.
    pub(crate) weight_version: Option<u64>,
    pub(crate) status: u16,
    pub(crate) bytes: u64,
    /// Its spans, if it is traced.
    pub(crate) trace: Option<Box<RequestTrace>>,
    /// How it ended; a flight that ends without saying was left by its client.
    pub(crate) end: &'static str,
}

impl Flight {
    /// Admits one more request, or refuses it at the bound (PX-4).
    pub(crate) fn admit(lane: &Arc<Lane>, route: &'static str, headers: &HeaderMap) -> Result<Self, ApiError> {
        let shared = &lane.shared;
        let flight = Self {
            lane: Arc::clone(lane),
            route,
            started: Instant::now(),
            request_id: request_id(headers),
            transfer_id: None,
            transfer: None,
            load: None,
            prefill: None,
            dispatch: None,
            weight_version: None,
            status: 0,
            bytes: 0,
            trace: RequestTrace::begin(shared, route, headers),
            end: "client_left",
        };
        let before = shared.inflight.fetch_add(1, Ordering::Relaxed);
        if before >= shared.limits.inflight_max {
            shared.metrics.refused_full.inc();
            let bound = shared.limits.inflight_max;
            let message = format!("{bound} requests are in flight, as many as this server takes; try again");
            return Err(flight.refuse(ApiError::unavailable(message, RETRY_AFTER)));
        }
        Ok(flight)
    }

    /// Ends the flight with an error of our own.
    pub(crate) fn refuse(mut self, error: ApiError) -> ApiError {
        self.status = error.status.as_u16();
        self.end = "refused";
        error
    }

    /// Puts the ids on an answer.
    pub(crate) fn mark(&self, headers: &mut HeaderMap) {
        headers.insert(X_REQUEST_ID, self.request_id.clone());
        if let Some(id) = self.transfer_id {
            let value = HeaderValue::from_bytes(&hex(id)).expect("hex digits are a header value");
            headers.insert(X_PDLINK_TRANSFER_ID, value);
        }
        if let Some(dispatch) = self.dispatch {
            headers.insert(X_PDLINK_DISPATCH, HeaderValue::from_static(dispatch.name()));
        }
        // The reference engine says it itself.
        if let Some(version) = self.weight_version.filter(|_| !headers.contains_key(X_PDLINK_WEIGHT_VERSION)) {
            headers.insert(X_PDLINK_WEIGHT_VERSION, HeaderValue::from(version));
        }
    }

    fn log(&self, duration: Duration) {
        self.lane.access.push(Line {
            at: SystemTime::now(),
            route: self.route,
            status: self.status,
            end: self.end,
            bytes: self.bytes,
            duration,
            // A copy: the header's own text lies in the connection's buffer, which the next request needs.
            request_id: self.request_id.to_str().unwrap_or("-").into(),
            transfer_id: self.transfer_id,
            dispatch: self.dispatch.map(Dispatch::name),
            prefill: self.prefill.clone(),
            decode: self.load.as_ref().map(|load| Arc::clone(load.worker())),
        });
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        let shared = Arc::clone(&self.lane.shared);
        shared.inflight.fetch_sub(1, Ordering::Relaxed);
        if self.end == "client_left" {
            shared.metrics.clients_left.inc();
            // nginx's number for a client that did not wait; no client ever sees it.
            if self.status == 0 {
                self.status = 499;
            }
        }
        let duration = self.started.elapsed();
        shared.metrics.answered(self.route, self.status);
        shared.metrics.request_seconds.observe(duration.as_secs_f64());
        if let Some(trace) = self.trace.take() {
            trace.end(&Ended {
                status: self.status,
                end: self.end,
                bytes: self.bytes,
                request_id: self.request_id.to_str().unwrap_or("-"),
                dispatch: self.dispatch,
                transfer_id: self.transfer_id,
                decode: self.load.as_ref().map(|load| load.worker().number),
            });
        }
        if shared.limits.access_log && access::is_wanted() {
            self.log(duration);
        }
    }
}

/// The client's own id if it can be echoed, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let given = headers.get(X_REQUEST_ID).filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX);
    given
        .cloned()
        .unwrap_or_else(|| HeaderValue::from_bytes(&hex(TransferId::random())).expect("hex digits are a header value"))
}
