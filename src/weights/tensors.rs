//! Where tensors' bytes come from, as whoever sends or stages them sees it.

use std::ops::Range;
use std::sync::Arc;

use super::manifest::Manifest;
use crate::memory::Region;

/// A set of weights whose bytes can be had: a checkpoint on disk, what a worker staged, a trainer's tensors.
pub trait TensorBytes: Send + Sync {
    fn manifest(&self) -> &Arc<Manifest>;

    /// Copies `len` bytes of a tensor, from byte `skip` on, into `region` at `at`. May block on a disk.
    fn read(&self, tensor: usize, skip: u64, len: u64, region: &Region, at: u64) -> Result<(), ReadError>;
}

/// Bytes that could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot read tensor `{tensor}` from {from}: {why}")]
pub struct ReadError {
    pub tensor: String,
    pub from: String,
    pub why: String,
}

/// Lays `range` of the stream at `at` in `region`. What lies between tensors is left as it is.
pub(super) fn lay(bytes: &dyn TensorBytes, range: &Range<u64>, region: &Region, at: u64) -> Result<(), ReadError> {
    for piece in bytes.manifest().pieces(range.clone()) {
        let len = piece.stream.end - piece.stream.start;
        if len > 0 {
            bytes.read(piece.tensor, piece.skip, len, region, at + (piece.stream.start - range.start))?;
        }
    }
    Ok(())
}
