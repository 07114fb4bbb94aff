//! Seeded prompts of exact lengths, as token ids or as text.

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Ids that every vocabulary has and that are special in none: one printable character each in byte-level ones.
const IDS: std::ops::RangeInclusive<u32> = 33..=126;

/// One prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    ids: Vec<u32>,
}

/// Draws `count` prompts of `tokens` tokens. The same seed gives the same prompts, on any machine.
pub(super) fn draw(seed: u64, count: usize, tokens: usize) -> Vec<Prompt> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut prompt = || Prompt { ids: (0..tokens.max(1)).map(|_| rng.random_range(IDS)).collect() };
    (0..count).map(|_| prompt()).collect()
}

impl Prompt {
    /// The body of a streamed request for exactly `output_tokens` tokens. As text, a prompt has about as many tokens as
    /// characters; how many it was the server says.
    pub(super) fn body(&self, model: &str, output_tokens: u32, as_text: bool) -> Bytes {
        let prompt = if as_text { json!(self.text()) } else { json!(self.ids) };
        let body = json!({
            "model": model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": true,
            "return_token_ids": true,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        Bytes::from(body.to_string())
    }

    /// Letters and blanks: most tokenizers make a few tokens of several letters out of real words, and do not out of these.
    fn text(&self) -> String {
        let letter = |id: &u32| match id % 53 {
            52 => ' ',
            index @ 26..52 => char::from(b'A' + u8::try_from(index - 26).unwrap_or(0)),
            index => char::from(b'a' + u8::try_from(index).unwrap_or(0)),
        };
        self.ids.iter().map(letter).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_have_their_length_and_repeat_with_their_seed() {
        let prompts = draw(7, 3, 100);
        assert_eq!((prompts.len(), &prompts), (3, &draw(7, 3, 100)));
        assert_ne!(prompts, draw(8, 3, 100));
        assert_ne!(prompts[0], prompts[1]);
        let body =
            |as_text| serde_json::from_slice::<serde_json::Value>(&prompts[0].body("m", 5, as_text)).expect("JSON");
        assert_eq!(body(false)["prompt"].as_array().map(Vec::len), Some(100));
        assert_eq!(body(true)["prompt"].as_str().map(str::len), Some(100));
        assert_eq!((&body(false)["max_tokens"], &body(false)["stream"]), (&5.into(), &true.into()));
    }
}
