//! A value that remembers where it was written, and how two of them merge.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::Value as Json;

use super::{Origin, Origins};

/// A value and where it was written.
#[derive(Debug, Clone)]
pub(in crate::config) struct Node {
    pub(in crate::config) value: Value,
    pub(in crate::config) origin: Origin,
    /// What was typed for it on the command line, before it was read as TOML; empty for a flag that stood alone.
    pub(in crate::config) typed: Option<String>,
}

/// A TOML value.
#[derive(Debug, Clone)]
pub(in crate::config) enum Value {
    Table(Table),
    List(Vec<Node>),
    Text(String),
    Whole(i64),
    Number(f64),
    Bool(bool),
    /// A date or time, as it was written. No setting takes one; passed-through arguments get its text.
    Date(String),
}

pub(in crate::config) type Table = BTreeMap<String, Node>;

impl Node {
    pub(in crate::config) fn new(value: Value, origin: Origin) -> Self {
        Self { value, origin, typed: None }
    }

    pub(in crate::config) fn table(origin: Origin) -> Self {
        Self::new(Value::Table(Table::new()), origin)
    }

    /// Whether it is a flag of the command line that stood alone.
    pub(super) fn is_lone_flag(&self) -> bool {
        matches!(self.value, Value::Bool(true)) && self.typed.as_deref() == Some("")
    }

    pub(in crate::config) fn as_table(&self) -> Option<&Table> {
        match &self.value {
            Value::Table(table) => Some(table),
            _ => None,
        }
    }

    /// The value at a dotted path of tables.
    pub(in crate::config) fn at(&self, path: &str) -> Option<&Self> {
        path.split('.').try_fold(self, |node, key| node.as_table()?.get(key))
    }

    /// Puts a value into a table.
    pub(super) fn insert(&mut self, key: &str, node: Self) {
        if let Some(table) = self.as_table_mut() {
            table.insert(key.to_owned(), node);
        }
    }

    /// Writes the names of arguments that are passed on to vLLM with underscores, so that `max-num-seqs` in one file and
    /// `max_num_seqs` in another are one argument.
    pub(super) fn underscore_passed_through(&mut self) {
        let inference = self.as_table_mut().and_then(|root| root.get_mut("inference"));
        let Some(vllm) = inference.and_then(Self::as_table_mut).and_then(|table| table.get_mut("vllm")) else { return };
        vllm.underscore_keys();
        for role in ["prefill", "decode"] {
            if let Some(own) = vllm.as_table_mut().and_then(|table| table.get_mut(role)) {
                own.underscore_keys();
            }
        }
    }

    fn underscore_keys(&mut self) {
        if let Some(table) = self.as_table_mut() {
            let named = std::mem::take(table);
            table.extend(named.into_iter().map(|(key, node)| (key.trim_start_matches('-').replace('-', "_"), node)));
        }
    }

    fn as_table_mut(&mut self) -> Option<&mut Table> {
        match &mut self.value {
            Value::Table(table) => Some(table),
            _ => None,
        }
    }

    /// Lays `over` on top: tables merge key by key, everything else is replaced, lists whole.
    pub(super) fn merge(&mut self, over: Self) {
        match (&mut self.value, over) {
            (Value::Table(under), Self { value: Value::Table(over), .. }) => {
                for (key, node) in over {
                    match under.get_mut(&key) {
                        Some(slot) => slot.merge(node),
                        None => _ = under.insert(key, node),
                    }
                }
            }
            (_, over) => *self = over,
        }
    }

    /// Takes the value at a path of tables away.
    pub(super) fn remove(&mut self, path: &[&str]) {
        let Some(table) = self.as_table_mut() else { return };
        match path {
            [] => {}
            [last] => _ = table.remove(*last),
            [first, rest @ ..] => {
                if let Some(node) = table.get_mut(*first) {
                    node.remove(rest);
                }
            }
        }
    }

    /// Notes the origin of this value and of everything in it.
    pub(super) fn collect_origins(&self, key: &str, origins: &mut Origins) {
        if !key.is_empty() {
            origins.insert(key.to_owned(), self.origin.clone());
        }
        match &self.value {
            Value::Table(table) => {
                for (name, node) in table {
                    node.collect_origins(&join(key, name), origins);
                }
            }
            Value::List(items) => {
                for (index, node) in items.iter().enumerate() {
                    node.collect_origins(&format!("{key}[{index}]"), origins);
                }
            }
            _ => {}
        }
    }

    /// The value without its origins. A number that JSON has no word for (`inf`, `nan`) becomes its text.
    pub(super) fn to_json(&self) -> Json {
        match &self.value {
            Value::Table(table) => table.iter().map(|(key, node)| (key.clone(), node.to_json())).collect(),
            Value::List(items) => items.iter().map(Self::to_json).collect(),
            Value::Text(text) | Value::Date(text) => Json::String(text.clone()),
            Value::Whole(number) => Json::from(*number),
            Value::Number(number) => {
                serde_json::Number::from_f64(*number).map_or_else(|| Json::String(number.to_string()), Json::Number)
            }
            Value::Bool(flag) => Json::Bool(*flag),
        }
    }
}

impl Value {
    /// What kind of value it is, for messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Table(_) => "a table",
            Self::List(_) => "a list",
            Self::Text(_) => "text",
            Self::Whole(_) => "a whole number",
            Self::Number(_) => "a number",
            Self::Bool(_) => "true or false",
            Self::Date(_) => "a date",
        }
    }

    /// Whether PRIME-RL would take it as switched on: not `false`, not 0, not empty, not the text "none".
    pub(in crate::config) fn is_on(&self) -> bool {
        match self {
            Self::Table(table) => table.get("enabled").is_none_or(|enabled| enabled.value.is_on()),
            Self::List(items) => !items.is_empty(),
            Self::Text(text) => !["", "none", "null", "false", "off"].contains(&text.to_ascii_lowercase().as_str()),
            Self::Whole(number) => *number != 0,
            Self::Number(number) => *number != 0.0,
            Self::Bool(flag) => *flag,
            Self::Date(_) => true,
        }
    }
}

/// The value as it could be written, with its kind: `"eight" (text)`.
impl fmt::Display for Value {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(_) | Self::List(_) => write!(out, "{}", self.kind()),
            Self::Text(text) => {
                let shown: String = text.chars().take(60).collect();
                write!(out, "{shown:?}{} (text)", if shown.len() < text.len() { "…" } else { "" })
            }
            Self::Whole(number) => write!(out, "{number}"),
            Self::Number(number) => write!(out, "{number:?}"),
            Self::Bool(flag) => write!(out, "{flag}"),
            Self::Date(text) => write!(out, "{text} (a date)"),
        }
    }
}

/// A key below another.
pub(in crate::config) fn join(parent: &str, name: &str) -> String {
    if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") }
}
