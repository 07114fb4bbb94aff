//! Why an attempt at a request came to nothing, and whose fault it is.

use std::sync::Arc;

use http::StatusCode;

use super::flight::RETRY_AFTER;
use super::legs::{Answer, Held};
use super::metrics::Leg;
use super::shared::Shared;
use super::upstream::UpstreamError;
use super::watch::What;
use super::worker::{Load, Worker};
use crate::openai::{ApiError, splice};

/// Why one attempt did not come to an answer.
pub(super) struct Failure {
    pub(super) leg: Leg,
    pub(super) worker: Option<usize>,
    /// Whose fault it is, until it has been held against the worker.
    pub(super) blamed: Option<Box<Blamed>>,
    pub(super) retry: bool,
    /// Whether the worker may have seen the request.
    pub(super) reached: bool,
    /// The worker's own words, if it said any.
    pub(super) answer: Option<Box<Held>>,
    pub(super) error: ApiError,
}

impl Failure {
    /// No worker of a role can serve.
    pub(super) fn nobody(leg: Leg, hint: &str) -> Self {
        let role = match leg {
            Leg::prefill => "prefill",
            Leg::decode => "decode",
        };
        let message = format!("no {role} worker can serve now{hint}");
        let error = ApiError::unavailable(message, RETRY_AFTER);
        Self::own(leg, error)
    }

    /// One that is no worker's fault.
    pub(super) fn own(leg: Leg, error: ApiError) -> Self {
        Self { leg, worker: None, blamed: None, retry: false, reached: false, answer: None, error }
    }

    pub(super) fn of(leg: Leg, load: Load, error: &UpstreamError) -> Self {
        if let UpstreamError::OutOfSockets { .. } = error {
            let error = ApiError::unavailable(error.to_string(), RETRY_AFTER);
            return Self::own(leg, error);
        }
        let worker = load.worker();
        let role = worker.role.name();
        let message = format!("{role} worker {}: {error}", worker.name());
        tracing::warn!("{message}");
        let (status, retry) = match error {
            // Another worker would take as long, and the client has waited.
            UpstreamError::Timeout { .. } => (StatusCode::GATEWAY_TIMEOUT, false),
            UpstreamError::TooLong { .. } => (StatusCode::BAD_GATEWAY, false),
            _ => (StatusCode::BAD_GATEWAY, true),
        };
        let reached = !matches!(error, UpstreamError::Connect { .. } | UpstreamError::ConnectTimeout { .. });
        let error = ApiError::new(status, message);
        Self {
            leg,
            worker: Some(worker.number),
            blamed: Some(Blamed::alone(load)),
            retry,
            reached,
            answer: None,
            error,
        }
    }

    /// This is the failure that counts: it is held against the worker.
    pub(super) fn stand(&mut self, shared: &Shared) {
        // A refusal is the client's business.
        if self.answer.as_ref().is_none_or(|held| !held.status.is_client_error()) {
            shared.watch.failures.note(What::Request, self.worker, &self.error.message);
        }
        let now = std::time::Instant::now();
        match self.blamed.take().map(|blamed| *blamed) {
            Some(Blamed { load, pair: Some(pair) }) => pair.failed(load, now),
            Some(Blamed { mut load, pair: None }) => load.failed(now),
            None => {}
        }
    }

    /// Decode said that it failed, with KV that a prefill worker had. A connection that failed is decode's own affair.
    pub(super) fn of_pair(mut self, pair: Pair) -> Self {
        if let (Leg::decode, true, Some(blamed)) = (self.leg, self.answer.is_some(), &mut self.blamed) {
            blamed.pair = Some(pair);
        }
        self
    }

    /// What the client gets of it: the worker's own words if there are any.
    pub(super) fn end(mut self, shared: &Shared) -> Result<Answer, ApiError> {
        self.stand(shared);
        self.answer.map(|held| Answer::Held(*held)).ok_or(self.error)
    }
}

/// A worker that failed, and whose KV it had, which may be why.
pub(super) struct Blamed {
    pub(super) load: Load,
    pub(super) pair: Option<Pair>,
}

impl Blamed {
    pub(super) fn alone(load: Load) -> Box<Self> {
        Box::new(Self { load, pair: None })
    }
}

/// The prefill worker of a pair, and how many others each half could have met.
pub(super) struct Pair {
    pub(super) prefill: Arc<Worker>,
    pub(super) prefills: usize,
    pub(super) decodes: usize,
}

impl Pair {
    /// Holds a failure against the half that it speaks against, if it does yet.
    pub(super) fn failed(&self, mut decode: Load, now: std::time::Instant) {
        let number = decode.worker().number;
        let against_decode = decode.worker().handovers.failed(self.prefill.number, self.prefills);
        (0..against_decode).for_each(|_| decode.failed(now));
        if against_decode == 0 {
            self.prefill.handover_failed(number, self.decodes, now);
        }
    }
}

/// Only a body that was scanned before comes here, so this is about its inner object.
pub(super) fn unreadable(error: &splice::BodyError) -> Failure {
    let error = ApiError { param: error.param().map(str::to_owned), ..ApiError::bad_request(error.to_string()) };
    Failure::own(Leg::prefill, error)
}

/// Prefill answered, but nothing that one could go on with.
pub(super) fn unusable(worker: &Worker, why: &str) -> Failure {
    let error = ApiError::new(StatusCode::BAD_GATEWAY, format!("prefill worker {}: {why}", worker.name()));
    Failure { worker: Some(worker.number), retry: true, reached: true, ..Failure::own(Leg::prefill, error) }
}
