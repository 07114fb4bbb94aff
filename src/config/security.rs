//! `[security]`: the secret that the parts of one run share.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The secret that authenticates every control connection of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SecurityConfig {
    /// File with the run's secret, 64 hexadecimal digits, readable by its owner only. Default: the environment variable
    /// `PDLINK_SECRET_FILE`, else `up` makes a fresh secret for each run. Give one where workers are started by hand on
    /// several hosts; whoever reads the file can read and write KV.
    pub secret_file: Option<PathBuf>,
}
