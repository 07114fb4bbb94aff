//! Where a value came from.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use std::collections::BTreeMap;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A line of a file, counted from 1.
    File {
        /// The file as it was named: on the command line, or by the file that has it as a base.
        path: Arc<Path>,
        /// The line of the key, or of the element in a list.
        line: u32,
    },
    /// An override, as it was typed.
    CommandLine(Arc<str>),
    /// An environment variable, by name.
    Environment(&'static str),
}

impl Origin {
    /// Files before the environment before the command line, and files by line: the order in which findings are told.
    pub(super) fn order(&self) -> (u8, &str, u32) {
        match self {
            Self::File { path, line } => (0, path.to_str().unwrap_or_default(), *line),
            Self::Environment(name) => (1, name, 0),
            Self::CommandLine(typed) => (2, typed, 0),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, line } => write!(out, "{}:{line}", path.display()),
            Self::CommandLine(typed) => write!(out, "command line ({typed})"),
            Self::Environment(name) => write!(out, "environment variable {name}"),
        }
    }
}

/// The origin of every value that was given; what is not here is a default.
#[derive(Debug, Clone, Default)]
pub struct Origins {
    by_key: BTreeMap<String, Origin>,
}

impl Origins {
    pub(super) fn insert(&mut self, key: String, origin: Origin) {
        self.by_key.insert(key, origin);
    }

    /// Where the value of a dotted key (`kv.lease_ms`, `pd_disagg.prefill_gpu_ids[1]`) was given, if it was.
    pub fn get(&self, key: &str) -> Option<&Origin> {
        self.by_key.get(key)
    }

    /// The origin of a key, or of the nearest table around it that was given.
    pub fn nearest(&self, key: &str) -> Option<&Origin> {
        let mut key = key;
        loop {
            if let Some(origin) = self.by_key.get(key) {
                return Some(origin);
            }
            key = &key[..key.rfind(['.', '['])?];
        }
    }

    /// Whether a key, or anything below it, was given.
    pub fn has(&self, key: &str) -> bool {
        self.by_key.contains_key(key)
    }
}
