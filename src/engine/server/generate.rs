//! The routes that generate: completions, chat, and chat over tokens.

use axum::extract::{Request, State as Shared};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::Deserialize;
use serde_json::Value;

use super::super::chat::{ChatMessage, Ending, render};
use super::super::tokenizer::Token;
use super::State;
use super::body::{fields, read_object};
use super::job::{self, Asked};
use super::params::{CommonFields, check_logprobs};
use super::prompt::{prompts, tokens};
use super::respond::respond;
use super::shape::Shape;
use crate::openai::ApiError;

/// Tokens in a completion that names no limit: OpenAI's own default.
const COMPLETION_TOKENS_DEFAULT: usize = 16;

/// What only completions have.
#[derive(Debug, Deserialize)]
struct CompletionFields {
    logprobs: Option<u64>,
    suffix: Option<String>,
}

/// What only chat has.
#[derive(Debug, Deserialize)]
pub(super) struct ChatFields {
    pub messages: Option<Vec<ChatMessage>>,
    tools: Option<Vec<Value>>,
    max_completion_tokens: Option<u64>,
    logprobs: Option<bool>,
    top_logprobs: Option<u64>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
}

/// `POST /v1/completions`
pub(super) async fn completions(Shared(state): Shared<State>, request: Request) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let object = read_object(request).await?;
    let (job, answers) = start_completion(&state, &headers, &object)?;
    respond(Shape::Completion, job, answers).await
}

fn start_completion(
    state: &State,
    headers: &HeaderMap,
    object: &Value,
) -> Result<(job::Job, super::super::front::Answers), ApiError> {
    let read = || {
        let (common, own) = (fields::<CommonFields>(object)?, fields::<CompletionFields>(object)?);
        state.adapter_of(common.model.as_deref())?;
        if own.suffix.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::bad_param("suffix", "suffix is not supported"));
        }
        let asked = Asked {
            id_prefix: "cmpl",
            prompts: prompts(object.get("prompt"))?,
            max_tokens: common.max_tokens,
            max_tokens_default: Some(COMPLETION_TOKENS_DEFAULT),
            logprobs: own.logprobs.map(|wanted| check_logprobs("logprobs", wanted)).transpose()?,
        };
        Ok((common, asked))
    };
    let (common, asked) = read().inspect_err(|_| job::decline_unread(state, object))?;
    job::start(state, headers, &common, asked)
}

/// `POST /v1/chat/completions`
pub(super) async fn chat(Shared(state): Shared<State>, request: Request) -> Result<Response, ApiError> {
    chat_with(&state, request, false).await
}

/// `POST /v1/chat/completions/tokens`: as chat, but `tokens` replaces the rendered prompt.
pub(super) async fn chat_tokens(Shared(state): Shared<State>, request: Request) -> Result<Response, ApiError> {
    chat_with(&state, request, true).await
}

async fn chat_with(state: &State, request: Request, from_tokens: bool) -> Result<Response, ApiError> {
    let headers = request.headers().clone();
    let object = read_object(request).await?;
    let read = read_chat(state, &object, from_tokens).inspect_err(|_| job::decline_unread(state, &object));
    let (common, asked) = read?;
    let (job, answers) = job::start(state, &headers, &common, asked)?;
    respond(Shape::Chat, job, answers).await
}

fn read_chat(state: &State, object: &Value, from_tokens: bool) -> Result<(CommonFields, Asked), ApiError> {
    let (mut common, own) = (fields::<CommonFields>(object)?, fields::<ChatFields>(object)?);
    state.adapter_of(common.model.as_deref())?;
    // In chat `echo` repeats the last message, which this engine's template already has in the prompt.
    common.echo = None;
    let wanted = check_logprobs("top_logprobs", own.top_logprobs.unwrap_or(0))?;
    let logprobs = own.logprobs.unwrap_or(false);
    if wanted > 0 && !logprobs {
        return Err(ApiError::bad_param("top_logprobs", "top_logprobs need `logprobs: true`"));
    }
    let prompt = if from_tokens { given_tokens(object)? } else { rendered(&own)? };
    let asked = Asked {
        id_prefix: "chatcmpl",
        prompts: vec![prompt],
        max_tokens: own.max_completion_tokens.or(common.max_tokens),
        max_tokens_default: None,
        logprobs: logprobs.then_some(wanted),
    };
    Ok((common, asked))
}

/// The prompt of a conversation, as a route's body gives it.
pub(super) fn rendered(own: &ChatFields) -> Result<Vec<Token>, ApiError> {
    let continued = own.continue_final_message.unwrap_or(false);
    let ending = match (continued, own.add_generation_prompt.unwrap_or(!continued)) {
        (true, true) => {
            let message = "continue_final_message and add_generation_prompt exclude each other";
            return Err(ApiError::bad_param("continue_final_message", message));
        }
        (true, false) => Ending::Continue,
        (false, true) => Ending::Generation,
        (false, false) => Ending::Closed,
    };
    let Some(messages) = &own.messages else {
        return Err(ApiError::bad_param("messages", "the field `messages` is required"));
    };
    let tools = own.tools.as_deref().unwrap_or_default();
    render(messages, tools, ending).map_err(|error| ApiError::bad_param("messages", error.to_string()))
}

fn given_tokens(object: &Value) -> Result<Vec<Token>, ApiError> {
    match object.get("tokens") {
        Some(Value::Array(items)) if !items.is_empty() => tokens("tokens", items),
        _ => Err(ApiError::bad_param("tokens", "tokens must be a list of at least one token id")),
    }
}
