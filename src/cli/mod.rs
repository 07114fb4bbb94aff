//! The command line: one file per subcommand.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;

/// Runs one command and says how it ended: 0 done, 1 failed at run time, 2 the configuration or command line is wrong.
pub fn main(_args: impl IntoIterator<Item = OsString>) -> ExitCode {
    ExitCode::from(2)
}
