//! The routes that generate nothing: what is served, how it fares, tokens, the prefix cache.

use axum::Json;
use axum::extract::{Request, State as Shared};
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::tokenizer::{decode, encode, token_text};
use super::State;
use super::body::{fields, read_object, read_object_or_nothing};
use super::generate::{ChatFields, rendered};
use super::prompt::tokens;
use crate::openai::ApiError;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// `GET /v1/models`
pub(super) async fn models(Shared(state): Shared<State>) -> Json<Value> {
    let card = |id: &str, parent: Option<&str>| {
        json!({
            "id": id, "object": "model", "created": state.started_s, "owned_by": "pdlink",
            "root": state.model, "parent": parent, "max_model_len": state.model_len_max, "permission": [],
        })
    };
    let adapters = state.adapters.names();
    let adapters = adapters.iter().map(|name| card(name, Some(&state.model)));
    let cards: Vec<Value> = std::iter::once(card(&state.model, None)).chain(adapters).collect();
    Json(json!({"object": "list", "data": cards}))
}

/// `GET /health`: whether requests can be served.
pub(super) async fn health(Shared(state): Shared<State>) -> Result<(), ApiError> {
    if !state.is_alive() {
        return Err(ApiError::unavailable("the engine has stopped", super::RETRY_AFTER));
    }
    if state.front.is_draining() {
        return Err(ApiError::unavailable("the worker is shutting down", super::RETRY_AFTER));
    }
    Ok(())
}

/// `GET` or `POST /ping`
pub(super) async fn ping(state: Shared<State>) -> Result<(), ApiError> {
    health(state).await
}

/// `GET /version`
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION"), "commit": env!("PDLINK_COMMIT")}))
}

/// `GET /load`
pub(super) async fn load(Shared(state): Shared<State>) -> Json<Value> {
    Json(json!({"server_load": state.front.load()}))
}

/// `GET /metrics`
pub(super) async fn metrics(Shared(state): Shared<State>) -> Result<Response, ApiError> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &state.registry)
        .map_err(|error| ApiError::internal(format!("metrics cannot be written: {error}")))?;
    Ok(([(CONTENT_TYPE, OPEN_METRICS)], text).into_response())
}

#[derive(Debug, Deserialize)]
struct TokenizeFields {
    model: Option<String>,
    prompt: Option<String>,
    return_token_strs: Option<bool>,
}

/// `POST /tokenize`: of a prompt, or of messages.
pub(super) async fn tokenize(Shared(state): Shared<State>, request: Request) -> Result<Json<Value>, ApiError> {
    let object = read_object(request).await?;
    let own: TokenizeFields = fields(&object)?;
    check_model(&state, own.model.as_deref())?;
    let tokens = match own.prompt {
        Some(prompt) => encode(&prompt),
        None if object.get("messages").is_some() => rendered(&fields::<ChatFields>(&object)?)?,
        None => return Err(ApiError::bad_param("prompt", "one of `prompt` and `messages` is required")),
    };
    let strings: Option<Vec<String>> =
        own.return_token_strs.unwrap_or(false).then(|| tokens.iter().map(|&token| token_text(token)).collect());
    let count = tokens.len();
    Ok(Json(json!({"count": count, "max_model_len": state.model_len_max, "tokens": tokens, "token_strs": strings})))
}

#[derive(Debug, Deserialize)]
struct DetokenizeFields {
    model: Option<String>,
}

/// `POST /detokenize`
pub(super) async fn detokenize(Shared(state): Shared<State>, request: Request) -> Result<Json<Value>, ApiError> {
    let object = read_object(request).await?;
    check_model(&state, fields::<DetokenizeFields>(&object)?.model.as_deref())?;
    let Some(Value::Array(items)) = object.get("tokens") else {
        return Err(ApiError::bad_param("tokens", "tokens must be a list of token ids"));
    };
    Ok(Json(json!({"prompt": decode(&tokens("tokens", items)?, false)})))
}

/// `POST /reset_prefix_cache`: `success` is false while blocks are in use.
pub(super) async fn reset_prefix_cache(Shared(state): Shared<State>) -> Result<Json<Value>, ApiError> {
    let done = state.front.reset_prefix_cache().await;
    done.map(|success| Json(json!({"success": success}))).ok_or_else(stopped)
}

#[derive(Debug, Deserialize)]
struct AbortFields {
    request_ids: Option<Vec<String>>,
}

/// `POST /abort_requests`: those named, or all.
pub(super) async fn abort_requests(Shared(state): Shared<State>, request: Request) -> Result<Json<Value>, ApiError> {
    let own: AbortFields = fields(&read_object_or_nothing(request).await?)?;
    // A request is known by its whole id and by the name in it that its client gave.
    let spelled = |id: String| [format!("cmpl-{id}"), format!("chatcmpl-{id}"), id];
    let names = own.request_ids.map(|ids| ids.into_iter().flat_map(spelled).collect());
    let ended = state.front.abort_named(names).await.ok_or_else(stopped)?;
    Ok(Json(json!({"status": "aborted", "aborted": ended})))
}

fn check_model(state: &State, model: Option<&str>) -> Result<(), ApiError> {
    match model {
        Some(model) => state.adapter_of(Some(model)).map(drop),
        None => Ok(()),
    }
}

fn stopped() -> ApiError {
    ApiError::unavailable("the engine has stopped", super::RETRY_AFTER)
}
