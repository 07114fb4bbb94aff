//! Synthetic checkpoints: bytes that nothing compresses, in tensors of equal size.

use std::path::Path;

use anyhow::Context;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

use crate::bench::link::noise;
use crate::memory::{to_u64, to_usize};

/// Bytes of noise that tensors are made of, each from another place.
const NOISE_BYTES: usize = 16 << 20;

/// Writes `bytes` bytes of weights as `tensors` tensors into one file of `folder`. Another seed, other weights.
pub(super) fn write(folder: &Path, bytes: u64, tensors: usize, seed: u64) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    // Two bytes an element.
    let each = to_usize(bytes / to_u64(tensors.max(1)) / 2 * 2).max(2);
    let noise = noise(NOISE_BYTES, seed);
    let contents: Vec<(String, Vec<u8>)> = (0..tensors.max(1))
        .map(|tensor| {
            let turn = tensor * 4096 % NOISE_BYTES;
            let content = noise[turn..].iter().chain(noise.iter().cycle()).take(each).copied().collect();
            (format!("model.layers.{tensor}.weight"), content)
        })
        .collect();
    let views = contents.iter().map(|(name, bytes)| {
        let view = TensorView::new(Dtype::BF16, vec![bytes.len() / 2], bytes);
        (name.clone(), view.expect("as many bytes as its elements have"))
    });
    let file = folder.join("model.safetensors");
    serialize_to_file(views, None, &file).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_synthetic_checkpoint_is_one_that_workers_take() {
        let folder = tempfile::tempdir().expect("folder");
        write(folder.path(), 1_000_001, 3, 7).expect("written");
        let checkpoint = crate::weights::Checkpoint::open(folder.path()).expect("opened");
        assert_eq!(crate::weights::TensorBytes::manifest(&checkpoint).tensors().len(), 3);
        let other = tempfile::tempdir().expect("folder");
        write(other.path(), 1_000_001, 3, 8).expect("written");
        let read = |folder: &Path| std::fs::read(folder.join("model.safetensors")).expect("bytes");
        assert_ne!(read(folder.path()), read(other.path()));
    }
}
