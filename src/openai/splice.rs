//! A request body with the places of the fields that a router touches, and how to cut it up.
//!
//! [`RequestBody::scan`] looks at the body once. [`RequestBody::splice`] then gives a body with some fields replaced, as
//! slices of the original around one new text: nothing is parsed, nothing that is untouched is copied (PX-1).
//!
//! A key that comes twice counts as most readers of JSON count it: the last one wins. A splice removes every one of
//! them, so that no leg sees another value than was meant. Keys are compared as they read, not as they are spelled, so
//! `"m\u0061x_tokens"` is `max_tokens`.

use std::ops::Range;

use bytes::Bytes;

use super::scan::{self, Kind, ScanError};

/// Most fields of ours that one body may name, repeats counted. An honest body names each once.
const TOUCHED_MAX: usize = 64;

/// The fields that decide how a request is routed, or that differ between its legs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Field {
    Model,
    Stream,
    StreamOptions,
    MaxTokens,
    MaxCompletionTokens,
    MinTokens,
    MinCompletionTokens,
    N,
    BestOf,
    UseBeamSearch,
    Prompt,
    PromptEmbeds,
    Messages,
    Tokens,
    TokenIds,
    SamplingParams,
    Echo,
    Logprobs,
    PromptLogprobs,
    KvTransferParams,
    RequestId,
    Choices,
}

impl Field {
    fn of(key: &str) -> Option<Self> {
        Some(match key {
            "model" => Self::Model,
            "stream" => Self::Stream,
            "stream_options" => Self::StreamOptions,
            "max_tokens" => Self::MaxTokens,
            "max_completion_tokens" => Self::MaxCompletionTokens,
            "min_tokens" => Self::MinTokens,
            "min_completion_tokens" => Self::MinCompletionTokens,
            "n" => Self::N,
            "best_of" => Self::BestOf,
            "use_beam_search" => Self::UseBeamSearch,
            "prompt" => Self::Prompt,
            "prompt_embeds" => Self::PromptEmbeds,
            "messages" => Self::Messages,
            "tokens" => Self::Tokens,
            "token_ids" => Self::TokenIds,
            "sampling_params" => Self::SamplingParams,
            "echo" => Self::Echo,
            "logprobs" => Self::Logprobs,
            "prompt_logprobs" => Self::PromptLogprobs,
            "kv_transfer_params" => Self::KvTransferParams,
            "request_id" => Self::RequestId,
            "choices" => Self::Choices,
            _ => return None,
        })
    }

    /// The field's name as a body spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Stream => "stream",
            Self::StreamOptions => "stream_options",
            Self::MaxTokens => "max_tokens",
            Self::MaxCompletionTokens => "max_completion_tokens",
            Self::MinTokens => "min_tokens",
            Self::MinCompletionTokens => "min_completion_tokens",
            Self::N => "n",
            Self::BestOf => "best_of",
            Self::UseBeamSearch => "use_beam_search",
            Self::Prompt => "prompt",
            Self::PromptEmbeds => "prompt_embeds",
            Self::Messages => "messages",
            Self::Tokens => "tokens",
            Self::TokenIds => "token_ids",
            Self::SamplingParams => "sampling_params",
            Self::Echo => "echo",
            Self::Logprobs => "logprobs",
            Self::PromptLogprobs => "prompt_logprobs",
            Self::KvTransferParams => "kv_transfer_params",
            Self::RequestId => "request_id",
            Self::Choices => "choices",
        }
    }

    const fn bit(self) -> u32 {
        1 << self as u8
    }
}

/// A set of fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fields(u32);

impl Fields {
    /// The set of `fields`.
    pub const fn of(fields: &[Field]) -> Self {
        let mut set = 0;
        let mut at = 0;
        while at < fields.len() {
            set |= fields[at].bit();
            at += 1;
        }
        Self(set)
    }

    fn has(self, field: Field) -> bool {
        self.0 & field.bit() != 0
    }
}

/// Why a body is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    #[error("the request body is not a JSON object that can be read: {0}")]
    Json(#[from] ScanError),
    #[error("`{}` must be {wanted}", field.name())]
    WrongType { field: Field, wanted: &'static str },
    #[error("the request body names the same few fields more than {TOUCHED_MAX} times")]
    Repeated,
    #[error("a request body of {bytes} bytes is longer than this server can address")]
    TooLong { bytes: usize },
}

impl BodyError {
    /// The field at fault, if it is one.
    pub fn param(&self) -> Option<&'static str> {
        match self {
            Self::WrongType { field, .. } => Some(field.name()),
            _ => None,
        }
    }
}

/// One member that a router touches. Offsets of 32 bits: thousands of requests keep these while they wait.
#[derive(Debug, Clone, Copy)]
struct Touched {
    field: Field,
    kind: Kind,
    /// The member with the comma before it.
    whole: (u32, u32),
    value: (u32, u32),
}

/// A JSON object and the places of its fields.
#[derive(Debug, Clone)]
pub struct RequestBody {
    text: Bytes,
    touched: Box<[Touched]>,
    /// Right after the opening brace; right before the closing one.
    inner: (u32, u32),
    empty: bool,
}

