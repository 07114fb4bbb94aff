//! The settings' JSON Schema, made from the types, seen as what a value must be.
//!
//! The types are the one place where a setting is described. Checking against their schema, before serde builds them,
//! tells everything that is wrong at once, and where.

use std::sync::LazyLock;

use serde_json::{Map, Value as Json};

use crate::config::Config;

/// The JSON Schema of the whole configuration.
pub fn document() -> &'static Json {
    static DOCUMENT: LazyLock<Json> = LazyLock::new(|| schemars::schema_for!(Config).to_value());
    &DOCUMENT
}

/// What one value must be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape<'s> {
    document: &'s Json,
    /// An object, or `true`: anything goes.
    node: &'s Json,
}

/// What a table may hold besides its named keys.
#[derive(Debug, Clone, Copy)]
pub(super) enum Others<'s> {
    /// Nothing.
    Refused,
    /// Keys of PRIME-RL, which reads the same file.
    PrimeRl,
    /// Any key, each with a value of this shape: a map of names that the user makes up.
    Each(Shape<'s>),
    /// Anything.
    Free,
}

/// The kind of value that is asked for, with its bounds.
#[derive(Debug, Clone)]
pub(super) enum Kind<'s> {
    Any,
    Table,
    List(Shape<'s>),
    Text,
    /// One of these words.
    Word(Vec<&'s str>),
    Whole(Bounds),
    Number(Bounds),
    Bool,
}

/// Limits of a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Bounds {
    pub(super) min: Option<f64>,
    pub(super) above: Option<f64>,
    pub(super) max: Option<f64>,
    /// The largest number of the type: allowed, but nothing to tell people.
    type_max: Option<f64>,
}

impl<'s> Shape<'s> {
    pub(super) fn root(document: &'s Json) -> Self {
        Self { document, node: document }
    }

    fn with(self, node: &'s Json) -> Self {
        Self { document: self.document, node }.resolved()
    }

    /// Follows a reference, and leaves out the "or nothing" of an optional value: TOML has no null.
    fn resolved(self) -> Self {
        if let Some(name) = self.node["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/")) {
            return self.with(&self.document["$defs"][name]);
        }
        let choices = self.node["anyOf"].as_array().into_iter().flatten();
        match choices.into_iter().find(|choice| choice["type"] != "null") {
            Some(choice) => self.with(choice),
            None => self,
        }
    }

    fn properties(self) -> Option<&'s Map<String, Json>> {
        self.node["properties"].as_object()
    }

    /// The table's own keys.
    pub(super) fn keys(self) -> impl Iterator<Item = &'s str> {
        self.properties().into_iter().flat_map(Map::keys).map(String::as_str)
    }

    /// What a named key of the table must be.
    pub(super) fn key(self, name: &str) -> Option<Self> {
        Some(self.with(self.properties()?.get(name)?))
    }

    pub(super) fn others(self) -> Others<'s> {
        if self.node.get("x-shared-with").is_some() {
            return Others::PrimeRl;
        }
        match self.node.get("additionalProperties") {
            Some(Json::Bool(false)) => Others::Refused,
            Some(each @ Json::Object(_)) => Others::Each(self.with(each)),
            _ => Others::Free,
        }
    }

    pub(super) fn kind(self) -> Kind<'s> {
        let words = self.words();
        if !words.is_empty() {
            return Kind::Word(words);
        }
        let types: Vec<&str> = match &self.node["type"] {
            Json::Array(types) => types.iter().filter_map(Json::as_str).collect(),
            one => one.as_str().into_iter().collect(),
        };
        match types.into_iter().find(|name| *name != "null") {
            Some("object") => Kind::Table,
            Some("array") => Kind::List(self.with(&self.node["items"])),
            Some("string") => Kind::Text,
            Some("integer") => Kind::Whole(self.bounds()),
            Some("number") => Kind::Number(self.bounds()),
            Some("boolean") => Kind::Bool,
            _ => Kind::Any,
        }
    }

    /// The words of an enum: documented ones stand in `oneOf`, the others in `enum`.
    fn words(self) -> Vec<&'s str> {
        let own = [self.node].into_iter();
        let alternatives = self.node["oneOf"].as_array().into_iter().flatten();
        own.chain(alternatives)
            .flat_map(|node| node["enum"].as_array().into_iter().flatten().chain(node.get("const")))
            .filter_map(Json::as_str)
            .collect()
    }

    fn bounds(self) -> Bounds {
        let type_max = match self.node["format"].as_str() {
            Some("uint32") => Some(f64::from(u32::MAX)),
            _ => None,
        };
        Bounds {
            min: self.node["minimum"].as_f64(),
            above: self.node["exclusiveMinimum"].as_f64(),
            max: self.node["maximum"].as_f64(),
            type_max,
        }
    }
}

impl Bounds {
    pub(super) fn allow(self, number: f64) -> bool {
        number.is_finite()
            && self.min.is_none_or(|min| number >= min)
            && self.above.is_none_or(|above| number > above)
            && self.max.or(self.type_max).is_none_or(|max| number <= max)
    }
}

impl std::fmt::Display for Bounds {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.above.map(|above| format!("above {above}")));
        parts.extend(self.min.map(|min| format!("at least {min}")));
        parts.extend(self.max.map(|max| format!("at most {max}")));
        match parts.is_empty() {
            true => Ok(()),
            false => write!(out, ", {}", parts.join(" and ")),
        }
    }
}
