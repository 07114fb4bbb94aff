//! What is to be done with one generation request, read off its body.
//!
//! | The body has | then |
//! | --- | --- |
//! | `n` or `best_of` above 1, beam search | one decode worker alone: children of one request share one set of KV parameters in vLLM, and the first to finish frees the blocks under the others |
//! | several prompts, `prompt_embeds` | one decode worker alone: prefill would hold the KV of the first prompt only |
//! | `echo` with `logprobs`; `prompt_logprobs` in a stream or in `sampling_params` | one decode worker alone: log-probabilities of the prompt are made where the prompt is computed |
//! | `prompt_logprobs` otherwise | both legs; prefill is asked for them and its answer is put into decode's |
//!
//! "Alone" means that decode prefills by itself. A copy per sample or prompt would cost a prefill each, and a merge of
//! streams would no longer be the worker's own bytes, so such requests are sent whole.

use super::Mode;
use super::dialect::Connector;
use crate::openai::scan::{self, Kind};
use crate::openai::splice::{BodyError, Field, RequestBody};

/// The family a route belongs to: which fields its body has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shape {
    /// `/v1/completions`
    Completion,
    /// `/v1/chat/completions`, also with tokens.
    Chat,
    /// `/inference/v1/generate`: tokens in, tokens out; the sampling parameters are an object of their own.
    Generate,
}

/// Why one worker serves a request alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Alone {
    /// There are no prefill workers in this deployment.
    Plain,
    SeveralSamples,
    BeamSearch,
    SeveralPrompts,
    PromptEmbeds,
    PromptLogprobs,
    /// Below `local_prefill_below_bytes`.
    Short,
    /// No prefill worker can serve, and `local_prefill` allows it (PX-5).
    PrefillDown,
    /// Prefill held no KV, and `local_prefill` allows it.
    NothingHeld,
    /// A route that has no prefill leg.
    OtherRoute,
}

impl Alone {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::SeveralSamples => "several_samples",
            Self::BeamSearch => "beam_search",
            Self::SeveralPrompts => "several_prompts",
            Self::PromptEmbeds => "prompt_embeds",
            Self::PromptLogprobs => "prompt_logprobs",
            Self::Short => "short",
            Self::PrefillDown => "prefill_down",
            Self::NothingHeld => "nothing_held",
            Self::OtherRoute => "other_route",
        }
    }
}

/// What a body asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) shape: Shape,
    pub(crate) stream: bool,
    pub(crate) alone: Option<Alone>,
    /// Prefill is asked for `prompt_logprobs`, and its answer is merged into decode's.
    pub(crate) merge_logprobs: bool,
}

impl Plan {
    /// Checks the types of what the proxy reads and decides.
    pub(crate) fn of(shape: Shape, body: &RequestBody, mode: Mode, short_below_bytes: u64) -> Result<Self, BodyError> {
        body.check(Field::Model, &[Kind::String], "a string")?;
        body.check(Field::StreamOptions, &[Kind::Object], "an object")?;
        for field in [Field::MaxTokens, Field::MaxCompletionTokens, Field::MinTokens, Field::MinCompletionTokens] {
            body.check(field, &[Kind::Number], "a number")?;
        }
        match shape {
            Shape::Completion => body.check(Field::Prompt, &[Kind::String, Kind::Array], "a string or an array")?,
            Shape::Chat => {
                body.check(Field::Messages, &[Kind::Array, Kind::String], "an array")?;
                body.check(Field::Tokens, &[Kind::Array], "an array")?;
            }
            Shape::Generate => {
                body.check(Field::TokenIds, &[Kind::Array], "an array")?;
                body.check(Field::SamplingParams, &[Kind::Object], "an object")?;
            }
        }
        let stream = body.flag(Field::Stream)?;
        let sampling = sampling_of(shape, body)?;
        let sampling = sampling.as_ref().unwrap_or(body);
        let mut alone = why_alone(shape, body, sampling)?;
        let logprobs = sampling.has(Field::PromptLogprobs);
        if logprobs && (stream || shape == Shape::Generate) {
            alone = alone.or(Some(Alone::PromptLogprobs));
        }
        if (body.text().len() as u64) < short_below_bytes {
            alone = alone.or(Some(Alone::Short));
        }
        if mode == Mode::Plain {
            alone = Some(Alone::Plain);
        }
        Ok(Self { shape, stream, alone, merge_logprobs: logprobs && alone.is_none() })
    }

    /// What the prompt is made from, for prefix affinity.
    pub(crate) fn prompt<'a>(&self, body: &'a RequestBody) -> &'a [u8] {
        let fields: &[Field] = match self.shape {
            Shape::Completion => &[Field::Prompt],
            Shape::Chat => &[Field::Tokens, Field::Messages],
            Shape::Generate => &[Field::TokenIds],
        };
        fields.iter().find_map(|&field| body.raw(field)).map_or(&[], |(text, _)| text)
    }
}

/// The object that the sampling parameters of this route are in, where that is not the body itself.
pub(crate) fn sampling_of(shape: Shape, body: &RequestBody) -> Result<Option<RequestBody>, BodyError> {
    match body.raw_bytes(Field::SamplingParams) {
        Some((text, Kind::Object)) if shape == Shape::Generate => RequestBody::scan(text).map(Some),
        _ => Ok(None),
    }
}

