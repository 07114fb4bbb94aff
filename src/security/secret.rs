//! One secret per run: made once, kept in a file that only its owner reads, shown nowhere.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rand::TryRngCore;
use rand::rngs::OsRng;

/// Names the secret's file to a child process. The secret itself is never in an environment or an argument.
pub const SECRET_FILE_ENV: &str = "PDLINK_SECRET_FILE";

const SECRET_BYTES: usize = 32;

/// What programs started by hand, without a secret file, share. It proves nothing, so only loopback listeners take it.
const LOOPBACK: &[u8; SECRET_BYTES] = b"pdlink: loopback listeners only!";

/// The run's shared secret: 256 bits from the kernel.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; SECRET_BYTES]);

/// Why a secret could not be made, read, written or used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("cannot read the secret file {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write the secret file {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "the secret file {} can be read by others (mode {mode:03o}); run `chmod 600` on it and make a new secret",
        path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("the secret file {} does not hold 64 hex digits; let `pdlink up` write it", path.display())]
    Malformed { path: PathBuf },
    #[error("the kernel gave no random bytes: {detail}")]
    NoRandomness { detail: String },
    #[error(
        "no secret file was given, and {address} is not loopback: pass --secret-file or set {SECRET_FILE_ENV}, or listen on 127.0.0.1"
    )]
    NotLoopback { address: IpAddr },
}

impl Secret {
    /// Draws a new secret from the kernel.
    pub fn generate() -> Result<Self, SecretError> {
        let mut bytes = [0; SECRET_BYTES];
        OsRng.try_fill_bytes(&mut bytes).map_err(|error| SecretError::NoRandomness { detail: error.to_string() })?;
        Ok(Self(bytes))
    }

    /// Reads a secret that [`Secret::write_file`] wrote. A file that group or others may read is refused: whoever read
    /// it already can join the run.
    pub fn read_file(path: &Path) -> Result<Self, SecretError> {
        let failed = |source| SecretError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(SecretError::Exposed { path: path.to_owned(), mode });
        }
        let mut text = String::new();
        // One byte more than is right, so that a longer file is seen to be longer.
        let limit = u64::try_from(SECRET_BYTES * 2 + 2).unwrap_or(u64::MAX);
        file.take(limit).read_to_string(&mut text).map_err(failed)?;
        let mut bytes = [0; SECRET_BYTES];
        let read = hex::decode_to_slice(text.trim_end(), &mut bytes);
        read.map(|()| Self(bytes)).map_err(|_| SecretError::Malformed { path: path.to_owned() })
    }

    /// Writes the secret as hex into a new file of mode 0600. An existing file is an error, never overwritten.
    pub fn write_file(&self, path: &Path) -> Result<(), SecretError> {
        let failed = |source| SecretError::Write { path: path.to_owned(), source };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(failed)?;
        let text = format!("{}\n", hex::encode(self.0));
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)
    }

    /// The well-known secret of programs started by hand without one. See [`Secret::allowed_on`].
    pub fn loopback() -> Self {
        Self(*LOOPBACK)
    }

    /// Whether this is the well-known secret.
    pub fn is_loopback(&self) -> bool {
        self.0 == *LOOPBACK
    }

    /// Refuses the well-known secret for a listener that other hosts can reach.
    pub fn allowed_on(&self, address: IpAddr) -> Result<(), SecretError> {
        if self.is_loopback() && !address.is_loopback() {
            return Err(SecretError::NotLoopback { address });
        }
        Ok(())
    }

    /// The key itself, for keyed hashes made elsewhere in this crate.
    pub(crate) fn bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_written_secret_is_read_back_and_only_its_owner_may_read_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        let secret = Secret::generate().unwrap();
        secret.write_file(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Secret::read_file(&path).unwrap(), secret);
        assert!(
            matches!(secret.write_file(&path), Err(SecretError::Write { .. })),
            "a second write must not overwrite"
        );
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        Secret::generate().unwrap().write_file(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(Secret::read_file(&path), Err(SecretError::Exposed { mode: 0o640, .. })));
    }

    #[test]
    fn malformed_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let cases = ["", "zz", &"0".repeat(63), &"0".repeat(65), &"g".repeat(64), &format!("{}\nmore", "0".repeat(64))];
        for (index, text) in cases.iter().enumerate() {
            let path = folder.path().join(index.to_string());
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
            file.write_all(text.as_bytes()).unwrap();
            assert!(matches!(Secret::read_file(&path), Err(SecretError::Malformed { .. })), "case {index}: {text:?}");
        }
    }

    #[test]
    fn debug_shows_nothing_of_it() {
        assert_eq!(format!("{:?}", Secret::loopback()), "Secret(..)");
    }

    #[test]
    fn the_well_known_secret_is_for_loopback_listeners_only() {
        let (here, everywhere) = ("127.0.0.1".parse().unwrap(), "0.0.0.0".parse().unwrap());
        assert!(Secret::loopback().allowed_on(here).is_ok());
        assert!(matches!(Secret::loopback().allowed_on(everywhere), Err(SecretError::NotLoopback { .. })));
        assert!(Secret::generate().unwrap().allowed_on(everywhere).is_ok());
    }
}
