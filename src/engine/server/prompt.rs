//! `prompt` in its four forms.

use serde_json::Value;

use super::super::tokenizer::{Token, VOCABULARY, encode};
use crate::openai::ApiError;

/// Most prompts in one request.
const PROMPTS_MAX: usize = 2048;

/// Text, tokens, a list of texts, or a list of token lists.
pub(super) fn prompts(value: Option<&Value>) -> Result<Vec<Vec<Token>>, ApiError> {
    let prompts = match value {
        None | Some(Value::Null) => return Err(bad("the field `prompt` is required")),
        Some(Value::String(text)) => vec![encode(text)],
        Some(Value::Array(items)) if items.first().is_some_and(Value::is_number) => vec![tokens("prompt", items)?],
        Some(Value::Array(items)) if items.len() > PROMPTS_MAX => {
            return Err(bad(format!("{} prompts in one request, at most {PROMPTS_MAX} are allowed", items.len())));
        }
        Some(Value::Array(items)) => items.iter().map(one).collect::<Result<_, _>>()?,
        Some(_) => return Err(bad("prompt must be a string, a list of tokens, or a list of either")),
    };
    if prompts.is_empty() || prompts.iter().any(Vec::is_empty) {
        return Err(bad("the prompt is empty: there must be at least one token"));
    }
    Ok(prompts)
}

fn one(item: &Value) -> Result<Vec<Token>, ApiError> {
    match item {
        Value::String(text) => Ok(encode(text)),
        Value::Array(items) => tokens("prompt", items),
        _ => Err(bad("each prompt in a list must be a string or a list of tokens")),
    }
}

/// A list of token ids, each within the vocabulary.
pub(super) fn tokens(param: &'static str, items: &[Value]) -> Result<Vec<Token>, ApiError> {
    let token = |item: &Value| match item.as_u64().map(Token::try_from) {
        Some(Ok(token)) if token < VOCABULARY => Ok(token),
        _ => Err(ApiError::bad_param(
            param,
            format!("token id {item} is out of vocabulary: ids are 0 to {}", VOCABULARY - 1),
        )),
    };
    items.iter().map(token).collect()
}

fn bad(message: impl Into<String>) -> ApiError {
    ApiError::bad_param("prompt", message)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_prompt_has_four_forms() {
        let cases = [
            (json!("ab"), vec![vec![97, 98]]),
            (json!([97, 98]), vec![vec![97, 98]]),
            (json!(["a", "b"]), vec![vec![97], vec![98]]),
            (json!([[97], [98, 256]]), vec![vec![97], vec![98, 256]]),
        ];
        for (value, want) in cases {
            assert_eq!(prompts(Some(&value)), Ok(want), "case: {value}");
        }
    }

    #[test]
    fn any_other_prompt_is_refused() {
        let cases = [
            json!(null),
            json!(3),
            json!(true),
            json!({}),
            json!(""),
            json!([]),
            json!([[]]),
            json!(["a", ""]),
            json!([1, "a"]),
            json!(["a", 1]),
            json!([259]),
            json!([-1]),
            json!([1.5]),
            json!([[1], ["a"]]),
        ];
        for value in cases {
            assert_eq!(prompts(Some(&value)).map_err(|e| e.param), Err(Some("prompt".to_owned())), "case: {value}");
        }
    }
}
