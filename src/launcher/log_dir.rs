//! The folder of a run's logs: no other launcher writes to it while this one lives.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

/// The file in the folder that is locked. It stays when the run ends: the lock is what counts, and ends with its process.
const LOCK_FILE: &str = ".lock";

/// Why a run has no folder for its logs.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {folder} for logs: {source}; set `launcher.log_dir` to a folder that you may write to")]
pub struct LogDirError {
    folder: PathBuf,
    source: io::Error,
}

/// A folder for logs, held until dropped.
#[derive(Debug)]
pub struct LogDir {
    path: PathBuf,
    is_own: bool,
    /// None where the file system has no locks.
    _lock: Option<File>,
}

impl LogDir {
    /// Takes `folder`, or a folder of this process in it while another launcher lives that has it.
    pub fn take(folder: &Path) -> Result<Self, LogDirError> {
        let fail = |folder: &Path| {
            let folder = folder.to_owned();
            move |source| LogDirError { folder, source }
        };
        if let Some(taken) = Self::try_take(folder, false).map_err(fail(folder))? {
            return Ok(taken);
        }
        // A process of the same number may have it: one in another container, or another run of this process.
        let process = std::process::id();
        for number in 0_u32.. {
            let name = if number == 0 { process.to_string() } else { format!("{process}-{number}") };
            let own = folder.join(name);
            if let Some(taken) = Self::try_take(&own, true).map_err(fail(&own))? {
                return Ok(taken);
            }
        }
        Err(fail(folder)(io::Error::other("every name in it is taken")))
    }

    /// `None` if another launcher has it.
    fn try_take(path: &Path, is_own: bool) -> io::Result<Option<Self>> {
        std::fs::create_dir_all(path)?;
        let file = OpenOptions::new().create(true).append(true).open(path.join(LOCK_FILE))?;
        let lock = match file.try_lock() {
            Ok(()) => Some(file),
            Err(TryLockError::WouldBlock) => return Ok(None),
            // Some network file systems have no locks. Logs there are worth more than the certainty.
            Err(TryLockError::Error(_)) => None,
        };
        Ok(Some(Self { path: path.to_owned(), is_own, _lock: lock }))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether this is a folder of this process alone, since another launcher has the one that was asked for.
    pub fn is_own(&self) -> bool {
        self.is_own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_is_taken_is_left_alone_and_one_that_is_free_again_is_used() {
        let parent = tempfile::tempdir().expect("folder");
        let folder = parent.path().join("deep/logs");
        let take = || LogDir::take(&folder).expect("a folder");
        let (first, second, third) = (take(), take(), take());
        assert_eq!((first.path(), first.is_own()), (folder.as_path(), false));
        assert_eq!(second.path(), folder.join(std::process::id().to_string()));
        assert!(second.is_own() && third.is_own() && third.path() != second.path());
        drop(first);
        assert_eq!(take().path(), folder);
    }
}
