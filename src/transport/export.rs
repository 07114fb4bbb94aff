//! What one process tells a peer about its regions, per path.
#![forbid(unsafe_code)]

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::TransportError;
use crate::config::Path;

/// Most bytes of one export. A region is about 30 bytes, so this is some ten thousand regions.
const EXPORT_BYTES_MAX: usize = 512 * 1024;

/// A path's own description of a process and its regions. Opaque to all but that path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export(Vec<u8>);

/// One path that a process offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub path: Path,
    pub export: Export,
}

impl Export {
    pub(super) fn encode(description: &impl Serialize) -> Self {
        // Encoding into memory fails only for types that postcard does not know, which is our own mistake.
        Self(postcard::to_stdvec(description).expect("descriptions are plain data"))
    }

    /// Reads a peer's description. Bounded before anything is allocated for it: the codec allocates at most what the
    /// bytes themselves hold.
    pub(super) fn decode<T: DeserializeOwned>(&self, path: Path) -> Result<T, TransportError> {
        let refuse = |reason: String| TransportError::BadExport { path: path.name(), reason };
        if self.0.len() > EXPORT_BYTES_MAX {
            return Err(refuse(format!("{} bytes, at most {EXPORT_BYTES_MAX} are taken", self.0.len())));
        }
        match postcard::take_from_bytes(&self.0) {
            Ok((description, [])) => Ok(description),
            Ok((_, rest)) => Err(refuse(format!("{} bytes too many", rest.len()))),
            Err(error) => Err(refuse(error.to_string())),
        }
    }

    pub fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}
