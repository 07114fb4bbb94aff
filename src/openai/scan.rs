//! One pass over a JSON object: is it valid, and where are its members?
//!
//! The scan checks the whole text (RFC 8259 grammar, UTF-8, bounded depth) and reports each member of the outermost
//! object as offsets, so that a body can be cut and joined without being built again (PX-1). It copies nothing and
//! keeps nothing. Number ranges and lone surrogates are not its business: it accepts every text that the grammar does.
//!
//! Most bytes of a request are plain string text. Those are screened 64 at a time, with a bit for each byte that needs a
//! look: a quote, an escape, a control character or a longer character.

use std::borrow::Cow;
use std::ops::Range;

use wide::i8x16;

/// Deepest nesting that is accepted. serde_json's own limit; a schema nested deeper than this is no request.
pub const DEPTH_MAX: u32 = 127;

/// Why a text is refused, and where. Offsets are in bytes from the start of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    #[error("the JSON text ends too early, at byte {at}")]
    Truncated { at: usize },
    #[error("invalid JSON at byte {at}: expected {expected}")]
    Expected { at: usize, expected: &'static str },
    #[error("invalid JSON at byte {at}: a control character inside a string must be escaped")]
    ControlCharacter { at: usize },
    #[error("invalid UTF-8 at byte {at}")]
    Utf8 { at: usize },
    #[error("JSON nested deeper than {DEPTH_MAX} levels at byte {at}")]
    TooDeep { at: usize },
    #[error("expected a JSON object")]
    NotAnObject,
}

/// The type of a JSON value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    String,
    Number,
    Object,
    Array,
    True,
    False,
    Null,
}

/// One member of an object, as offsets into the scanned text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The key between its quotes, as it was written: perhaps with escapes.
    pub key: Range<usize>,
    pub key_escaped: bool,
    pub value: Range<usize>,
    pub kind: Kind,
    /// Where the comma before this member is; the first member has none.
    pub comma: Option<usize>,
}

impl Member {
    /// What must go for the member to be gone: the comma before it, if it has one, up to the end of its value.
    pub fn whole(&self) -> Range<usize> {
        self.comma.unwrap_or(self.key.start - 1)..self.value.end
    }

    /// The key as a reader of JSON sees it. `None` where its escapes do not make a string (a lone surrogate).
    pub fn key_text<'a>(&self, text: &'a [u8]) -> Option<Cow<'a, str>> {
        if self.key_escaped {
            let quoted = &text[self.key.start - 1..self.key.end + 1];
            return serde_json::from_slice::<String>(quoted).ok().map(Cow::Owned);
        }
        std::str::from_utf8(&text[self.key.clone()]).ok().map(Cow::Borrowed)
    }
}

/// Checks `text` to its end and calls `visit` for each member of the outermost object, in order. Returns the offsets of
/// the two braces.
pub fn members(text: &[u8], mut visit: impl FnMut(Member)) -> Result<Range<usize>, ScanError> {
    let mut scanner = Scanner { text, at: 0 };
    scanner.skip_space();
    let open = scanner.at;
    if scanner.peek() != Some(b'{') {
        return Err(if scanner.at == text.len() { ScanError::Truncated { at: open } } else { ScanError::NotAnObject });
    }
    scanner.at += 1;
    scanner.skip_space();
    let mut comma = None;
    if scanner.peek() == Some(b'}') {
        scanner.at += 1;
    } else {
        loop {
            let member = scanner.member(comma)?;
            visit(member);
            scanner.skip_space();
            match scanner.next()? {
                b',' => comma = Some(scanner.at - 1),
                b'}' => break,
                _ => return Err(ScanError::Expected { at: scanner.at - 1, expected: "`,` or `}`" }),
            }
            scanner.skip_space();
        }
    }
    let close = scanner.at - 1;
    scanner.skip_space();
    if scanner.at < text.len() {
        return Err(ScanError::Expected { at: scanner.at, expected: "the end of the text" });
    }
    Ok(open..close)
}

/// The extent of the value that begins at the first byte of `text` that is not white space.
pub fn first_value(text: &[u8]) -> Result<(Range<usize>, Kind), ScanError> {
    let mut scanner = Scanner { text, at: 0 };
    scanner.skip_space();
    let start = scanner.at;
    let kind = scanner.value(0)?;
    Ok((start..scanner.at, kind))
}

