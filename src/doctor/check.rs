//! One question about this place, and its answer.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

/// What a check is about. The report has them in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    Machine,
    Libraries,
    Configuration,
    Links,
    Deployment,
}

impl Group {
    pub const ALL: [Self; 5] = [Self::Machine, Self::Libraries, Self::Configuration, Self::Links, Self::Deployment];

    pub fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Libraries => "libraries",
            Self::Configuration => "configuration",
            Self::Links => "links",
            Self::Deployment => "deployment",
        }
    }
}

/// How a check came out, from harmless to harmful.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// What it asks about is not here, or nothing asked for it.
    Skipped,
    Ok,
    /// It works, or nothing needs it now; somebody should look at it.
    Warn,
    /// What the configuration asks for will not work.
    Fail,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Self::Skipped => "skipped",
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answer {
    pub result: Verdict,
    /// What was seen; where it was skipped, why.
    pub seen: String,
    /// What to do about it. Always there with `warn` and `fail`.
    pub mend: Option<String>,
    /// The numbers and names behind it, for machines.
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub values: Map<String, Value>,
}

impl Answer {
    fn new(result: Verdict, seen: impl Into<String>, mend: Option<String>) -> Self {
        Self { result, seen: seen.into(), mend, values: Map::new() }
    }

    pub fn ok(seen: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, seen, None)
    }

    pub fn skipped(why: impl Into<String>) -> Self {
        Self::new(Verdict::Skipped, why, None)
    }

    pub fn warn(seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::new(Verdict::Warn, seen, Some(mend.into()))
    }

    pub fn fail(seen: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::new(Verdict::Fail, seen, Some(mend.into()))
    }

    /// A fault: a failure where the configuration needs what is broken, otherwise something to know.
    pub fn fault(needed: bool, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        if needed { Self::fail(seen, mend) } else { Self::warn(seen, mend) }
    }

    /// Something absent: a failure where the configuration needs it, otherwise skipped.
    pub fn absent(needed: bool, seen: impl Into<String>, mend: impl Into<String>) -> Self {
        if needed { Self::fail(seen, mend) } else { Self::skipped(seen) }
    }

    #[must_use]
    pub fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.values.insert(name.to_owned(), value.into());
        self
    }
}

type Ask = Box<dyn FnOnce() -> Answer + Send>;

/// One question.
pub struct Check {
    pub group: Group,
    pub name: String,
    /// How long it may take before it counts as failed, and others stop waiting for it.
    pub within: Duration,
    pub(super) ask: Ask,
}

impl Check {
    pub fn new(
        group: Group,
        name: impl Into<String>,
        within: Duration,
        ask: impl FnOnce() -> Answer + Send + 'static,
    ) -> Self {
        Self { group, name: name.into(), within, ask: Box::new(ask) }
    }
}