/// A body as it goes on the wire: `head`, then these slices of the original.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spliced<'a> {
    /// The opening brace and the new members.
    pub head: Vec<u8>,
    /// What is kept, in order; the last piece ends with the closing brace.
    pub kept: Vec<&'a [u8]>,
}

impl Spliced<'_> {
    /// Bytes in all.
    pub fn bytes(&self) -> usize {
        self.head.len() + self.kept.iter().map(|piece| piece.len()).sum::<usize>()
    }

    /// The pieces joined.
    pub fn join(&self) -> Vec<u8> {
        let mut joined = Vec::with_capacity(self.bytes());
        joined.extend_from_slice(&self.head);
        for piece in &self.kept {
            joined.extend_from_slice(piece);
        }
        joined
    }
}

impl RequestBody {
    /// Reads `text` once: refuses what is not a JSON object, notes where the fields are.
    pub fn scan(text: Bytes) -> Result<Self, BodyError> {
        let Ok(_) = u32::try_from(text.len()) else { return Err(BodyError::TooLong { bytes: text.len() }) };
        let mut touched = Vec::with_capacity(8);
        let mut empty = true;
        let braces = scan::members(&text, |member| {
            empty = false;
            // One more than allowed is kept, so that the refusal below sees it.
            if touched.len() > TOUCHED_MAX {
                return;
            }
            let Some(key) = member.key_text(&text) else { return };
            let Some(field) = Field::of(&key) else { return };
            touched.push(Touched {
                field,
                kind: member.kind,
                whole: narrow(&member.whole()),
                value: narrow(&member.value),
            });
        })?;
        if touched.len() > TOUCHED_MAX {
            return Err(BodyError::Repeated);
        }
        let inner = narrow(&(braces.start + 1..braces.end));
        Ok(Self { touched: touched.into_boxed_slice(), text, inner, empty })
    }

    /// The whole original.
    pub fn text(&self) -> &Bytes {
        &self.text
    }

    /// The value of `field` as it was written, `null` included, and its type.
    pub fn raw(&self, field: Field) -> Option<(&[u8], Kind)> {
        let found = self.touched.iter().rev().find(|touched| touched.field == field)?;
        Some((&self.text[widen(found.value)], found.kind))
    }

    /// The same, as a reference-counted part of the body.
    pub fn raw_bytes(&self, field: Field) -> Option<(Bytes, Kind)> {
        let found = self.touched.iter().rev().find(|touched| touched.field == field)?;
        Some((self.text.slice(widen(found.value)), found.kind))
    }

    /// Whether the body names `field` with anything but `null`.
    pub fn has(&self, field: Field) -> bool {
        self.raw(field).is_some_and(|(_, kind)| kind != Kind::Null)
    }

    /// Whether the body names `field` at all.
    pub fn names(&self, field: Field) -> bool {
        self.raw(field).is_some()
    }

    /// A switch: absent and `null` are false.
    pub fn flag(&self, field: Field) -> Result<bool, BodyError> {
        match self.raw(field).map(|(_, kind)| kind) {
            None | Some(Kind::Null | Kind::False) => Ok(false),
            Some(Kind::True) => Ok(true),
            Some(_) => Err(BodyError::WrongType { field, wanted: "true or false" }),
        }
    }

    /// A number; absent and `null` are `None`.
    pub fn number(&self, field: Field) -> Result<Option<f64>, BodyError> {
        let wrong = BodyError::WrongType { field, wanted: "a number" };
        match self.raw(field) {
            None | Some((_, Kind::Null)) => Ok(None),
            Some((text, Kind::Number)) => match std::str::from_utf8(text).map(str::parse) {
                Ok(Ok(number)) => Ok(Some(number)),
                _ => Err(wrong),
            },
            Some(_) => Err(wrong),
        }
    }

    /// Refuses a value that is neither `null` nor of one of these kinds.
    pub fn check(&self, field: Field, kinds: &[Kind], wanted: &'static str) -> Result<(), BodyError> {
        match self.raw(field) {
            Some((_, kind)) if kind != Kind::Null && !kinds.contains(&kind) => {
                Err(BodyError::WrongType { field, wanted })
            }
            _ => Ok(()),
        }
    }

    /// The body without `removed` and with the members of `inserted` (JSON text: `"a":1,"b":2`) at its front. They
    /// must not be empty: the comma between them and what is kept depends on it.
    pub fn splice(&self, removed: Fields, inserted: &[u8]) -> Spliced<'_> {
        debug_assert!(!inserted.is_empty(), "a splice puts something in");
        let mut head = Vec::with_capacity(inserted.len() + 2);
        head.push(b'{');
        head.extend_from_slice(inserted);
        let (mut from, end) = self.inner;
        // Every member but the first takes the comma before it along. If the first one stays, it needs one.
        let first_goes = self.touched.first().is_some_and(|touched| {
            removed.has(touched.field) && self.text[widen((from, touched.whole.0))].iter().all(u8::is_ascii_whitespace)
        });
        if !self.empty && !first_goes {
            head.push(b',');
        }
        let mut kept = Vec::with_capacity(self.touched.len() + 1);
        for touched in self.touched.iter().filter(|touched| removed.has(touched.field)) {
            let piece = &self.text[widen((from, touched.whole.0))];
            if !piece.is_empty() {
                kept.push(piece);
            }
            from = touched.whole.1;
        }
        kept.push(&self.text[widen((from, end + 1))]);
        Spliced { head, kept }
    }
}

