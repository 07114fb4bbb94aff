//! How answers look: as one object, or as the chunks of a stream. Completions and chat differ here and nowhere else.

use serde_json::{Value, json};

use super::super::request::{Finish, TokenEvent, TokenOut};
use super::super::tokenizer::{Token, decode};
use super::job::Job;
use super::logprobs;
use crate::kv::TransferParams;

/// Which route's form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Completion,
    Chat,
}

/// One answer, whole.
#[derive(Debug, Default)]
pub(super) struct Answer {
    pub text: String,
    pub tokens: Vec<TokenOut>,
    pub finish: Option<Finish>,
}

impl Answer {
    /// Takes in what an event brought.
    pub(super) fn take(&mut self, event: TokenEvent) {
        self.text.push_str(&event.text);
        self.tokens.extend(event.token);
        self.finish = event.finish.or_else(|| self.finish.take());
    }
}

impl Shape {
    /// The response of a request that was not streamed.
    pub(super) fn whole(self, job: &Job, answers: &[Answer]) -> Value {
        let choices: Vec<Value> =
            answers.iter().enumerate().map(|(index, answer)| self.choice(job, index, answer)).collect();
        let transfer = answers.iter().find_map(|answer| answer.finish.as_ref()?.transfer.as_deref());
        let cached: usize =
            answers.iter().step_by(job.n).filter_map(|a| a.finish.as_ref().map(|f| f.cached_tokens)).sum();
        let generated = answers.iter().map(|answer| answer.tokens.len()).sum();
        let mut response = self.envelope(job, false);
        response["choices"] = Value::Array(choices);
        response["usage"] = usage(job, generated, Some(cached));
        response["kv_transfer_params"] = Job::transfer_json(transfer);
        if self == Self::Chat {
            let prompt = &job.prompts[0];
            let wanted = job.prompt_logprobs;
            response["prompt_logprobs"] =
                wanted.map_or(Value::Null, |wanted| logprobs::of_prompt(prompt, wanted, job.weights));
            response["prompt_token_ids"] = ids_if(job.return_token_ids, prompt);
        }
        response
    }

    fn choice(self, job: &Job, index: usize, answer: &Answer) -> Value {
        let finish = answer.finish.as_ref();
        let token_ids: Vec<Token> = answer.tokens.iter().map(|token| token.token).collect();
        let mut choice = json!({"index": index});
        match self {
            Self::Completion => {
                let prompt = job.prompt_of(index);
                let echoed = if job.echo { decode(prompt, true) } else { String::new() };
                choice["text"] = Value::String(echoed + &answer.text);
                choice["logprobs"] = completion_logprobs(job, index, &answer.tokens);
                choice["prompt_logprobs"] =
                    job.prompt_logprobs.map_or(Value::Null, |wanted| logprobs::of_prompt(prompt, wanted, job.weights));
                choice["prompt_token_ids"] = ids_if(job.return_token_ids, prompt);
            }
            Self::Chat => {
                choice["message"] = json!({"role": "assistant", "content": answer.text, "tool_calls": []});
                choice["logprobs"] = job.logprobs.map_or(Value::Null, |_| logprobs::of_chat(&answer.tokens));
            }
        }
        choice["token_ids"] = ids_if(job.return_token_ids, &token_ids);
        set_finish(&mut choice, finish);
        choice
    }

    /// What opens one answer's stream, if anything does.
    pub(super) fn opening(self, job: &Job, index: usize) -> Option<Value> {
        let mut choice = match self {
            Self::Chat => json!({"index": index, "delta": {"role": "assistant", "content": ""}}),
            Self::Completion if job.echo => json!({"index": index, "text": decode(job.prompt_of(index), true)}),
            Self::Completion if job.return_token_ids => json!({"index": index, "text": ""}),
            Self::Completion => return None,
        };
        let mut whole = self.envelope(job, true);
        choice["logprobs"] = Value::Null;
        if self == Self::Completion && job.echo && job.logprobs.is_some() {
            choice["logprobs"] = completion_logprobs(job, index, &[]);
        }
        choice["finish_reason"] = Value::Null;
        if job.return_token_ids {
            let ids = json!(&**job.prompt_of(index));
            if self == Self::Chat { whole["prompt_token_ids"] = ids } else { choice["prompt_token_ids"] = ids }
        }
        whole["choices"] = json!([choice]);
        Some(whole)
    }

    /// One event of one answer's stream. `offset` is the length of the text before it, in characters.
    pub(super) fn chunk(self, job: &Job, event: &TokenEvent, offset: usize) -> Value {
        let tokens: &[TokenOut] = event.token.as_slice();
        let mut choice = json!({"index": event.index});
        match self {
            Self::Completion => {
                choice["text"] = Value::String(event.text.clone());
                choice["logprobs"] =
                    job.logprobs.map_or(Value::Null, |_| logprobs::of_completion(tokens, offset, true));
            }
            Self::Chat => {
                choice["delta"] = json!({"content": event.text});
                choice["logprobs"] = job.logprobs.map_or(Value::Null, |_| logprobs::of_chat(tokens));
            }
        }
        if job.return_token_ids {
            choice["token_ids"] = tokens.iter().map(|token| token.token).collect();
        }
        set_finish(&mut choice, event.finish.as_ref());
        let mut chunk = self.envelope(job, true);
        chunk["choices"] = json!([choice]);
        if let Some(transfer) = event.finish.as_ref().and_then(|finish| finish.transfer.as_deref()) {
            chunk["kv_transfer_params"] = TransferParams::to_json(transfer);
        }
        chunk
    }

    /// The last chunk of a stream that asked for usage.
    pub(super) fn usage_chunk(self, job: &Job, generated: usize, cached: usize) -> Value {
        let mut chunk = self.envelope(job, true);
        chunk["choices"] = json!([]);
        chunk["usage"] = usage(job, generated, Some(cached));
        chunk
    }

    fn envelope(self, job: &Job, chunk: bool) -> Value {
        let object = match (self, chunk) {
            (Self::Completion, _) => "text_completion",
            (Self::Chat, false) => "chat.completion",
            (Self::Chat, true) => "chat.completion.chunk",
        };
        json!({"id": job.id, "object": object, "created": job.created, "model": job.model})
    }
}

/// Token counts. The prompt counts once however many answers it got.
pub(super) fn usage(job: &Job, generated: usize, cached: Option<usize>) -> Value {
    let prompt = job.prompt_tokens();
    let mut usage =
        json!({"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated});
    if let Some(cached) = cached {
        usage["prompt_tokens_details"] = json!({"cached_tokens": cached});
    }
    usage
}

/// With `echo` the prompt's tokens come first.
fn completion_logprobs(job: &Job, index: usize, tokens: &[TokenOut]) -> Value {
    let Some(wanted) = job.logprobs else { return Value::Null };
    if !job.echo {
        return logprobs::of_completion(tokens, 0, true);
    }
    let mut all = logprobs::prompt_tokens(job.prompt_of(index), wanted, job.weights);
    all.extend_from_slice(tokens);
    logprobs::of_completion(&all, 0, false)
}

fn set_finish(choice: &mut Value, finish: Option<&Finish>) {
    choice["finish_reason"] = finish.map_or(Value::Null, |finish| json!(finish.reason.name()));
    choice["stop_reason"] = json!(finish.and_then(|finish| finish.stop_reason.as_ref()));
}

fn ids_if(wanted: bool, tokens: &[Token]) -> Value {
    if wanted { json!(tokens) } else { Value::Null }
}
