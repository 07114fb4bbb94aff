//! Takes `@ FILE` and `--section.key value` out of the command line, wherever they stand; what is left is a command's own.
//!
//! A name with a dot in it is an override, one without is a flag of the command: so the two can be mixed in any order, and
//! a mistyped flag is still noticed. Nothing behind a bare `--` is touched.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::config::Override;

use super::Usage;

/// Where a command's configuration comes from: files from left to right, then overrides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    pub files: Vec<PathBuf>,
    pub overrides: Vec<Override>,
}

impl Sources {
    /// The words that would give another pdlink process the same sources.
    pub fn to_arguments(&self) -> Vec<OsString> {
        let files = self.files.iter().flat_map(|file| [OsString::from("@"), file.clone().into_os_string()]);
        let overrides = self.overrides.iter().map(|Override { name, value, .. }| match value {
            Some(value) => OsString::from(format!("--{name}={value}")),
            None => OsString::from(format!("--{name}")),
        });
        files.chain(overrides).collect()
    }
}

/// The command's own words (the program's name first) and the sources that stood among them.
pub(super) fn split(args: impl IntoIterator<Item = OsString>) -> Result<(Vec<OsString>, Sources), Usage> {
    let mut args = args.into_iter().peekable();
    let mut own: Vec<OsString> = args.next().into_iter().collect();
    let mut sources = Sources::default();
    while let Some(arg) = args.next() {
        let Some(text) = arg.to_str() else {
            own.push(arg);
            continue;
        };
        if text == "--" {
            own.push(arg);
            own.extend(args);
            break;
        }
        if text == "@" {
            let file = args.next().filter(|next| next.to_str().is_none_or(is_value));
            let file =
                file.ok_or_else(|| Usage::new("`@` needs a file behind it, as in `@ configs/debug/local.toml`"))?;
            sources.files.push(file.into());
        } else if let Some(file) = text.strip_prefix('@') {
            sources.files.push(file.into());
        } else if let Some((name, inline)) = dotted(text) {
            let name = name.to_owned();
            let value = match inline {
                Some(value) => Some(value.to_owned()),
                None => {
                    args.next_if(|next| next.to_str().is_some_and(is_value)).and_then(|next| next.into_string().ok())
                }
            };
            sources.overrides.push(Override { name, value, flag: None });
        } else {
            own.push(arg);
        }
    }
    Ok((own, sources))
}

/// The name, and the value behind `=`, of a dotted override.
fn dotted(text: &str) -> Option<(&str, Option<&str>)> {
    let body = text.strip_prefix("--")?;
    let (name, value) = match body.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (body, None),
    };
    name.contains('.').then_some((name, value))
}

/// Whether the word behind an override is its value. A negative number is one, any other flag is not.
fn is_value(word: &str) -> bool {
    match word.strip_prefix('-') {
        Some(rest) => rest.starts_with(|first: char| first.is_ascii_digit() || first == '.'),
        None => !word.starts_with('@'),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split_words(words: &str) -> (Vec<String>, Sources) {
        let (own, sources) = split(words.split(' ').map(OsString::from)).expect("splits");
        (own.into_iter().map(|word| word.into_string().expect("utf-8")).collect(), sources)
    }

    #[test]
    fn files_and_overrides_are_taken_out_wherever_they_stand() {
        let on = |name: &str, value: &str| Override::new(name, value);
        let cases: &[(&str, &str, &[&str], &[Override])] = &[
            ("pdlink up @ a.toml @ b.toml", "pdlink up", &["a.toml", "b.toml"], &[]),
            ("pdlink up @a.toml --dry-run @b.toml", "pdlink up --dry-run", &["a.toml", "b.toml"], &[]),
            ("pdlink up --kv.lease_ms 5 --json", "pdlink up --json", &[], &[on("kv.lease_ms", "5")]),
            ("pdlink up --kv.lease-ms=5 @ a", "pdlink up", &["a"], &[on("kv.lease-ms", "5")]),
            ("pdlink --kv.lease_ms 5 up", "pdlink up", &[], &[on("kv.lease_ms", "5")]),
            ("pdlink up --a.b -1 --c.d -v", "pdlink up -v", &[], &[on("a.b", "-1"), Override::flag("c.d")]),
            (
                "pdlink up --a.b @ f --c.d --json",
                "pdlink up --json",
                &["f"],
                &[Override::flag("a.b"), Override::flag("c.d")],
            ),
            ("pdlink up --a.b= --c.d x=y", "pdlink up", &[], &[on("a.b", ""), on("c.d", "x=y")]),
            ("pdlink proxy --prefill http://h.x:1 @ f", "pdlink proxy --prefill http://h.x:1", &["f"], &[]),
            ("pdlink guard -- vllm @ f --a.b c", "pdlink guard -- vllm @ f --a.b c", &[], &[]),
        ];
        for (words, own, files, overrides) in cases {
            let (got, sources) = split_words(words);
            assert_eq!(got.join(" "), *own, "own words of: {words}");
            assert_eq!(sources.files, files.iter().map(PathBuf::from).collect::<Vec<_>>(), "files of: {words}");
            assert_eq!(sources.overrides, *overrides, "overrides of: {words}");
        }
    }

    #[test]
    fn an_at_sign_with_nothing_behind_it_is_an_error() {
        for words in ["pdlink up @", "pdlink up @ --", "pdlink up @ --dry-run", "pdlink up @ @ a.toml"] {
            let error = split(words.split(' ').map(OsString::from)).expect_err("must be refused");
            assert!(error.to_string().contains("needs a file"), "{words}: {error}");
        }
    }
}