/// The elements of a JSON array, at most `limit` of them. `text` must have been scanned before.
pub fn elements(text: &[u8], limit: usize) -> Result<Vec<(Range<usize>, Kind)>, ScanError> {
    let mut scanner = Scanner { text, at: 0 };
    scanner.skip_space();
    if scanner.next()? != b'[' {
        return Err(ScanError::Expected { at: scanner.at - 1, expected: "`[`" });
    }
    let mut found = Vec::new();
    scanner.skip_space();
    while found.len() < limit && scanner.peek() != Some(b']') {
        let start = scanner.at;
        let kind = scanner.value(1)?;
        found.push((start..scanner.at, kind));
        scanner.skip_space();
        if scanner.peek() == Some(b',') {
            scanner.at += 1;
            scanner.skip_space();
        }
    }
    Ok(found)
}

struct Scanner<'a> {
    text: &'a [u8],
    at: usize,
}

impl Scanner<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.get(self.at).copied()
    }

    fn next(&mut self) -> Result<u8, ScanError> {
        let Some(byte) = self.peek() else { return Err(ScanError::Truncated { at: self.at }) };
        self.at += 1;
        Ok(byte)
    }

    fn skip_space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.peek() {
            self.at += 1;
        }
    }

    /// One `"key": value`, from the key's opening quote to the value's last byte.
    fn member(&mut self, comma: Option<usize>) -> Result<Member, ScanError> {
        let (key, key_escaped) = self.key()?;
        let start = self.at;
        let kind = self.value(1)?;
        Ok(Member { key, key_escaped, value: start..self.at, kind, comma })
    }

    /// A key and its colon, up to the first byte of the value.
    fn key(&mut self) -> Result<(Range<usize>, bool), ScanError> {
        if self.next()? != b'"' {
            return Err(ScanError::Expected { at: self.at - 1, expected: "a key in quotes" });
        }
        let start = self.at;
        let escaped = self.string()?;
        let key = start..self.at - 1;
        self.skip_space();
        if self.next()? != b':' {
            return Err(ScanError::Expected { at: self.at - 1, expected: "`:`" });
        }
        self.skip_space();
        Ok((key, escaped))
    }

    /// One value of any kind. `outside` containers are already open around it. Not recursive: a bit per open container
    /// says whether it is an object.
    fn value(&mut self, outside: u32) -> Result<Kind, ScanError> {
        let mut objects: u128 = 0;
        let mut depth: u32 = 0;
        let mut outermost = None;
        loop {
            let first = self.next()?;
            let kind = match first {
                b'"' => {
                    self.string()?;
                    Kind::String
                }
                b'{' | b'[' => {
                    if outside + depth >= DEPTH_MAX {
                        return Err(ScanError::TooDeep { at: self.at - 1 });
                    }
                    let object = first == b'{';
                    objects = (objects << 1) | u128::from(object);
                    depth += 1;
                    let kind = if object { Kind::Object } else { Kind::Array };
                    outermost = outermost.or(Some(kind));
                    self.skip_space();
                    let close = if object { b'}' } else { b']' };
                    if self.peek() != Some(close) {
                        if object {
                            self.key()?;
                        } else {
                            self.at = integers(self.text, self.at);
                            self.skip_space();
                        }
                        continue;
                    }
                    kind
                }
                b't' => self.word(b"rue", Kind::True)?,
                b'f' => self.word(b"alse", Kind::False)?,
                b'n' => self.word(b"ull", Kind::Null)?,
                b'-' | b'0'..=b'9' => {
                    self.number(first)?;
                    Kind::Number
                }
                _ => return Err(ScanError::Expected { at: self.at - 1, expected: "a value" }),
            };
            let outermost = *outermost.get_or_insert(kind);
            if self.close(&mut objects, &mut depth)? {
                return Ok(outermost);
            }
        }
    }

    /// After a value: takes closing brackets until a comma asks for another value. True when no container is left open.
    fn close(&mut self, objects: &mut u128, depth: &mut u32) -> Result<bool, ScanError> {
        while *depth > 0 {
            let object = *objects & 1 == 1;
            self.skip_space();
            match (self.next()?, object) {
                (b'}', true) | (b']', false) => {
                    *objects >>= 1;
                    *depth -= 1;
                }
                (b',', _) => {
                    self.skip_space();
                    if object {
                        self.key()?;
                    } else {
                        self.at = integers(self.text, self.at);
                        self.skip_space();
                    }
                    return Ok(false);
                }
                _ => return Err(ScanError::Expected { at: self.at - 1, expected: "`,` or the closing bracket" }),
            }
        }
        Ok(true)
    }

    fn word(&mut self, rest: &'static [u8], kind: Kind) -> Result<Kind, ScanError> {
        for &wanted in rest {
            if self.next()? != wanted {
                return Err(ScanError::Expected { at: self.at - 1, expected: "`true`, `false` or `null`" });
            }
        }
        Ok(kind)
    }

    /// A number whose first byte has been taken.
    fn number(&mut self, first: u8) -> Result<(), ScanError> {
        let lead = if first == b'-' { self.next()? } else { first };
        match lead {
            b'0' => {}
            b'1'..=b'9' => self.skip_digits(),
            _ => return Err(ScanError::Expected { at: self.at - 1, expected: "a digit" }),
        }
        if self.peek() == Some(b'.') {
            self.at += 1;
            self.digits()?;
        }
        if let Some(b'e' | b'E') = self.peek() {
            self.at += 1;
            if let Some(b'+' | b'-') = self.peek() {
                self.at += 1;
            }
            self.digits()?;
        }
        Ok(())
    }

    fn skip_digits(&mut self) {
        while let Some(b'0'..=b'9') = self.peek() {
            self.at += 1;
        }
    }

    /// One digit or more.
    fn digits(&mut self) -> Result<(), ScanError> {
        if !self.next()?.is_ascii_digit() {
            return Err(ScanError::Expected { at: self.at - 1, expected: "a digit" });
        }
        self.skip_digits();
        Ok(())
    }

    /// A string whose opening quote has been taken, closing quote included. Says whether it holds an escape.
    fn string(&mut self) -> Result<bool, ScanError> {
        let mut escaped = false;
        loop {
            let (at, passed_escape) = plain_run(self.text, self.at);
            self.at = at;
            escaped |= passed_escape;
            match self.next()? {
                b'"' => return Ok(escaped),
                b'\\' => {
                    escaped = true;
                    self.escape()?;
                }
                0x80.. => {
                    self.at -= 1;
                    self.utf8_run()?;
                }
                _ => return Err(ScanError::ControlCharacter { at: self.at - 1 }),
            }
        }
    }

    fn escape(&mut self) -> Result<(), ScanError> {
        match self.next()? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Ok(()),
            b'u' => {
                for _ in 0..4 {
                    if !self.next()?.is_ascii_hexdigit() {
                        return Err(ScanError::Expected { at: self.at - 1, expected: "four hex digits" });
                    }
                }
                Ok(())
            }
            _ => Err(ScanError::Expected { at: self.at - 1, expected: "an escape that JSON knows" }),
        }
    }

    /// Characters of two to four bytes, as many as follow each other.
    fn utf8_run(&mut self) -> Result<(), ScanError> {
        while let Some(lead @ 0x80..) = self.peek() {
            let second = self.text.get(self.at + 1).copied().unwrap_or(0);
            let length = match (lead, second) {
                (0xc2..=0xdf, 0x80..=0xbf) => 2,
                (0xe0, 0xa0..=0xbf) | (0xe1..=0xec | 0xee | 0xef, 0x80..=0xbf) | (0xed, 0x80..=0x9f) => 3,
                (0xf0, 0x90..=0xbf) | (0xf1..=0xf3, 0x80..=0xbf) | (0xf4, 0x80..=0x8f) => 4,
                _ => return Err(ScanError::Utf8 { at: self.at }),
            };
            for offset in 2..length {
                if !matches!(self.text.get(self.at + offset), Some(0x80..=0xbf)) {
                    return Err(ScanError::Utf8 { at: self.at });
                }
            }
            self.at += length;
        }
        Ok(())
    }
}