fn why_alone(shape: Shape, body: &RequestBody, sampling: &RequestBody) -> Result<Option<Alone>, BodyError> {
    let above_one = |field| sampling.number(field).map(|number| number.is_some_and(|number| number > 1.0));
    if above_one(Field::N)? || above_one(Field::BestOf)? {
        return Ok(Some(Alone::SeveralSamples));
    }
    if sampling.flag(Field::UseBeamSearch)? {
        return Ok(Some(Alone::BeamSearch));
    }
    if shape != Shape::Completion {
        return Ok(None);
    }
    if body.has(Field::PromptEmbeds) {
        return Ok(Some(Alone::PromptEmbeds));
    }
    if let Some((text, Kind::Array)) = body.raw(Field::Prompt) {
        // An array of numbers is one prompt; of strings or arrays, one prompt each.
        let first = scan::elements(text, 2)?;
        if first.len() == 2 && first[0].1 != Kind::Number {
            return Ok(Some(Alone::SeveralPrompts));
        }
    }
    let echoes = body.flag(Field::Echo)? && body.has(Field::Logprobs);
    Ok(echoes.then_some(Alone::PromptLogprobs))
}

/// Whether a request may be told apart by parameters at all: only relayed ones say that prefill held nothing.
pub(crate) fn expects_params(connector: Connector) -> bool {
    connector != Connector::P2pNccl
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn plan(shape: Shape, text: &str) -> Result<Plan, BodyError> {
        let body = RequestBody::scan(Bytes::copy_from_slice(text.as_bytes()))?;
        Plan::of(shape, &body, Mode::Disaggregated, 0)
    }

    #[test]
    fn requests_that_both_legs_would_break_are_sent_whole() {
        use Shape::{Chat, Completion, Generate};
        let cases = [
            (Completion, r#"{"prompt":"a"}"#, None),
            (Completion, r#"{"prompt":[1,2,3],"n":1}"#, None),
            (Completion, r#"{"prompt":["only one"]}"#, None),
            (Completion, r#"{"prompt":[[1,2]]}"#, None),
            (Completion, r#"{"prompt":["a","b"]}"#, Some(Alone::SeveralPrompts)),
            (Completion, r#"{"prompt":[[1],[2]]}"#, Some(Alone::SeveralPrompts)),
            (Completion, r#"{"prompt":"a","echo":true,"logprobs":1}"#, Some(Alone::PromptLogprobs)),
            (Completion, r#"{"prompt":"a","echo":true}"#, None),
            (Completion, r#"{"prompt_embeds":"AA"}"#, Some(Alone::PromptEmbeds)),
            (Chat, r#"{"messages":[],"n":2}"#, Some(Alone::SeveralSamples)),
            (Chat, r#"{"messages":[],"\u006e":2.0}"#, Some(Alone::SeveralSamples)),
            (Chat, r#"{"messages":[],"n":null,"use_beam_search":true}"#, Some(Alone::BeamSearch)),
            (Chat, r#"{"messages":[],"stream":true,"prompt_logprobs":0}"#, Some(Alone::PromptLogprobs)),
            (Generate, r#"{"token_ids":[1],"sampling_params":{"n":3}}"#, Some(Alone::SeveralSamples)),
            (Generate, r#"{"token_ids":[1],"sampling_params":{"max_tokens":3}}"#, None),
        ];
        for (shape, text, want) in cases {
            assert_eq!(plan(shape, text).map(|plan| plan.alone), Ok(want), "case: {text}");
        }
    }

    #[test]
    fn prompt_logprobs_are_asked_of_prefill() {
        assert!(plan(Shape::Chat, r#"{"prompt_logprobs":1}"#).expect("valid").merge_logprobs);
        assert!(!plan(Shape::Chat, r#"{"prompt_logprobs":null}"#).expect("valid").merge_logprobs);
        assert!(!plan(Shape::Chat, r#"{"prompt_logprobs":1,"n":2}"#).expect("valid").merge_logprobs);
    }

    #[test]
    fn wrong_types_are_refused_by_name() {
        let cases = [
            (r#"{"model":1}"#, "model"),
            (r#"{"stream":"yes"}"#, "stream"),
            (r#"{"n":"2"}"#, "n"),
            (r#"{"max_tokens":[]}"#, "max_tokens"),
            (r#"{"prompt":{}}"#, "prompt"),
            (r#"{"stream_options":true}"#, "stream_options"),
        ];
        for (text, param) in cases {
            assert_eq!(plan(Shape::Completion, text).expect_err(text).param(), Some(param));
        }
    }

    #[test]
    fn short_prompts_and_plain_workers_need_no_prefill_leg() {
        let body = RequestBody::scan(Bytes::from_static(br#"{"prompt":"a"}"#)).expect("valid");
        let alone = |mode, below| Plan::of(Shape::Completion, &body, mode, below).expect("valid").alone;
        assert_eq!(alone(Mode::Disaggregated, 100), Some(Alone::Short));
        assert_eq!(alone(Mode::Disaggregated, 5), None);
        assert_eq!(alone(Mode::Plain, 0), Some(Alone::Plain));
    }
}
