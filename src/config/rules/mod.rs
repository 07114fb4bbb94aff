//! What no single value can tell: the rules that tie settings together.
//!
//! A rule that breaks names the key to change, where it was given, and the mend. A rule says nothing about a key whose value
//! was refused already.

mod dispatch;
mod engine;
mod gpus;
mod hosts;
mod kv;
mod pd;
mod ports;
mod services;
mod update;
mod weights;

use super::load::tree::Node;
use super::{Config, Finding, Origins};

/// What the rules found.
#[derive(Debug, Default)]
pub(super) struct Verdict {
    pub(super) errors: Vec<Finding>,
    pub(super) warnings: Vec<Finding>,
    pub(super) notes: Vec<Finding>,
}

/// What rules look at, and where they say what they found.
struct Bench<'a> {
    config: &'a Config,
    /// All that was given, PRIME-RL's keys too.
    given: &'a Node,
    origins: &'a Origins,
    tainted: &'a [String],
    verdict: Verdict,
}

/// Applies every rule.
pub(super) fn judge(config: &Config, given: &Node, origins: &Origins, tainted: &[String]) -> Verdict {
    let mut bench = Bench { config, given, origins, tainted, verdict: Verdict::default() };
    pd::judge(&mut bench);
    gpus::judge(&mut bench);
    hosts::judge(&mut bench);
    ports::judge(&mut bench);
    weights::judge(&mut bench);
    update::judge(&mut bench);
    kv::judge(&mut bench);
    dispatch::judge(&mut bench);
    services::judge(&mut bench);
    engine::judge(&mut bench);
    bench.verdict
}

impl Bench<'_> {
    /// An error about `keys`, the first of which is to be changed.
    fn refuse(&mut self, keys: &[&str], message: impl Into<String>, mend: impl Into<String>) {
        self.verdict.errors.extend(self.finding(keys, message.into(), Some(mend.into())));
    }

    fn warn(&mut self, keys: &[&str], message: impl Into<String>, mend: impl Into<String>) {
        self.verdict.warnings.extend(self.finding(keys, message.into(), Some(mend.into())));
    }

    fn note(&mut self, key: &str, message: impl Into<String>) {
        self.verdict.notes.extend(self.finding(&[key], message.into(), None));
    }

    /// Whether a key was given at all, by a file or on the command line.
    fn has(&self, key: &str) -> bool {
        self.origins.has(key)
    }

    /// Nothing, if one of the keys was refused already: then its value is not what was meant.
    ///
    /// The finding is about the first key that was given: where two settings contradict each other, one may be a default,
    /// and a default has no line to show.
    fn finding(&self, keys: &[&str], message: String, mend: Option<String>) -> Option<Finding> {
        if keys.iter().any(|key| self.is_tainted(key)) {
            return None;
        }
        let key = keys.iter().find(|key| self.has(key)).or_else(|| keys.first())?;
        Some(Finding { key: (*key).to_owned(), origin: self.origins.nearest(key).cloned(), message, mend })
    }

    fn is_tainted(&self, key: &str) -> bool {
        let within = |inner: &str, outer: &str| {
            inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        self.tainted.iter().any(|tainted| within(key, tainted) || within(tainted, key))
    }
}
