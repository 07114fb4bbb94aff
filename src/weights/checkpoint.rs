//! A checkpoint on disk: safetensors, in one file or in several with an index.
//!
//! Headers are read when it is opened, and every number in them is checked. Bytes are read from the file straight into the
//! region that they are to lie in: that costs one copy, as a mapping would, and a file that somebody cuts short is an
//! error, where a mapping would end the process.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::manifest::{Dtype, Manifest, ManifestError, TENSORS_MAX, Tensor};
use super::tensors::{ReadError, TensorBytes};
use crate::memory::{Region, to_u64};

/// The file that names the file of each tensor.
const INDEX: &str = "model.safetensors.index.json";
/// Longest header or index; safetensors' own bound.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Most files of one checkpoint.
const FILES_MAX: usize = 4096;

/// Why a folder is no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot read {}: {why}", path.display())]
    Read { path: PathBuf, why: io::Error },
    #[error("{} holds no *.safetensors file; name a folder with a checkpoint in safetensors", path.display())]
    Empty { path: PathBuf },
    #[error("{} is no safetensors file: {why}", path.display())]
    Malformed { path: PathBuf, why: String },
    #[error("{} cannot be used: {why}", path.display())]
    Index { path: PathBuf, why: String },
    #[error("tensor `{tensor}` is in {first} and in {second}; write an index, or remove one of them")]
    Twice { tensor: String, first: String, second: String },
    #[error("tensor `{tensor}` has elements of a kind this build does not know ({dtype})")]
    Dtype { tensor: String, dtype: String },
    #[error("{} makes no manifest: {why}", path.display())]
    Manifest { path: PathBuf, why: ManifestError },
}

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    manifest: Arc<Manifest>,
    files: Vec<(PathBuf, File)>,
    /// For each tensor of the manifest, its file and where its bytes begin there.
    places: Vec<(usize, u64)>,
}

/// A tensor as a file's header has it.
struct Found {
    tensor: Tensor,
    file: usize,
    offset: u64,
}

impl Checkpoint {
    /// Opens every file and reads its header.
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        let index = Index::read(folder)?;
        let names = match &index {
            Some(index) => index.files(folder)?,
            None => files_in(folder)?,
        };
        let mut found: BTreeMap<String, Found> = BTreeMap::new();
        let mut files = Vec::with_capacity(names.len());
        for name in &names {
            let path = folder.join(name);
            let file = File::open(&path).map_err(|why| CheckpointError::Read { path: path.clone(), why })?;
            for entry in read_header(&path, &file, files.len())? {
                let wanted = index.as_ref().is_none_or(|index| index.weight_map.get(&entry.tensor.name) == Some(name));
                if !wanted {
                    continue;
                }
                if let Some(first) = found.get(&entry.tensor.name) {
                    let first = names[first.file].clone();
                    return Err(CheckpointError::Twice { tensor: entry.tensor.name, first, second: name.clone() });
                }
                found.insert(entry.tensor.name.clone(), entry);
            }
            files.push((path, file));
        }
        if let Some(missing) =
            index.as_ref().and_then(|index| index.weight_map.keys().find(|&name| !found.contains_key(name)))
        {
            let why = format!("it names tensor `{missing}`, which is not in its file");
            return Err(CheckpointError::Index { path: folder.join(INDEX), why });
        }
        let places = found.values().map(|found| (found.file, found.offset)).collect();
        let manifest = Manifest::new(found.into_values().map(|found| found.tensor).collect())
            .map_err(|why| CheckpointError::Manifest { path: folder.to_owned(), why })?;
        Ok(Self { manifest: Arc::new(manifest), files, places })
    }
}

impl TensorBytes for Checkpoint {
    fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    fn read(&self, tensor: usize, skip: u64, len: u64, region: &Region, at: u64) -> Result<(), ReadError> {
        let (file, offset) = self.places[tensor];
        let (path, file) = &self.files[file];
        region.read_file(at, file, offset + skip, len).map_err(|error| ReadError {
            tensor: self.manifest.tensors()[tensor].name.clone(),
            from: path.display().to_string(),
            why: error.to_string(),
        })
    }
}

