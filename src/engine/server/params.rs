//! The fields that completions and chat share: read, checked, turned into what the scheduler takes.

use serde::Deserialize;
use serde_json::Value;

use super::super::model::{CANDIDATES, Sampling, mix};
use super::super::request::Params;
use super::super::tokenizer::Token;
use crate::openai::ApiError;

/// Most answers per prompt.
const N_MAX: u64 = 128;
const STOPS_MAX: usize = 64;
const STOP_BYTES_MAX: usize = 4096;

/// Shared fields as they come. `null` is the same as absent.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct CommonFields {
    pub model: Option<String>,
    pub max_tokens: Option<u64>,
    pub min_tokens: Option<u64>,
    pub n: Option<u64>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub seed: Option<i64>,
    pub stop: Option<Stops>,
    pub stop_token_ids: Option<Vec<Token>>,
    pub include_stop_str_in_output: Option<bool>,
    pub ignore_eos: Option<bool>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub prompt_logprobs: Option<i64>,
    pub return_token_ids: Option<bool>,
    pub cache_salt: Option<String>,
    pub request_id: Option<String>,
    pub echo: Option<bool>,
    pub kv_transfer_params: Option<Value>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct StreamOptions {
    pub include_usage: Option<bool>,
    pub continuous_usage_stats: Option<bool>,
}

/// `stop`: one string or several.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "must be a string or a list of strings")]
pub(super) enum Stops {
    One(String),
    Several(Vec<String>),
}

impl CommonFields {
    /// Answers per prompt.
    pub(super) fn n(&self) -> Result<usize, ApiError> {
        match self.n.unwrap_or(1) {
            n @ 1..=N_MAX => Ok(usize::try_from(n).unwrap_or(1)),
            n => Err(ApiError::bad_param("n", format!("n must be 1 to {N_MAX}, got {n}"))),
        }
    }

    /// Whether the answer is streamed. `stream_options` without a stream is a mistake.
    pub(super) fn streams(&self) -> Result<bool, ApiError> {
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(ApiError::bad_param("stream_options", "stream_options need `stream: true`"));
        }
        Ok(stream)
    }

    pub(super) fn includes_usage(&self) -> bool {
        self.stream_options.is_some_and(|options| options.include_usage.unwrap_or(false))
    }

    pub(super) fn continuous_usage(&self) -> bool {
        self.includes_usage() && self.stream_options.is_some_and(|o| o.continuous_usage_stats.unwrap_or(false))
    }

    /// How sampling goes for each of `n` answers.
    pub(super) fn sampling(&self, n: usize) -> Result<Vec<Sampling>, ApiError> {
        // Greedy unless asked otherwise, as a model's own generation settings may have it.
        let temperature = self.temperature.unwrap_or(0.0);
        if !(0.0..=100.0).contains(&temperature) {
            return Err(ApiError::bad_param("temperature", format!("temperature must be 0 to 100, got {temperature}")));
        }
        let top_p = self.top_p.unwrap_or(1.0);
        if !(top_p > 0.0 && top_p <= 1.0) {
            return Err(ApiError::bad_param("top_p", format!("top_p must be above 0 and at most 1, got {top_p}")));
        }
        let top_k = match self.top_k.unwrap_or(0) {
            -1 => 0,
            top_k => usize::try_from(top_k)
                .map_err(|_| ApiError::bad_param("top_k", format!("top_k must be -1 or more, got {top_k}")))?,
        };
        let seed = self.seed.map_or_else(rand::random, |seed| mix(seed.cast_unsigned(), 0));
        Ok((0..n).map(|choice| Sampling { temperature, top_p, top_k, seed: mix(seed, choice as u64) }).collect())
    }

    /// `prompt_logprobs`: how many candidates to show for each prompt token.
    pub(super) fn prompt_logprobs(&self) -> Result<Option<usize>, ApiError> {
        let Some(wanted) = self.prompt_logprobs else { return Ok(None) };
        if self.stream.unwrap_or(false) {
            return Err(ApiError::bad_param("prompt_logprobs", "prompt_logprobs cannot be streamed"));
        }
        let count = if wanted == -1 { Some(CANDIDATES) } else { usize::try_from(wanted).ok() };
        count.filter(|&count| count <= CANDIDATES).map(Some).ok_or_else(|| {
            let message = format!("prompt_logprobs must be -1 to {CANDIDATES}, got {wanted}");
            ApiError::bad_param("prompt_logprobs", message)
        })
    }

    /// Limits and ends of an answer to a prompt of `prompt_len` tokens; `max_tokens` is what the client asked for.
    pub(super) fn limits(
        &self,
        max_tokens: Option<u64>,
        default: Option<usize>,
        logprobs: Option<usize>,
        prompt_len: usize,
        model_len_max: usize,
    ) -> Result<Params, ApiError> {
        if prompt_len == 0 {
            return Err(ApiError::bad_param("prompt", "the prompt is empty: there must be at least one token"));
        }
        let room = model_len_max.saturating_sub(prompt_len);
        let max_tokens = match max_tokens {
            Some(0) => return Err(ApiError::bad_param("max_tokens", "max_tokens must be at least 1, got 0")),
            Some(wanted) => usize::try_from(wanted).unwrap_or(usize::MAX),
            None => default.unwrap_or(room).min(room),
        };
        if room == 0 || max_tokens > room {
            return Err(ApiError::bad_param(
                "max_tokens",
                format!(
                    "This model's maximum context length is {model_len_max} tokens. However, you requested {max_tokens} \
                 output tokens and your prompt contains {prompt_len} tokens. Please shorten the prompt or ask for fewer."
                ),
            ));
        }
        let min_tokens = usize::try_from(self.min_tokens.unwrap_or(0)).unwrap_or(usize::MAX);
        if min_tokens > max_tokens {
            let message = format!("min_tokens must be at most max_tokens={max_tokens}, got {min_tokens}");
            return Err(ApiError::bad_param("min_tokens", message));
        }
        Ok(Params {
            max_tokens,
            min_tokens,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            stop: self.stops()?,
            include_stop: self.include_stop_str_in_output.unwrap_or(false),
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            logprobs,
            cache_salt: self.cache_salt.clone(),
            adapter: None,
        })
    }

    fn stops(&self) -> Result<Vec<String>, ApiError> {
        let stops = match &self.stop {
            None => Vec::new(),
            Some(Stops::One(stop)) => vec![stop.clone()],
            Some(Stops::Several(stops)) => stops.clone(),
        };
        if stops.len() > STOPS_MAX || stops.iter().any(|stop| stop.len() > STOP_BYTES_MAX) {
            let message = format!("stop may have {STOPS_MAX} strings of {STOP_BYTES_MAX} bytes each");
            return Err(ApiError::bad_param("stop", message));
        }
        if stops.iter().any(String::is_empty) {
            return Err(ApiError::bad_param("stop", "stop cannot contain an empty string"));
        }
        Ok(stops)
    }
}

/// Checks how many candidates are asked for.
pub(super) fn check_logprobs(param: &'static str, wanted: u64) -> Result<usize, ApiError> {
    usize::try_from(wanted)
        .ok()
        .filter(|&count| count <= CANDIDATES)
        .ok_or_else(|| ApiError::bad_param(param, format!("{param} must be at most {CANDIDATES}, got {wanted}")))
}
