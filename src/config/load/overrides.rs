//! `--section.key value` on the command line.

use std::sync::Arc;

use serde_json::Value as Json;

use super::names::is_secret;
use super::schema::{Others, Shape};
use super::tree::{Node, Value};
use super::{Finding, Origin, parse};

/// Longest dotted name: far deeper than any setting, and shallow enough to walk without a thought for the stack.
const SEGMENTS_MAX: usize = 16;
/// Letters of a value that messages show.
const SHOWN_MAX: usize = 60;

/// One override, taken apart but not yet parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Override {
    /// The dotted name without its leading dashes, as it was typed.
    pub name: String,
    /// The value as it was typed; `None` for a flag that stands alone and means `true`.
    pub value: Option<String>,
    /// The flag of a command that it was typed as, where it was not its own name.
    pub flag: Option<&'static str>,
}

impl Override {
    /// `kv.lease_ms` and `500`, from `--kv.lease_ms 500`.
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { name: name.into(), value: Some(value.into()), flag: None }
    }

    /// `pd_disagg.auto_ports`, from `--pd_disagg.auto_ports`.
    pub fn flag(name: impl Into<String>) -> Self {
        Self { name: name.into(), value: None, flag: None }
    }

    /// The setting that a command's own flag stands for: `proxy.attempts_max`, from `--max-generate-attempts`.
    pub fn of_flag(flag: &'static str, name: impl Into<String>, value: impl Into<String>) -> Self {
        Self { flag: Some(flag), ..Self::new(name, value) }
    }

    /// The override as it was typed, for messages; not a secret, and nothing endless.
    pub(super) fn typed(&self) -> Arc<str> {
        let typed = self.flag.unwrap_or(&self.name);
        let Some(value) = &self.value else { return format!("--{typed}").into() };
        let name = self.name.rsplit('.').next().unwrap_or_default();
        let cut = value.char_indices().nth(SHOWN_MAX).map_or(value.len(), |(end, _)| end);
        let shown = if is_secret(name) { "…" } else { &value[..cut] };
        format!("--{typed} {shown}{}", if cut < value.len() { "…" } else { "" }).into()
    }

    /// The value at its place in an otherwise empty tree.
    pub(super) fn node(&self, document: &Json) -> Result<Node, Finding> {
        let origin = Origin::CommandLine(self.typed());
        let segments: Vec<&str> = self.name.split('.').collect();
        if segments.iter().any(|segment| segment.is_empty()) || segments.len() > SEGMENTS_MAX {
            return Err(Finding {
                key: self.name.clone(),
                origin: Some(origin),
                message: "is no dotted name of a setting".to_owned(),
                mend: Some("write --section.key value, as in --kv.lease_ms 30000".to_owned()),
            });
        }
        let value = match &self.value {
            Some(text) => parse::parse_value(text, &origin),
            None => Node { typed: Some(String::new()), ..Node::new(Value::Bool(true), origin.clone()) },
        };
        let names = canonical(&segments, Shape::root(document));
        let mut root = names.into_iter().rev().fold(value, |node, name| {
            let mut around = Node::table(origin.clone());
            around.insert(&name, node);
            around
        });
        root.underscore_passed_through();
        Ok(root)
    }
}

/// The names as files write them: dashes are underscores, but in maps whose names the user makes up.
fn canonical(segments: &[&str], root: Shape<'_>) -> Vec<String> {
    let mut shape = Some(root);
    segments
        .iter()
        .map(|segment| {
            let written = segment.replace('-', "_");
            let (name, below) = match shape.map(|shape| (shape.key(&written), shape.others())) {
                Some((Some(below), _)) => (written, Some(below)),
                Some((None, Others::Each(below))) => ((*segment).to_owned(), Some(below)),
                _ => (written, None),
            };
            shape = below;
            name
        })
        .collect()
}