/// Offsets of a text that was found to be shorter than 4 GiB.
fn narrow(range: &Range<usize>) -> (u32, u32) {
    let offset = |at: usize| u32::try_from(at).expect("a body longer than 4 GiB is refused before it is scanned");
    (offset(range.start), offset(range.end))
}

fn widen((start, end): (u32, u32)) -> Range<usize> {
    start as usize..end as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const LEG: Fields = Fields::of(&[
        Field::Stream,
        Field::MaxTokens,
        Field::MinTokens,
        Field::StreamOptions,
        Field::KvTransferParams,
        Field::MaxCompletionTokens,
    ]);

    fn spliced(text: &str) -> String {
        let body = RequestBody::scan(Bytes::copy_from_slice(text.as_bytes())).expect("valid");
        String::from_utf8(body.splice(LEG, br#""stream":false"#).join()).expect("UTF-8")
    }

    #[test]
    fn fields_go_wherever_they_stand() {
        let cases = [
            ("{}", r#"{"stream":false}"#),
            (r#"{"a":1}"#, r#"{"stream":false,"a":1}"#),
            (r#"{"stream":true}"#, r#"{"stream":false}"#),
            (r#"{ "stream" : true , "a":1}"#, r#"{"stream":false  , "a":1}"#),
            (r#"{"a":1,"stream":true}"#, r#"{"stream":false,"a":1}"#),
            (r#"{"a":1,"stream":true,"max_tokens":3}"#, r#"{"stream":false,"a":1}"#),
            (r#"{"stream":true,"max_tokens":3}"#, r#"{"stream":false}"#),
            (r#"{"a":1,"m\u0061x_tokens":9,"b":2,"max_tokens":3}"#, r#"{"stream":false,"a":1,"b":2}"#),
            (r#" {"kv_transfer_params":{"stream":1},"b":[]} "#, r#"{"stream":false,"b":[]}"#),
        ];
        for (text, want) in cases {
            assert_eq!(spliced(text), want, "case: {text}");
        }
    }

    #[test]
    fn the_last_of_equal_keys_counts() {
        let body = RequestBody::scan(Bytes::from_static(br#"{"n":1,"\u006e":3}"#)).expect("valid");
        assert_eq!(body.number(Field::N), Ok(Some(3.0)));
    }

    #[test]
    fn types_are_checked() {
        let text = br#"{"model":7,"stream":"yes","n":null,"max_tokens":"9"}"#;
        let body = RequestBody::scan(Bytes::from_static(text)).expect("valid");
        assert_eq!(body.check(Field::Model, &[Kind::String], "a string").unwrap_err().param(), Some("model"));
        assert_eq!(body.flag(Field::Stream).unwrap_err().to_string(), "`stream` must be true or false");
        assert_eq!(body.number(Field::N), Ok(None));
        assert!(body.number(Field::MaxTokens).is_err());
        assert!(!body.has(Field::N) && body.names(Field::N) && !body.names(Field::Prompt));
    }

    #[test]
    fn a_body_cannot_name_fields_without_end() {
        let many = format!("{{{}}}", vec![r#""n":1"#; 65].join(","));
        assert_eq!(RequestBody::scan(many.into()).map(|_| ()), Err(BodyError::Repeated));
    }

    fn member() -> impl Strategy<Value = (String, Value)> {
        let key = prop_oneof![
            prop::sample::select(vec!["stream", "max_tokens", "min_tokens", "kv_transfer_params", "n", "prompt"])
                .prop_map(str::to_owned),
            "[a-z\"\\\\é]{0,6}",
        ];
        let value =
            prop_oneof![Just(json!(null)), any::<i32>().prop_map(Value::from), "\\PC{0,40}".prop_map(Value::from)];
        (key, value)
    }

    proptest! {
        /// Equal, as values, to what parsing, changing and writing would give.
        #[test]
        fn a_splice_equals_parse_and_rebuild(members in prop::collection::vec(member(), 0..9), space in "[ \n\t]{0,2}") {
            let written: Vec<String> = members
                .iter()
                .map(|(key, value)| format!("{space}{}{space}:{space}{value}{space}", Value::from(key.as_str())))
                .collect();
            let text = format!("{space}{{{}{}}}{space}", written.join(","), if written.is_empty() { &space } else { "" });
            let mut want: serde_json::Map<String, Value> = members.into_iter().collect();
            for field in ["stream", "max_tokens", "min_tokens", "stream_options", "kv_transfer_params"] {
                want.remove(field);
            }
            want.insert("stream".to_owned(), json!(false));
            let got: Value = serde_json::from_str(&spliced(&text)).expect("a splice is valid JSON");
            prop_assert_eq!(got, Value::Object(want));
        }
    }
}
