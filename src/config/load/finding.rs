//! What loading has to say about one key: an error, a warning or a note.

use std::fmt;

use super::Origin;

/// One thing to say about one key. Whether it is an error, a warning or a note is told by the list it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The key, dotted: `pd_disagg.prefill_gpu_ids`.
    pub key: String,
    /// Where its value was given; `None` for a default, or for something that is missing.
    pub origin: Option<Origin>,
    /// What is the matter.
    pub message: String,
    /// What to do about it.
    pub mend: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(out, "{origin}: ")?;
        }
        if !self.key.is_empty() {
            write!(out, "{}: ", self.key)?;
        }
        write!(out, "{}", self.message)?;
        match &self.mend {
            Some(mend) => write!(out, "; {mend}"),
            None => Ok(()),
        }
    }
}

/// The configuration cannot be used. Holds everything that is wrong with it, in order of files and lines.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", lines(findings))]
pub struct LoadError {
    /// What is wrong; never empty.
    pub findings: Vec<Finding>,
}

fn lines(findings: &[Finding]) -> String {
    findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}
