//! Small checkpoints on disk.
#![allow(dead_code, reason = "each file of tests uses its own part of this")]

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// Tensors of a checkpoint: names and bytes that depend on `seed`.
pub(crate) fn tensors(seed: u64, count: usize, bytes: usize) -> Vec<(String, Vec<u8>)> {
    let byte = |at: usize, tensor: usize| {
        let word =
            (seed ^ 0x9e37_79b9).wrapping_mul(0xbf58_476d_1ce4_e5b9).wrapping_add((at * 31 + tensor * 131) as u64);
        (word >> 13).to_le_bytes()[at % 4]
    };
    (0..count)
        .map(|tensor| (format!("layers.{tensor}.weight"), (0..bytes + tensor).map(|at| byte(at, tensor)).collect()))
        .collect()
}

/// Writes a checkpoint in `files` files; more than one get an index.
pub(crate) fn write(folder: &Path, tensors: &[(String, Vec<u8>)], files: usize) {
    std::fs::create_dir_all(folder).unwrap();
    let mut map = BTreeMap::new();
    for (number, part) in tensors.chunks(tensors.len().div_ceil(files)).enumerate() {
        let name = format!("model-{:05}-of-{files:05}.safetensors", number + 1);
        let views = part.iter().map(|(name, bytes)| {
            (name.clone(), TensorView::new(Dtype::U8, vec![bytes.len()], bytes).expect("a tensor of bytes"))
        });
        serialize_to_file(views, None, &folder.join(&name)).expect("it can be written");
        map.extend(part.iter().map(|(tensor, _)| (tensor.clone(), name.clone())));
    }
    if files > 1 {
        let index = serde_json::json!({"metadata": {}, "weight_map": map});
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    }
}