/// Passes over a list's integers that are plain digits, as tokens are, each with the comma behind it and at most one space:
/// where the value after them begins. What is anything else is left to the scanner.
fn integers(text: &[u8], mut at: usize) -> usize {
    let mut value = at;
    while let Some(first @ b'0'..=b'9') = text.get(at) {
        at += 1;
        if *first != b'0' {
            while let Some(b'0'..=b'9') = text.get(at) {
                at += 1;
            }
        }
        if text.get(at) != Some(&b',') {
            break;
        }
        at += 1 + usize::from(text.get(at + 1) == Some(&b' '));
        value = at;
    }
    value
}

/// Where plain string text ends: the first byte at or after `at` that stops it, else the end of the text. Escapes of two
/// bytes are passed over, and whether there were any is the second answer; all others stop it.
fn plain_run(text: &[u8], mut at: usize) -> (usize, bool) {
    let mut escaped = false;
    let mut last = [b'"'; BLOCK];
    'blocks: loop {
        let rest = &text[at..];
        let block = match rest.first_chunk() {
            Some(block) => block,
            None => {
                last[..rest.len()].copy_from_slice(rest);
                &last
            }
        };
        let mut stops = stops(block);
        while stops != 0 {
            let stop = stops.trailing_zeros() as usize;
            if block[stop] != b'\\' || !rest.get(stop + 1).is_some_and(|&next| is_short_escape(next)) {
                return (at + stop, escaped);
            }
            escaped = true;
            if stop + 1 == BLOCK {
                at += BLOCK + 1;
                continue 'blocks;
            }
            stops &= !(0b11 << stop);
        }
        at += BLOCK;
    }
}

