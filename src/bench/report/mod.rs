//! What a run of `pdlink bench` leaves behind: one document for every level, which `render`, `compare` and anybody's own
//! scripts read back. `pdlink bench schema` describes it.

mod figure;

use std::path::Path;

use anyhow::{Context, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use figure::{Figure, Unit};

use super::environment::Environment;
use super::table::Table;
use super::{kv, link, proxy, raw, serve, soak, weights};

/// Version of the document's form. It grows when a field changes its meaning or goes; new fields leave it as it is.
pub const FORMAT: u32 = 1;

/// All that one command measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Report {
    /// Version of this form.
    pub pdlink_bench: u32,
    pub environment: Environment,
    /// What was measured, in the order in which it was.
    pub levels: Vec<Level>,
    /// What was not, and why.
    #[serde(default)]
    pub skipped: Vec<Skipped>,
}

/// One kind of measurement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "level", rename_all = "kebab-case")]
pub enum Level {
    Raw(raw::Report),
    Link(link::Report),
    Kv(kv::Report),
    Serve(serve::Report),
    Weights(weights::Report),
    Proxy(proxy::Report),
    Soak(soak::Report),
}

/// Something that this machine cannot show.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Skipped {
    pub what: String,
    pub why: String,
}

impl Report {
    pub fn new(environment: Environment) -> Self {
        Self { pdlink_bench: FORMAT, environment, levels: Vec::new(), skipped: Vec::new() }
    }

    /// Reads what [`Report::write`] wrote, and refuses what it did not.
    pub fn read(file: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("{} is no report of `pdlink bench`", file.display()))
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            pdlink_bench: u32,
        }
        let Version { pdlink_bench: found } =
            serde_json::from_str(text).context("it does not say `pdlink_bench`, the version of its form")?;
        ensure!(found == FORMAT, "its form is version {found}, and this pdlink reads version {FORMAT}: measure again");
        let mut reader = serde_json::Deserializer::from_str(text);
        Ok(serde_path_to_error::deserialize(&mut reader)?)
    }

    pub fn write(&self, file: &Path) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
    }

    /// The form as a JSON Schema.
    pub fn schema() -> serde_json::Value {
        schemars::schema_for!(Self).to_value()
    }

    /// Every figure in it that can be held against another run's.
    pub fn figures(&self) -> Vec<Figure> {
        self.levels.iter().flat_map(Level::figures).collect()
    }
}

impl Level {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Raw(_) => "raw",
            Self::Link(_) => "link",
            Self::Kv(_) => "kv",
            Self::Serve(_) => "serve",
            Self::Weights(_) => "weights",
            Self::Proxy(_) => "proxy",
            Self::Soak(_) => "soak",
        }
    }

    /// What a person reads.
    pub fn tables(&self) -> Vec<Table> {
        match self {
            Self::Raw(report) => report.tables(),
            Self::Link(report) => report.tables(),
            Self::Kv(report) => report.tables(),
            Self::Serve(report) => report.tables(),
            Self::Weights(report) => report.tables(),
            Self::Proxy(report) => report.tables(),
            Self::Soak(report) => report.tables(),
        }
    }

    /// What is to be said beside the tables.
    pub fn notes(&self) -> Vec<String> {
        match self {
            Self::Kv(report) => report.notes(),
            Self::Serve(report) => report.notes(),
            Self::Proxy(report) => report.notes(),
            Self::Raw(_) | Self::Link(_) | Self::Weights(_) | Self::Soak(_) => Vec::new(),
        }
    }

    fn figures(&self) -> Vec<Figure> {
        match self {
            Self::Raw(report) => report.figures(),
            Self::Link(report) => report.figures(),
            Self::Kv(report) => report.figures(),
            Self::Serve(report) => report.figures(),
            Self::Weights(report) => report.figures(),
            Self::Proxy(report) => report.figures(),
            // It promises; it does not time.
            Self::Soak(_) => Vec::new(),
        }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.tables().iter().try_for_each(|table| write!(f, "\n{table}"))?;
        self.notes().iter().try_for_each(|note| writeln!(f, "\n{note}"))
    }
}
