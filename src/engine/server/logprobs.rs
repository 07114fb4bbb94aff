//! Logprobs in the three shapes that OpenAI and vLLM give them.

use serde_json::{Map, Value, json};

use super::super::model::{CANDIDATES, Candidate, Context, Logits, Weights};
use super::super::request::TokenOut;
use super::super::tokenizer::{Token, token_bytes, token_text};

/// What the model says of a prompt: for each token after the first, the candidates that were likeliest there. Depends on
/// the tokens alone, since the prompt's KV may not be here.
pub(super) fn prompt_tokens(prompt: &[Token], wanted: usize, weights: Weights) -> Vec<TokenOut> {
    let mut context = Context::start(weights);
    let mut out = Vec::with_capacity(prompt.len());
    for (position, &token) in prompt.iter().enumerate() {
        let logits = Logits::new(context.word(), position, token);
        let mut top = logits.candidates(CANDIDATES, false);
        let logprob = top.iter().find(|c| c.token == token).map_or(-20.0, |c| c.logprob);
        top.truncate(wanted);
        out.push(TokenOut { token, logprob, top });
        context = context.then(token);
    }
    out
}

/// `logprobs` of a completion's choice. `first_offset` is where the first token starts in the text; `first_known` is
/// false if it opens the prompt, of which no model says how likely it was.
pub(super) fn of_completion(tokens: &[TokenOut], first_offset: usize, first_known: bool) -> Value {
    let mut offset = first_offset;
    let mut offsets = Vec::with_capacity(tokens.len());
    for token in tokens {
        offsets.push(offset);
        offset += token_text(token.token).chars().count();
    }
    let known = |index: usize| first_known || index > 0;
    let of = |(index, token): (usize, &TokenOut)| if known(index) { json!(token.logprob) } else { Value::Null };
    let top_of = |(index, token): (usize, &TokenOut)| if known(index) { top_map(token) } else { Value::Null };
    json!({
        "tokens": tokens.iter().map(|token| token_text(token.token)).collect::<Vec<_>>(),
        "token_logprobs": tokens.iter().enumerate().map(of).collect::<Vec<_>>(),
        "top_logprobs": tokens.iter().enumerate().map(top_of).collect::<Vec<_>>(),
        "text_offset": offsets,
    })
}

/// `logprobs` of a chat choice.
pub(super) fn of_chat(tokens: &[TokenOut]) -> Value {
    let entry = |token: Token, logprob: f64| json!({"token": token_text(token), "logprob": logprob, "bytes": token_bytes(token)});
    let content = tokens.iter().map(|token| {
        let top: Vec<_> = token.top.iter().map(|c| entry(c.token, c.logprob)).collect();
        let mut value = entry(token.token, token.logprob);
        value["top_logprobs"] = Value::Array(top);
        value
    });
    json!({"content": content.collect::<Vec<_>>()})
}

/// `prompt_logprobs`: nothing for the first token, then a map from token id for each.
pub(super) fn of_prompt(prompt: &[Token], wanted: usize, weights: Weights) -> Value {
    let mut tokens = prompt_tokens(prompt, wanted, weights).into_iter();
    tokens.next();
    let entries = tokens.map(|token| {
        let mut map = Map::new();
        let chosen = Candidate { token: token.token, logprob: token.logprob };
        let rank =
            |c: &Candidate| token.top.iter().position(|t| t.token == c.token).map_or(CANDIDATES + 1, |at| at + 1);
        for candidate in std::iter::once(&chosen).chain(&token.top) {
            let entry = json!({
                "logprob": candidate.logprob, "rank": rank(candidate), "decoded_token": token_text(candidate.token),
            });
            map.entry(candidate.token.to_string()).or_insert(entry);
        }
        Value::Object(map)
    });
    Value::Array(std::iter::once(Value::Null).chain(entries).collect())
}

/// Candidates by text; the token itself is always among them.
fn top_map(token: &TokenOut) -> Value {
    let chosen = Candidate { token: token.token, logprob: token.logprob };
    let all = token.top.iter().chain(std::iter::once(&chosen));
    let mut map = Map::new();
    for candidate in all {
        map.entry(token_text(candidate.token)).or_insert_with(|| json!(candidate.logprob));
    }
    Value::Object(map)
}
