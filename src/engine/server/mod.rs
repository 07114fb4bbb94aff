//! The OpenAI front of the engine: routes, and the form of every answer and refusal.
//!
//! A handler reads and checks the body (`body.rs`, `params.rs`, `prompt.rs`), submits a job (`job.rs`) and shapes what comes
//! back (`shape.rs`, `respond.rs`). What a client does wrong is a 4xx that names the field; a client that leaves drops its
//! handler, and with it its answers.

mod body;
mod generate;
mod job;
mod logprobs;
mod lora;
mod params;
mod plain;
mod prompt;
mod respond;
mod shape;
mod weights;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::routing::{get, post};
use http::{HeaderValue, StatusCode};
use prometheus_client::registry::Registry;

pub(super) use self::lora::Adapters;
use super::front::Front;
use super::model::Weights;
use crate::config::WeightsConfig;
use crate::kv::Role;
use crate::openai::{ApiError, headers};
use crate::telemetry::clock;
use crate::weights::WeightsHandle;

/// When to ask a worker again that cannot serve now.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What every handler may see.
pub(super) type State = Arc<ServerState>;

pub(super) struct ServerState {
    pub front: Front,
    pub model: String,
    pub model_len_max: usize,
    pub role: Role,
    /// What the worker was started with.
    pub weights: Weights,
    pub adapters: Adapters,
    pub weights_runtime: WeightsHandle,
    pub weights_config: WeightsConfig,
    pub registry: Registry,
    pub started_s: u64,
    /// Cleared when the scheduler ends.
    pub alive: Arc<AtomicBool>,
}

impl ServerState {
    /// The adapter that a model's name stands for; the model itself has none.
    fn adapter_of(&self, model: Option<&str>) -> Result<Option<[u8; 16]>, ApiError> {
        match model {
            None => Err(ApiError::bad_param("model", "the field `model` is required")),
            Some(model) if model == self.model => Ok(None),
            Some(model) => self.adapters.of(model).map(Some).ok_or_else(|| ApiError::unknown_model(model)),
        }
    }

    fn is_alive(&self) -> bool {
        self.alive.load(Ordering::Acquire)
    }
}

/// All routes.
pub(super) fn router(state: State) -> Router {
    Router::new()
        .route("/v1/completions", post(generate::completions))
        .route("/v1/chat/completions", post(generate::chat))
        .route("/v1/chat/completions/tokens", post(generate::chat_tokens))
        .route("/chat/completions/tokens", post(generate::chat_tokens))
        .route("/v1/models", get(plain::models))
        .route("/tokenize", post(plain::tokenize))
        .route("/detokenize", post(plain::detokenize))
        .route("/health", get(plain::health))
        .route("/ping", get(plain::ping).post(plain::ping))
        .route("/version", get(plain::version))
        .route("/load", get(plain::load))
        .route("/metrics", get(plain::metrics))
        .route("/reset_prefix_cache", post(plain::reset_prefix_cache))
        .route("/abort_requests", post(plain::abort_requests))
        .route("/update_weights", post(weights::update_weights))
        .route("/reload_weights", post(weights::reload_weights))
        .route("/init_broadcaster", post(weights::init_broadcaster))
        .route("/load_lora_adapter", post(lora::load))
        .route("/v1/load_lora_adapter", post(lora::load))
        .route("/unload_lora_adapter", post(lora::unload))
        .route("/v1/unload_lora_adapter", post(lora::unload))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn(echo_request_id))
        .with_state(state)
}

async fn unknown_route(request: Request) -> ApiError {
    ApiError::not_found(format!("there is no route {}", request.uri().path()))
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} is not allowed on {}", request.method(), request.uri().path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// Every response says which request it answers: by the client's name for it, or by one of ours.
async fn echo_request_id(request: Request, next: Next) -> Response {
    let fits = |id: &&HeaderValue| !id.is_empty() && id.len() <= headers::REQUEST_ID_BYTES_MAX && id.to_str().is_ok();
    let id = request.headers().get(headers::X_REQUEST_ID).filter(fits).cloned();
    let mut response = next.run(request).await;
    let fresh = || HeaderValue::from_str(&job::random_id()).expect("hex digits");
    response.headers_mut().entry(headers::X_REQUEST_ID).or_insert_with(|| id.unwrap_or_else(fresh));
    response
}

/// Seconds since 1970.
pub(super) fn unix_time_s() -> u64 {
    clock::unix().as_secs()
}
