//! What a worker does with requests.

use serde::{Deserialize, Serialize};

/// What a worker does with requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Computes the KV of prompts and hands it over.
    Prefill,
    /// Takes KV over and writes answers.
    Decode,
    /// A plain worker: prefill and decode by itself.
    Both,
}

impl Role {
    /// The name used in the plan, in logs and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Both => "both",
        }
    }
}