/// Which file each tensor is in.
#[derive(Debug, Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Index {
    /// `None`: the folder has none.
    fn read(folder: &Path) -> Result<Option<Self>, CheckpointError> {
        let path = folder.join(INDEX);
        let failed = |why| CheckpointError::Read { path: path.clone(), why };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut text = Vec::new();
        file.take(HEADER_BYTES_MAX + 1).read_to_end(&mut text).map_err(failed)?;
        let wrong = |why: String| CheckpointError::Index { path: path.clone(), why };
        if to_u64(text.len()) > HEADER_BYTES_MAX {
            return Err(wrong(format!("it is longer than {HEADER_BYTES_MAX} bytes")));
        }
        let index: Self = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        if index.weight_map.len() > TENSORS_MAX {
            return Err(wrong(format!("it names {} tensors, at most {TENSORS_MAX} are taken", index.weight_map.len())));
        }
        Ok(Some(index))
    }

    /// The files it names, which must lie in the folder itself.
    fn files(&self, folder: &Path) -> Result<Vec<String>, CheckpointError> {
        let names: BTreeSet<&String> = self.weight_map.values().collect();
        let wrong = |why: String| CheckpointError::Index { path: folder.join(INDEX), why };
        if names.len() > FILES_MAX {
            return Err(wrong(format!("it names {} files, at most {FILES_MAX} are opened", names.len())));
        }
        if let Some(outside) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
            return Err(wrong(format!("it names the file `{outside}`, which is not in the folder")));
        }
        Ok(names.into_iter().cloned().collect())
    }
}

/// All files of tensors in a folder without an index.
fn files_in(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let failed = |why| CheckpointError::Read { path: folder.to_owned(), why };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") && names.len() < FILES_MAX {
            names.push(name);
        }
    }
    names.sort();
    if names.is_empty() { Err(CheckpointError::Empty { path: folder.to_owned() }) } else { Ok(names) }
}

/// The tensors that a file's header names. safetensors checks that they lie one behind the other without a gap; here it is
/// checked that the file is as long as they say.
fn read_header(path: &Path, mut file: &File, number: usize) -> Result<Vec<Found>, CheckpointError> {
    let failed = |why| CheckpointError::Read { path: path.to_owned(), why };
    let wrong = |why: String| CheckpointError::Malformed { path: path.to_owned(), why };
    let length = file.metadata().map_err(failed)?.len();
    let mut head = [0; 8];
    file.read_exact(&mut head).map_err(failed)?;
    let header_bytes = u64::from_le_bytes(head);
    if header_bytes > HEADER_BYTES_MAX.min(length.saturating_sub(8)) {
        return Err(wrong(format!("its header claims {header_bytes} bytes, the file has {length}")));
    }
    let mut header = Vec::new();
    file.take(header_bytes).read_to_end(&mut header).map_err(failed)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| wrong(error.to_string()))?;
    let start = 8 + header_bytes;
    let want = start + to_u64(metadata.data_len());
    if want != length {
        return Err(wrong(format!("its header describes {want} bytes, the file has {length}")));
    }
    let found = metadata.tensors().into_iter().map(|(name, info)| {
        let dtype = dtype(info.dtype)
            .ok_or_else(|| CheckpointError::Dtype { tensor: name.clone(), dtype: info.dtype.to_string() })?;
        let shape = info.shape.iter().map(|&size| to_u64(size)).collect();
        Ok(Found { tensor: Tensor { name, dtype, shape }, file: number, offset: start + to_u64(info.data_offsets.0) })
    });
    found.collect()
}

