//! Libraries that come in Python wheels: where they are looked for, and that a process opens each of them once, for good.
#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Where to look, most wanted first. Last comes the loader's own path.
#[derive(Debug, Clone, Copy, Default)]
pub struct Search<'a> {
    /// The library itself. Nothing else is tried then.
    pub library: Option<&'a Path>,
    /// Python environments whose wheel may have it.
    pub environments: &'a [PathBuf],
}

impl Search<'_> {
    /// Files to try in this order. `in_packages` says which there are in a folder of packages.
    pub(super) fn candidates(&self, file: &str, in_packages: impl Fn(&Path) -> Vec<PathBuf>) -> Vec<PathBuf> {
        if let Some(library) = self.library {
            return vec![library.to_owned()];
        }
        let pythons = |prefix: &PathBuf| children(&prefix.join("lib"), |name| name.starts_with("python3"));
        let packages = self.environments.iter().flat_map(pythons).map(|python| python.join("site-packages"));
        let found = packages.flat_map(|packages| in_packages(&packages)).filter(|found| found.is_file());
        found.chain([PathBuf::from(file)]).collect()
    }
}

/// What is in a folder and has a wanted name.
pub(super) fn children(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_str().is_some_and(&wanted)).map(|entry| entry.path()).collect()
}

/// A library that is opened when it is first asked for, and stays.
pub(super) struct Once<L: 'static>(Mutex<Option<&'static L>>);

/// That another file than the wanted one is open.
pub(super) struct Another {
    pub(super) loaded: String,
    pub(super) wanted: String,
}

impl<L> Once<L> {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(None))
    }

    pub(super) fn get<E: From<Another>>(
        &self,
        search: &Search,
        path: impl Fn(&L) -> &Path,
        find: impl FnOnce() -> Result<L, E>,
    ) -> Result<&'static L, E> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = *open {
            return match search.library {
                Some(wanted) if wanted != path(library) => Err(E::from(Another {
                    loaded: path(library).display().to_string(),
                    wanted: wanted.display().to_string(),
                })),
                _ => Ok(library),
            };
        }
        let library = &*Box::leak(Box::new(find()?));
        *open = Some(library);
        Ok(library)
    }
}
