//! Files into one tree: bases first, then the file that names them, then the next file.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::tree::{Node, Value};
use super::{Finding, Origin, parse};

/// The key under which a file names its bases.
const BASES: &str = "toml_files";
/// Longest chain of bases. A chain that long is a mistake; the bound keeps the stack in bounds too.
const CHAIN_MAX: usize = 32;
/// Most files read for one configuration: bases that fan out and meet again are read once for each way to them.
const FILES_MAX: usize = 256;
/// Largest file, in bytes. A configuration is a few kilobytes; this stops `@ model.safetensors` before it fills memory.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Reads and merges files; collects what is wrong with them.
#[derive(Debug, Default)]
pub(super) struct Composer {
    pub(super) findings: Vec<Finding>,
    /// The files that are being read, each named by the one before it; with their real paths.
    chain: Vec<(Arc<Path>, PathBuf)>,
    files_read: usize,
}

impl Composer {
    /// A file with its bases under it. `named_at` says who named it, if a file did.
    pub(super) fn file(&mut self, path: &Path, named_at: Option<&Origin>) -> Option<Node> {
        let path: Arc<Path> = Arc::from(path);
        let real = self.enter(&path, named_at)?;
        let text = self.read(&path, named_at)?;
        let mut own = match parse::parse(&path, &text) {
            Ok(own) => own,
            Err(findings) => {
                self.findings.extend(findings);
                return None;
            }
        };
        self.chain.push((Arc::clone(&path), real));
        let mut merged = Node::table(own.origin.clone());
        for (base, origin) in self.bases(&mut own) {
            let base = path.with_file_name(base);
            if let Some(node) = self.file(&base, Some(&origin)) {
                merged.merge(node);
            }
        }
        self.chain.pop();
        own.underscore_passed_through();
        merged.merge(own);
        Some(merged)
    }

    /// The file's real path, unless reading it would not end.
    fn enter(&mut self, path: &Arc<Path>, named_at: Option<&Origin>) -> Option<PathBuf> {
        let real = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        if let Some(start) = self.chain.iter().position(|(_, open)| *open == real) {
            let names = self.chain[start..].iter().map(|(name, _)| name.display().to_string());
            let chain = names.chain([path.display().to_string()]).collect::<Vec<_>>().join(" → ");
            self.complain(named_at, format!("files name each other in a circle: {chain}"), "take one of the links out");
            return None;
        }
        self.files_read += 1;
        if self.chain.len() >= CHAIN_MAX || self.files_read > FILES_MAX {
            let message = format!("more than {CHAIN_MAX} files in a chain, or {FILES_MAX} in all");
            self.complain(named_at, message, "name fewer bases");
            return None;
        }
        Some(real)
    }

    fn read(&mut self, path: &Path, named_at: Option<&Origin>) -> Option<String> {
        let failure = match std::fs::metadata(path) {
            Ok(meta) if meta.len() > FILE_BYTES_MAX => {
                format!("it has {} bytes, and a configuration has {FILE_BYTES_MAX} at most", meta.len())
            }
            Ok(_) => match std::fs::read_to_string(path) {
                Ok(text) => return Some(text),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        let mend = match named_at {
            Some(_) => "paths in `toml_files` are relative to the file that names them",
            None => "name a TOML file behind `@`",
        };
        self.complain(named_at, format!("cannot read {}: {failure}", path.display()), mend);
        None
    }

    /// Takes the list of bases out of a file's own values.
    fn bases(&mut self, own: &mut Node) -> Vec<(String, Origin)> {
        let Value::Table(table) = &mut own.value else { return Vec::new() };
        let Some(node) = table.remove(BASES) else { return Vec::new() };
        let items = match node.value {
            Value::List(items) => items,
            _ => vec![node],
        };
        let mut bases = Vec::with_capacity(items.len());
        for item in items {
            match item.value {
                Value::Text(base) => bases.push((base, item.origin)),
                other => {
                    let message = format!("must be a list of files, and here is {other}");
                    self.complain(Some(&item.origin), message, "write toml_files = [\"base.toml\"]");
                }
            }
        }
        bases
    }

    fn complain(&mut self, origin: Option<&Origin>, message: String, mend: &str) {
        let key = if origin.is_some() { BASES } else { "" };
        self.findings.push(Finding {
            key: key.to_owned(),
            origin: origin.cloned(),
            message,
            mend: Some(mend.to_owned()),
        });
    }
}
