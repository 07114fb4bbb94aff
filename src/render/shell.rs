//! Words of a shell.

/// One word, as a POSIX shell reads it back, whatever is in it.
pub fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@,+%#".contains(c);
    if !word.is_empty() && !word.starts_with('#') && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_stay_words() {
        for (word, want) in [
            ("--port", "--port"),
            ("registry#a/b:1", "registry#a/b:1"),
            ("#b", "'#b'"),
            ("", "''"),
            ("a b", "'a b'"),
            ("$(x)", "'$(x)'"),
            (r#"{"a":1}"#, r#"'{"a":1}'"#),
            ("it's", r"'it'\''s'"),
        ] {
            assert_eq!(quoted(word), want);
        }
    }
}
