//! One generation request, checked: what to submit, and what the response needs to know beside the answers.

use std::sync::Arc;

use axum::http::HeaderMap;
use serde_json::Value;

use super::super::front::Answers;
use super::super::model::Weights;
use super::super::request::{HandOver, NewSequence, Params, Source};
use super::super::tokenizer::Token;
use super::State;
use super::params::CommonFields;
use crate::kv::{KvRequest, ParamsError, Role, TransferId, TransferParams};
use crate::openai::{ApiError, headers};

/// A request that will be served.
pub(super) struct Job {
    /// `cmpl-…` or `chatcmpl-…`: the id in the response.
    pub id: String,
    /// The client's name for the request.
    pub request_id: String,
    pub created: u64,
    pub model: String,
    pub prompts: Vec<Arc<[Token]>>,
    /// Answers per prompt.
    pub n: usize,
    pub stream: bool,
    pub includes_usage: bool,
    pub continuous_usage: bool,
    pub return_token_ids: bool,
    pub echo: bool,
    /// Candidates to show per token of the answer.
    pub logprobs: Option<usize>,
    pub prompt_logprobs: Option<usize>,
    /// Those of the answer; until it has begun, those that are served.
    pub weights: Weights,
}

/// What is particular to a route.
pub(super) struct Asked {
    pub id_prefix: &'static str,
    pub prompts: Vec<Vec<Token>>,
    pub max_tokens: Option<u64>,
    /// `max_tokens` where the client gives none; `None` is all the room there is.
    pub max_tokens_default: Option<usize>,
    pub logprobs: Option<usize>,
}

/// Checks everything, takes places, submits. A refusal after the transfer parameters were read tells prefill.
pub(super) fn start(
    state: &State,
    headers: &HeaderMap,
    common: &CommonFields,
    asked: Asked,
) -> Result<(Job, Answers), ApiError> {
    let transfer = transfer(state, common.kv_transfer_params.as_ref())?;
    checked(state, headers, common, asked, &transfer).inspect_err(|_| decline(state, &transfer))
}

/// Prefill must not keep blocks for a request that was refused here. What could not even be read is left to the lease.
pub(super) fn decline_unread(state: &State, object: &Value) {
    if let Ok(transfer) = transfer(state, object.get("kv_transfer_params")) {
        decline(state, &transfer);
    }
}

fn decline(state: &State, transfer: &KvRequest) {
    match transfer {
        KvRequest::Decode(params) => state.front.decline(Source::Remote(params.clone())),
        KvRequest::Early(params) => state.front.decline(Source::Early(params.clone())),
        KvRequest::Plain | KvRequest::Prefill { .. } => {}
    }
}

fn checked(
    state: &State,
    headers: &HeaderMap,
    common: &CommonFields,
    asked: Asked,
    transfer: &KvRequest,
) -> Result<(Job, Answers), ApiError> {
    let adapter = state.adapter_of(common.model.as_deref())?;
    let (n, stream) = (common.n()?, common.streams()?);
    let answers = n.saturating_mul(asked.prompts.len());
    if answers > 1 && *transfer != KvRequest::Plain {
        let message = format!("KV is handed over for one answer, this request asks for {answers}; split it");
        return Err(ApiError::bad_param("kv_transfer_params", message));
    }
    let prompt_logprobs = common.prompt_logprobs()?;
    let sampling = common.sampling(n)?;
    let limits = |prompt: &Vec<Token>| {
        let (wanted, default) = (asked.max_tokens, asked.max_tokens_default);
        let limits = common.limits(wanted, default, asked.logprobs, prompt.len(), state.model_len_max);
        limits.map(|limits| Arc::new(Params { adapter, ..limits }))
    };
    let params: Vec<Arc<Params>> = asked.prompts.iter().map(limits).collect::<Result<_, _>>()?;
    let request_id = request_id(headers, common.request_id.as_deref());
    let id = format!("{}-{request_id}", asked.id_prefix);
    let prompts: Vec<Arc<[Token]>> = asked.prompts.into_iter().map(Into::into).collect();
    let mut slots = state.front.reserve(answers)?.into_iter();
    let mut sequences = Vec::with_capacity(answers);
    for (at, (prompt, params)) in prompts.iter().zip(&params).enumerate() {
        for (choice, sampling) in sampling.iter().enumerate() {
            sequences.push(NewSequence {
                index: at * n + choice,
                request_id: format!("{id}-{at}-{:08x}", rand::random::<u32>()),
                prompt: prompt.clone(),
                params: params.clone(),
                sampling: sampling.clone(),
                source: source(state, transfer, prompt_logprobs),
                streams: stream,
                hand_over: match transfer {
                    KvRequest::Prefill { transfer_id, early } => {
                        Some(HandOver { transfer_id: *transfer_id, early: *early })
                    }
                    _ => None,
                },
                slot: slots.next().expect("as many places as answers"),
            });
        }
    }
    let answers = state.front.submit(id.clone(), sequences);
    let job = Job {
        id,
        request_id,
        created: super::unix_time_s(),
        model: common.model.clone().unwrap_or_default(),
        prompts,
        n,
        stream,
        includes_usage: common.includes_usage(),
        continuous_usage: common.continuous_usage(),
        return_token_ids: common.return_token_ids.unwrap_or(false),
        echo: common.echo.unwrap_or(false),
        logprobs: asked.logprobs,
        prompt_logprobs,
        weights: state.weights,
    };
    Ok((job, answers))
}

