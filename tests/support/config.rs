//! Configuration files in a folder of their own, and what loading them says.

use std::path::PathBuf;

use pdlink::config::{Finding, LoadError, LoadRequest, Loaded, Override, load};

/// A folder with files, gone when dropped.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().expect("has one")).expect("folder");
            std::fs::write(path, text).expect("file");
        }
        Self(folder)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Loads files of the folder, then overrides of the form `kv.lease_ms=5`, or `pd_disagg.enabled` for a flag alone.
    pub(crate) fn load(&self, files: &[&str], overrides: &[&str]) -> Result<Loaded, LoadError> {
        self.load_with(files, overrides, &|_| None)
    }

    pub(crate) fn load_with(
        &self,
        files: &[&str],
        overrides: &[&str],
        env: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Loaded, LoadError> {
        let files: Vec<PathBuf> = files.iter().map(|name| self.path(name)).collect();
        let overrides: Vec<Override> = overrides
            .iter()
            .map(|over| match over.split_once('=') {
                Some((name, value)) => Override::new(name, value),
                None => Override::flag(*over),
            })
            .collect();
        load(&LoadRequest { files: &files, overrides: &overrides, env })
    }
}

/// Loads one text as `a.toml`.
pub(crate) fn load_text(text: &str) -> Result<Loaded, LoadError> {
    Folder::new(&[("a.toml", text)]).load(&["a.toml"], &[])
}

/// The findings, one line each, with `a.toml:3` for the place whatever folder the file is in.
pub(crate) fn lines(findings: &[Finding]) -> String {
    let shorten = |finding: &Finding| {
        let text = finding.to_string();
        match text.split_once(": ") {
            Some((place, rest)) => format!("{}: {rest}", place.rsplit('/').next().unwrap_or(place)),
            None => text,
        }
    };
    findings.iter().map(shorten).collect::<Vec<_>>().join("\n")
}

/// What is wrong with a text; it must be wrong.
pub(crate) fn errors(text: &str) -> String {
    match load_text(text) {
        Ok(_) => panic!("this was accepted:\n{text}"),
        Err(error) => lines(&error.findings),
    }
}
