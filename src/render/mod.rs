//! `pdlink render`: the same configuration for a scheduler. Nothing is started and nothing asked; what comes out is text.
//!
//! `slurm` writes a batch script, `kubernetes` manifests. Both start `pdlink up` once on each node and leave everything else to
//! it, so that a run behaves the same wherever it is. Pools do not grow or shrink: workers are paired at the start, their ranks
//! have fixed places in a weight broadcast, and a new worker must take the fleet's weights before it serves. That is why no
//! autoscaler is written, and an elastic client is refused when the configuration is read.
#![forbid(unsafe_code)]

mod kubernetes;
mod objects;
mod shape;
mod shell;
mod slurm;
mod yaml;

use serde_json::Value;

use crate::config::{Config, is_secret_variable};

pub use kubernetes::manifests;
pub use shell::quoted;
pub use slurm::script;

/// Why nothing can be rendered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    #[error(
        "`kubernetes.image` is not given; name an image that has pdlink (and vLLM), as in `--kubernetes.image registry/pdlink:1`"
    )]
    NoImage,
    #[error(
        "`{key}` has the variable {name}, which looks like a secret and would be readable in what is rendered; {mend}"
    )]
    Secret { key: String, name: String, mend: &'static str },
    #[error(
        "{key} = {value:?} has a line break or a quote in it, which cannot be written into the script's head; leave it out"
    )]
    Unwritable { key: &'static str, value: String },
    #[error("the configuration cannot be written down again: {0}")]
    Toml(String),
}

/// The configuration as every node reads it: without what is secret, and with ports that are known beforehand.
fn configuration(config: &Config, change: impl FnOnce(&mut Value)) -> Result<String, RenderError> {
    let mut config = config.clone();
    config.proxy.admin_token = None;
    config.security.secret_file = None;
    let mut tree = serde_json::to_value(&config).map_err(|error| RenderError::Toml(error.to_string()))?;
    change(&mut tree);
    let default = serde_json::to_value(Config::default()).map_err(|error| RenderError::Toml(error.to_string()))?;
    let changed = difference(tree, &default).unwrap_or_else(|| serde_json::json!({}));
    toml::to_string_pretty(&changed).map_err(|error| RenderError::Toml(error.to_string()))
}

/// What is not as it is by default: a page that can be read, and read by a later version too.
fn difference(value: Value, default: &Value) -> Option<Value> {
    match (value, default) {
        (Value::Null, _) => None,
        (value, default) if value == *default => None,
        (Value::Object(fields), default) => {
            let none = Value::Null;
            let of = |name: &str| default.get(name).unwrap_or(&none);
            let changed = fields.into_iter().filter_map(|(name, value)| {
                let value = difference(value, of(&name))?;
                Some((name, value))
            });
            Some(Value::Object(changed.collect()))
        }
        (value, _) => Some(without_nulls(value)),
    }
}

/// TOML has no word for nothing: what is not given is not there.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        Value::Object(fields) => {
            let given = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(given.map(|(name, value)| (name, without_nulls(value))).collect())
        }
        value => value,
    }
}

/// Secrets in variables would stand in what is printed.
fn refuse_secrets<'a>(
    key: &str,
    names: impl Iterator<Item = &'a String>,
    mend: &'static str,
) -> Result<(), RenderError> {
    match names.into_iter().find(|name| is_secret_variable(name)) {
        Some(name) => Err(RenderError::Secret { key: key.to_owned(), name: name.clone(), mend }),
        None => Ok(()),
    }
}

/// The same for the variables of both roles.
fn refuse_role_secrets(config: &Config, mend: &'static str) -> Result<(), RenderError> {
    for (key, env) in [("prefill_env", &config.pd_disagg.prefill_env), ("decode_env", &config.pd_disagg.decode_env)] {
        refuse_secrets(&format!("pd_disagg.{key}"), env.keys(), mend)?;
    }
    Ok(())
}
