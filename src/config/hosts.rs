//! `[hosts]`: has no settings yet.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Accepted empty. All workers run on the host of the launcher; a key in here is refused, because nothing would read it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HostsConfig {}