/// `prompt_logprobs` need the prompt computed here: KV that waits elsewhere is let go, as vLLM does.
fn source(state: &State, transfer: &KvRequest, prompt_logprobs: Option<usize>) -> Source {
    match transfer {
        KvRequest::Decode(_) | KvRequest::Early(_) if prompt_logprobs.is_some() => {
            decline(state, transfer);
            Source::Local
        }
        KvRequest::Decode(params) => Source::Remote(params.clone()),
        KvRequest::Early(params) => Source::Early(params.clone()),
        KvRequest::Plain | KvRequest::Prefill { .. } => Source::Local,
    }
}

/// Reads `kv_transfer_params`, which are a client's text until the runtime has checked them.
fn transfer(state: &State, value: Option<&Value>) -> Result<KvRequest, ApiError> {
    let refuse = |message: String| ApiError::bad_param("kv_transfer_params", message);
    let request = match KvRequest::parse(value) {
        // A router that knows nothing of us sends NIXL's fields alone; then the id is ours to draw.
        Err(ParamsError::Foreign) if asks_prefill(value) => {
            KvRequest::Prefill { transfer_id: TransferId::random(), early: false }
        }
        other => other.map_err(|error| refuse(error.to_string()))?,
    };
    match (&request, state.role) {
        (KvRequest::Prefill { .. }, Role::Decode) => {
            Err(refuse("this worker does decode: it hands no KV over".to_owned()))
        }
        (KvRequest::Decode(_) | KvRequest::Early(_), Role::Prefill) => {
            Err(refuse("this worker does prefill: it loads no KV".to_owned()))
        }
        _ => Ok(request),
    }
}

fn asks_prefill(value: Option<&Value>) -> bool {
    value.and_then(|value| value.get("do_remote_decode")).and_then(Value::as_bool).unwrap_or(false)
}

/// The header wins over the body; a request without either gets a random one.
fn request_id(request: &HeaderMap, body: Option<&str>) -> String {
    let fits = |id: &&str| !id.is_empty() && id.len() <= headers::REQUEST_ID_BYTES_MAX;
    let header = request.get(headers::X_REQUEST_ID).and_then(|value| value.to_str().ok()).filter(fits);
    header.or_else(|| body.filter(fits)).map_or_else(random_id, str::to_owned)
}

/// 32 random hex digits.
pub(super) fn random_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

impl Job {
    /// The prompt that an answer belongs to.
    pub(super) fn prompt_of(&self, index: usize) -> &Arc<[Token]> {
        &self.prompts[index / self.n]
    }

    /// Answers in all.
    pub(super) fn answers(&self) -> usize {
        self.prompts.len() * self.n
    }

    /// Tokens of all prompts, each counted once.
    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.len()).sum()
    }

    /// Transfer parameters as they go into a response.
    pub(super) fn transfer_json(transfer: Option<&TransferParams>) -> Value {
        transfer.map_or(Value::Null, TransferParams::to_json)
    }
}
