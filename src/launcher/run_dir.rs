//! The folder of one run: only its owner may enter, and it goes with the run. It holds the run's secret.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::security::{Secret, SecretError};

/// Why a run has no folder.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    #[error("cannot make the run's private folder {path}: {source}; set TMPDIR to a folder that you may write to")]
    Make { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Secret(#[from] SecretError),
}

/// The folder; removed with all that is in it when dropped. After `kill -9` the guards remove it.
pub struct RunDir {
    path: PathBuf,
    secret: Secret,
}

impl RunDir {
    /// Makes the folder under `parent` and writes a fresh secret into it.
    pub fn create(parent: &Path) -> Result<Self, RunDirError> {
        let secret = Secret::generate()?;
        let path = parent.join(format!("pdlink-{}-{:08x}", std::process::id(), rand::random::<u32>()));
        // Fails if it exists: a folder that somebody else made first is never used.
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.map_err(|source| RunDirError::Make { path: path.clone(), source })?;
        let run_dir = Self { path, secret };
        run_dir.secret.write_file(&run_dir.secret_file())?;
        Ok(run_dir)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn secret(&self) -> &Secret {
        &self.secret
    }

    pub fn secret_file(&self) -> PathBuf {
        self.path.join("secret")
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn only_the_owner_enters_and_it_goes_with_the_run() {
        let parent = tempfile::tempdir().expect("folder");
        let run_dir = RunDir::create(parent.path()).expect("create");
        let mode = |path: &Path| std::fs::metadata(path).expect("metadata").permissions().mode() & 0o777;
        assert_eq!((mode(run_dir.path()), mode(&run_dir.secret_file())), (0o700, 0o600));
        assert_eq!(&Secret::read_file(&run_dir.secret_file()).expect("read"), run_dir.secret());
        let path = run_dir.path().to_owned();
        drop(run_dir);
        assert!(!path.exists());
    }
}
