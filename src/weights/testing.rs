//! Small checkpoints for tests.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// A safetensors file of byte tensors.
pub(super) fn write_file(path: &Path, tensors: &[(String, Vec<u8>)]) {
    let views = tensors.iter().map(|(name, bytes)| {
        (name.clone(), TensorView::new(Dtype::U8, vec![bytes.len()], bytes).expect("a tensor of bytes"))
    });
    serialize_to_file(views, None, path).expect("the file can be written");
}