/// What stands behind the backslash of an escape of two bytes.
fn is_short_escape(byte: u8) -> bool {
    matches!(byte, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't')
}

/// Bytes that are screened in one step.
const BLOCK: usize = 64;

/// A bit for each byte of `block` that stops plain text, the first byte's lowest: a quote, a backslash, a control character,
/// or not ASCII. As a signed byte, everything below the space is one of the last two.
fn stops(block: &[u8; BLOCK]) -> u64 {
    let (lanes, _) = block.as_chunks::<16>();
    lanes.iter().rev().fold(0, |mask, lane| {
        let bytes = i8x16::new(lane.map(u8::cast_signed));
        let quote = bytes.simd_eq(i8x16::splat(b'"'.cast_signed()));
        let backslash = bytes.simd_eq(i8x16::splat(b'\\'.cast_signed()));
        let other = bytes.simd_lt(i8x16::splat(0x20));
        (mask << 16) | u64::from((quote | backslash | other).to_bitmask())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;

    use super::*;

    fn keys(text: &str) -> Result<Vec<(String, String)>, ScanError> {
        let mut found = Vec::new();
        members(text.as_bytes(), |member| {
            let key = member.key_text(text.as_bytes()).expect("a key").into_owned();
            found.push((key, text[member.value.clone()].to_owned()));
        })?;
        Ok(found)
    }

    #[test]
    fn members_are_found_with_their_values() {
        let found = keys(r#" { "a" : 1.5e3 , "b":[{"a":2},"}"], "m\u0061x":"\"x" ,"é":null} "#).expect("valid");
        let want = [("a", "1.5e3"), ("b", r#"[{"a":2},"}"]"#), ("max", r#""\"x""#), ("é", "null")];
        assert_eq!(found, want.map(|(key, value)| (key.to_owned(), value.to_owned())));
    }

    #[test]
    fn refusals_name_the_place() {
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(200), "]".repeat(200));
        let cases: &[(&str, ScanError)] = &[
            ("", ScanError::Truncated { at: 0 }),
            ("[1]", ScanError::NotAnObject),
            ("{\"a\":1", ScanError::Truncated { at: 6 }),
            ("{\"a\":01}", ScanError::Expected { at: 6, expected: "`,` or `}`" }),
            ("{\"a\":\"\n\"}", ScanError::ControlCharacter { at: 6 }),
            ("{\"a\":1,}", ScanError::Expected { at: 7, expected: "a key in quotes" }),
            ("{} x", ScanError::Expected { at: 3, expected: "the end of the text" }),
            (&deep, ScanError::TooDeep { at: 131 }),
        ];
        for (text, want) in cases {
            assert_eq!(members(text.as_bytes(), |_| ()), Err(*want), "case: {text}");
        }
    }

    #[test]
    fn elements_are_found_up_to_a_limit() {
        let text = br#"[ "a,]", [1,2] , {"x":3}]"#;
        let all = elements(text, 9).expect("an array");
        let texts: Vec<_> = all.iter().map(|(range, _)| std::str::from_utf8(&text[range.clone()]).unwrap()).collect();
        assert_eq!(texts, [r#""a,]""#, "[1,2]", r#"{"x":3}"#]);
        assert_eq!(elements(text, 2).expect("an array").len(), 2);
        assert_eq!(elements(b"[]", 2), Ok(vec![]));
    }

    /// Accepts what serde_json's grammar accepts: the reference for the properties below.
    fn reference_accepts(text: &[u8]) -> bool {
        std::str::from_utf8(text).is_ok_and(|text| serde_json::from_str::<IgnoredAny>(text).is_ok())
    }

    fn json_value() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<i32>().prop_map(|number| (f64::from(number) / 8.0).into()),
            "\\PC{0,90}".prop_map(Into::into),
            "[ -~\n\t\"\\\\]{0,90}".prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 48, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(serde_json::Value::Array),
                prop::collection::vec(("\\PC{0,9}", inner), 0..6)
                    .prop_map(|members| serde_json::Value::Object(members.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn valid_objects_are_accepted_and_their_members_agree(
            members_in in prop::collection::vec(("\\PC{0,9}", json_value()), 0..6), pretty: bool,
        ) {
            let object = serde_json::Value::Object(members_in.into_iter().collect());
            let text = if pretty { serde_json::to_string_pretty(&object) } else { serde_json::to_string(&object) };
            let text = text.expect("a value");
            let found = keys(&text).expect("valid");
            let object = object.as_object().expect("an object");
            prop_assert_eq!(found.len(), object.len());
            for ((key, value), (want_key, want)) in found.iter().zip(object) {
                prop_assert_eq!(key, want_key);
                prop_assert_eq!(&serde_json::from_str::<serde_json::Value>(value).expect("a value"), want);
            }
        }

        #[test]
        fn damaged_texts_are_judged_as_serde_json_judges_them(
            value in json_value(), at: prop::sample::Index, byte: u8, kind in 0..4u8,
        ) {
            let mut text = format!("{{\"key\":{value}}}").into_bytes();
            let at = at.index(text.len());
            match kind {
                0 => text[at] = byte,
                1 => text.insert(at, byte),
                2 => { text.remove(at); }
                _ => text.truncate(at),
            }
            let object = text.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
            prop_assert_eq!(members(&text, |_| ()).is_ok(), object && reference_accepts(&text));
        }

        #[test]
        fn any_list_is_judged_as_serde_json_judges_it(inside in "[0-9 ,.e\\-\\[\\]]{0,40}|([0-9]{1,6}, ?){0,20}[0-9]{0,2}") {
            let text = format!("{{\"key\":[{inside}]}}");
            prop_assert_eq!(members(text.as_bytes(), |_| ()).is_ok(), reference_accepts(text.as_bytes()));
        }

        #[test]
        fn any_string_content_is_judged_as_serde_json_judges_it(
            bytes in prop::collection::vec(prop_oneof![8 => 0x20..0x7fu8, 1 => any::<u8>()], 0..200),
        ) {
            let text = [b"{\"k\":\"".as_slice(), &bytes, b"\"}"].concat();
            prop_assert_eq!(members(&text, |_| ()).is_ok(), reference_accepts(&text));
        }

        #[test]
        fn the_wide_steps_find_what_a_plain_search_finds(
            bytes in prop::collection::vec(prop_oneof![60 => 0x20..0x7fu8, 2 => Just(b'\\'), 1 => any::<u8>()], 0..300), at in 0..300usize,
        ) {
            let (mut plain, mut escaped) = (at.min(bytes.len()), false);
            while let Some(byte) = bytes.get(plain) {
                match (byte, bytes.get(plain + 1)) {
                    (b'\\', Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't')) => {
                        (plain, escaped) = (plain + 2, true);
                    }
                    (b'"' | b'\\' | 0..0x20 | 0x80.., _) => break,
                    _ => plain += 1,
                }
            }
            prop_assert_eq!(plain_run(&bytes, at.min(bytes.len())), (plain, escaped));
        }
    }
}
