//! Where tensors' bytes come from, as whoever sends or stages them sees it.

use std::ops::Range;
use std::sync::Arc;

use super::manifest::{Manifest, Piece};
use crate::memory::{AccessError, Device, GpuCopies, GpuRun, Launches, Region, to_usize};

/// All of a GPU: nothing else runs for long while a bucket is packed.
const MULTIPROCESSORS_MAX: u32 = 256;

/// A set of weights whose bytes can be had: a checkpoint on disk, what a worker staged, a trainer's tensors.
pub trait TensorBytes: Send + Sync {
    fn manifest(&self) -> &Arc<Manifest>;

    /// Copies `len` bytes of a tensor, from byte `skip` on, into `region` at `at`. May block on a disk.
    fn read(&self, tensor: usize, skip: u64, len: u64, region: &Region, at: u64) -> Result<(), ReadError>;

    /// The GPU that all of it lies on, if it does.
    fn device(&self) -> Option<&Arc<Device>> {
        None
    }

    /// Where on that GPU a tensor lies whole.
    fn on_gpu(&self, _tensor: usize) -> Option<Arc<Region>> {
        None
    }

    /// Waits until all of `range` of the stream can be read, of which what lies before it is not read any more. Ranges come in
    /// order, each when the one before was read.
    fn attend(&self, _range: &Range<u64>) -> Result<(), ReadError> {
        Ok(())
    }

    /// Nothing is read any more: ends what waits.
    fn close(&self) {}
}

/// Bytes that could not be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot read tensor `{tensor}` from {from}: {why}")]
pub struct ReadError {
    pub tensor: String,
    pub from: String,
    pub why: String,
}

/// Lays parts of the stream where they are wanted.
#[derive(Default)]
pub(super) struct Packer {
    copies: Option<GpuCopies>,
    /// Where bytes wait that come from elsewhere and go to a GPU.
    bounce: Option<Arc<Region>>,
}

impl Packer {
    /// Lays `range` of the stream at `at` in `region`. What lies between tensors is left as it is, or zero.
    pub(super) fn lay(
        &mut self,
        bytes: &dyn TensorBytes,
        range: &Range<u64>,
        region: &Region,
        at: u64,
    ) -> Result<(), ReadError> {
        bytes.attend(range)?;
        let Some(device) = region.device() else { return lay(bytes, range, region, at) };
        let named = |why: String| {
            let first = bytes.manifest().pieces(range.clone()).next();
            let tensor = first.map(|piece| bytes.manifest().tensors()[piece.tensor].name.clone());
            ReadError { tensor: tensor.unwrap_or_default(), from: format!("memory, to GPU {}", device.ordinal()), why }
        };
        if bytes.device().is_some_and(|own| own.ordinal() == device.ordinal()) {
            let pieces: Vec<Piece> = bytes.manifest().pieces(range.clone()).collect();
            return self.gather(bytes, &pieces, range, region, at).map_err(|error| named(error.to_string()));
        }
        let len = range.end - range.start;
        let bounce = match self.bounce.take().filter(|bounce| bounce.len() >= len) {
            Some(bounce) => bounce,
            None => {
                let made = Region::shared(to_usize(len.max(1))).map_err(|error| named(error.to_string()))?;
                if let Err(error) = made.pin_for(device) {
                    tracing::debug!(%error, "memory on the way to a GPU is not fixed: copies are slower");
                }
                made
            }
        };
        lay(bytes, range, &bounce, 0)?;
        bounce.copy_to(0, region, at, len).map_err(|error| named(error.to_string()))?;
        self.bounce = Some(bounce);
        Ok(())
    }

    /// All pieces of a bucket with one list: a launch for each would take longer than most of them.
    fn gather(
        &mut self,
        bytes: &dyn TensorBytes,
        pieces: &[Piece],
        range: &Range<u64>,
        region: &Region,
        at: u64,
    ) -> Result<(), AccessError> {
        let pieces = pieces.iter().filter(|piece| !piece.stream.is_empty());
        let held = pieces.map(|piece| Ok((piece, bytes.on_gpu(piece.tensor).ok_or(AccessError::NotGpu)?)));
        let held = held.collect::<Result<Vec<_>, AccessError>>()?;
        let runs = held.iter().map(|(piece, src)| {
            let (dst_offset, len) = (at + (piece.stream.start - range.start), piece.stream.end - piece.stream.start);
            GpuRun { src, src_offset: piece.skip, dst: region, dst_offset, len }
        });
        let device = region.device().ok_or(AccessError::NotGpu)?;
        if self.copies.is_none() {
            self.copies = Some(GpuCopies::on(device, MULTIPROCESSORS_MAX, Launches::ONE)?);
        }
        self.copies.as_mut().map_or(Ok(()), |copies| copies.copy(runs))
    }
}

/// The same into host memory.
pub(super) fn lay(bytes: &dyn TensorBytes, range: &Range<u64>, region: &Region, at: u64) -> Result<(), ReadError> {
    for piece in bytes.manifest().pieces(range.clone()) {
        let len = piece.stream.end - piece.stream.start;
        if len > 0 {
            bytes.read(piece.tensor, piece.skip, len, region, at + (piece.stream.start - range.start))?;
        }
    }
    Ok(())
}