fn dtype(dtype: safetensors::Dtype) -> Option<Dtype> {
    use safetensors::Dtype as Theirs;
    Some(match dtype {
        Theirs::BOOL => Dtype::BOOL,
        Theirs::F4 => Dtype::F4,
        Theirs::F6_E2M3 => Dtype::F6_E2M3,
        Theirs::F6_E3M2 => Dtype::F6_E3M2,
        Theirs::U8 => Dtype::U8,
        Theirs::I8 => Dtype::I8,
        Theirs::F8_E5M2 => Dtype::F8_E5M2,
        Theirs::F8_E4M3 => Dtype::F8_E4M3,
        Theirs::F8_E8M0 => Dtype::F8_E8M0,
        Theirs::I16 => Dtype::I16,
        Theirs::U16 => Dtype::U16,
        Theirs::F16 => Dtype::F16,
        Theirs::BF16 => Dtype::BF16,
        Theirs::I32 => Dtype::I32,
        Theirs::U32 => Dtype::U32,
        Theirs::F32 => Dtype::F32,
        Theirs::F64 => Dtype::F64,
        Theirs::I64 => Dtype::I64,
        Theirs::U64 => Dtype::U64,
        // A kind that a later safetensors knows.
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tensors::lay;
    use super::super::testing::write_file;
    use super::*;

    fn whole(checkpoint: &Checkpoint) -> Vec<u8> {
        let bytes = checkpoint.manifest().stream_bytes();
        let region = Region::shared(usize::try_from(bytes).unwrap()).unwrap();
        lay(checkpoint, &(0..bytes), &region, 0).unwrap();
        region.to_vec(0, bytes).unwrap()
    }

    #[test]
    fn one_file_and_several_with_an_index_are_the_same_weights() {
        let (one, many) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tensors: Vec<(String, Vec<u8>)> = (0..5_u8).map(|at| (format!("t{at}"), vec![at; 100])).collect();
        write_file(&one.path().join("model.safetensors"), &tensors);
        write_file(&many.path().join("b.safetensors"), &tensors[..2]);
        write_file(&many.path().join("a.safetensors"), &tensors[2..]);
        let file = |at: usize| if at < 2 { "b.safetensors" } else { "a.safetensors" };
        let map: HashMap<&str, &str> =
            tensors.iter().enumerate().map(|(at, (name, _))| (name.as_str(), file(at))).collect();
        std::fs::write(many.path().join(INDEX), serde_json::json!({"weight_map": map}).to_string()).unwrap();
        let (one, indexed) = (Checkpoint::open(one.path()).unwrap(), Checkpoint::open(many.path()).unwrap());
        assert_eq!(one.manifest(), indexed.manifest());
        assert_eq!(whole(&one), whole(&indexed));
        std::fs::remove_file(many.path().join(INDEX)).unwrap();
        assert_eq!(whole(&Checkpoint::open(many.path()).unwrap()), whole(&one));
    }

    #[test]
    fn what_is_no_checkpoint_is_refused_with_the_file_at_fault() {
        let folder = tempfile::tempdir().unwrap();
        let refused = || Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(refused().contains("holds no *.safetensors file"));
        let path = folder.path().join("a.safetensors");
        std::fs::write(&path, [0xFF; 20]).unwrap();
        assert!(refused().contains("a.safetensors is no safetensors file: its header claims"), "{}", refused());
        write_file(&path, &[("t".to_owned(), vec![1; 64])]);
        let cut = std::fs::read(&path).unwrap();
        std::fs::write(&path, &cut[..cut.len() - 1]).unwrap();
        assert!(refused().contains("describes"), "{}", refused());
        write_file(&path, &[("t".to_owned(), vec![1; 64])]);
        write_file(&folder.path().join("b.safetensors"), &[("t".to_owned(), vec![1; 64])]);
        assert_eq!(
            refused(),
            "tensor `t` is in a.safetensors and in b.safetensors; write an index, or remove one of them"
        );
        let index = folder.path().join(INDEX);
        std::fs::write(&index, r#"{"weight_map": {"t": "../a.safetensors"}}"#).unwrap();
        assert!(refused().contains("`../a.safetensors`, which is not in the folder"), "{}", refused());
        std::fs::write(&index, r#"{"weight_map": {"t": "a.safetensors", "u": "b.safetensors"}}"#).unwrap();
        assert!(refused().contains("`u`, which is not in its file"), "{}", refused());
    }

    #[test]
    fn a_file_cut_short_after_it_was_opened_is_an_error_with_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        write_file(&path, &[("t".to_owned(), vec![1; 4096])]);
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(100).unwrap();
        let region = Region::shared(4096).unwrap();
        let error = lay(&checkpoint, &(0..4096), &region, 0).unwrap_err().to_string();
        assert!(error.contains("`t`") && error.contains("a.safetensors") && error.contains("ends"), "{error}");
    }
}
