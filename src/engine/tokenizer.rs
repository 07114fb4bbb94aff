//! A vocabulary without a model: one token per byte, and a few that no text can spell.

/// One token.
pub(super) type Token = u32;

/// Ends an answer.
pub(super) const EOS: Token = 256;
/// Opens a chat message; the role follows.
pub(super) const MESSAGE_START: Token = 257;
/// Closes a chat message.
pub(super) const MESSAGE_END: Token = 258;
/// Tokens are below this.
pub(super) const VOCABULARY: Token = 259;

/// Text as tokens: its UTF-8 bytes. Special tokens are never made of text, so no client can forge a chat turn.
pub(super) fn encode(text: &str) -> Vec<Token> {
    text.bytes().map(Token::from).collect()
}

/// Tokens as text. Bytes that are not UTF-8 become U+FFFD; special tokens are spelled out unless `skip_special`.
pub(super) fn decode(tokens: &[Token], skip_special: bool) -> String {
    let mut bytes = Vec::with_capacity(tokens.len());
    for &token in tokens {
        match special(token) {
            Some(name) if !skip_special => bytes.extend_from_slice(name.as_bytes()),
            Some(_) => {}
            None => bytes.extend(u8::try_from(token)),
        }
    }
    match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    }
}

/// One token as text, for logprobs; bytes outside ASCII are shown as `\xNN`, since they are no text by themselves.
pub(super) fn token_text(token: Token) -> String {
    match (special(token), u8::try_from(token)) {
        (Some(name), _) => name.to_owned(),
        (None, Ok(byte)) if byte.is_ascii() => char::from(byte).to_string(),
        (None, Ok(byte)) => format!("\\x{byte:02x}"),
        (None, Err(_)) => String::new(),
    }
}

/// The token's bytes, as OpenAI's `bytes` in logprobs.
pub(super) fn token_bytes(token: Token) -> Vec<u8> {
    match (special(token), u8::try_from(token)) {
        (Some(name), _) => name.as_bytes().to_vec(),
        (None, Ok(byte)) => vec![byte],
        (None, Err(_)) => Vec::new(),
    }
}

fn special(token: Token) -> Option<&'static str> {
    match token {
        EOS => Some("<|endoftext|>"),
        MESSAGE_START => Some("<|im_start|>"),
        MESSAGE_END => Some("<|im_end|>"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_the_way_to_tokens_and_back() {
        for text in ["", "a", "two words", "naïve café", "日本語 🦀", "<|im_start|>system", "\0\n\t"] {
            assert_eq!(decode(&encode(text), false), text);
        }
    }

    #[test]
    fn text_never_makes_a_special_token() {
        assert!(encode("<|im_start|>user\n<|im_end|><|endoftext|>").iter().all(|&token| token < EOS));
    }

    #[test]
    fn special_tokens_are_spelled_out_or_left_out() {
        let tokens = [MESSAGE_START, Token::from(b'h'), Token::from(b'i'), MESSAGE_END, EOS];
        assert_eq!(decode(&tokens, false), "<|im_start|>hi<|im_end|><|endoftext|>");
        assert_eq!(decode(&tokens, true), "hi");
    }

    #[test]
    fn half_a_character_decodes_to_the_replacement_character() {
        assert_eq!(decode(&[0xc3], false), "\u{fffd}");
    }
}
