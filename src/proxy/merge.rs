//! `prompt_logprobs` from prefill's answer into decode's: they are made where the prompt is computed.

use crate::openai::scan::{self, Kind};
use crate::openai::splice::{Field, Fields, RequestBody};

/// Prefill's `prompt_logprobs`: at the top of a chat answer, in the first choice of a completion.
pub(crate) fn logprobs_of(answer: &RequestBody) -> Option<bytes::Bytes> {
    if let Some((text, kind)) = answer.raw_bytes(Field::PromptLogprobs) {
        return (kind != Kind::Null).then_some(text);
    }
    let (text, kind) = answer.raw_bytes(Field::Choices)?;
    let (first, _) = (kind == Kind::Array).then(|| scan::elements(&text, 1).ok()?.pop()).flatten()?;
    let choice = RequestBody::scan(text.slice(first)).ok()?;
    choice.has(Field::PromptLogprobs).then(|| choice.raw_bytes(Field::PromptLogprobs)).flatten().map(|(text, _)| text)
}

/// Decode's answer with them, in the place where it has the field itself. `None` if there is no such place.
pub(crate) fn put_logprobs(answer: &bytes::Bytes, logprobs: &[u8]) -> Option<Vec<u8>> {
    const DROPS: Fields = Fields::of(&[Field::PromptLogprobs]);
    let inserted = [br#""prompt_logprobs":"#.as_slice(), logprobs].concat();
    let scanned = RequestBody::scan(answer.clone()).ok()?;
    let is_chat = scanned.names(Field::PromptLogprobs);
    let (choices, kind) = scanned.raw_bytes(Field::Choices)?;
    let first = (kind == Kind::Array).then(|| scan::elements(&choices, 1).ok()?.pop()).flatten();
    let choice = first.and_then(|(range, _)| Some((RequestBody::scan(choices.slice(range.clone())).ok()?, range)));
    match choice {
        Some((choice, range)) if !is_chat && choice.names(Field::PromptLogprobs) => {
            let mut list = choices[..range.start].to_vec();
            list.extend_from_slice(&choice.splice(DROPS, &inserted).join());
            list.extend_from_slice(&choices[range.end..]);
            let inserted = [br#""choices":"#.as_slice(), &list].concat();
            Some(scanned.splice(Fields::of(&[Field::Choices]), &inserted).join())
        }
        _ => Some(scanned.splice(DROPS, &inserted).join()),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use serde_json::{Value, json};

    use super::*;

    fn merged(prefill: &Value, decode: &Value) -> Value {
        let prefill = RequestBody::scan(Bytes::from(prefill.to_string())).expect("valid");
        let logprobs = logprobs_of(&prefill).expect("prefill has them");
        let text = put_logprobs(&Bytes::from(decode.to_string()), &logprobs).expect("there is a place");
        serde_json::from_slice(&text).expect("valid JSON")
    }

    #[test]
    fn a_completion_has_them_in_its_choice() {
        let logprobs = json!([null, {"7": {"logprob": -0.5}}]);
        let prefill = json!({"choices": [{"text": "x", "prompt_logprobs": logprobs}], "kv_transfer_params": {}});
        let decode = json!({"id": 1, "choices": [{"text": "xyz", "prompt_logprobs": null, "index": 0}], "usage": 3});
        let mut want = decode.clone();
        want["choices"][0]["prompt_logprobs"] = logprobs;
        assert_eq!(merged(&prefill, &decode), want);
    }

    #[test]
    fn a_chat_has_them_at_the_top() {
        let logprobs = json!([null, {"7": {"logprob": -0.5}}]);
        let prefill = json!({"choices": [{"message": {}}], "prompt_logprobs": logprobs});
        let decode = json!({"choices": [{"message": {"content": "x"}}], "prompt_logprobs": null});
        let mut want = decode.clone();
        want["prompt_logprobs"] = logprobs;
        assert_eq!(merged(&prefill, &decode), want);
    }

    #[test]
    fn an_answer_without_them_has_nothing_to_give() {
        let answer =
            RequestBody::scan(Bytes::from_static(br#"{"choices":[{"prompt_logprobs":null}]}"#)).expect("valid");
        assert_eq!(logprobs_of(&answer), None);
    }
}
