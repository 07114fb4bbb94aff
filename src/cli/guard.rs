//! `pdlink guard`: the process between the launcher and one worker. Started by `pdlink up` alone.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::launcher::guard::{GuardOptions, become_worker, run as guard};

use super::Sources;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Time between SIGTERM and SIGKILL, in milliseconds.
    #[arg(long, default_value_t = 10_000)]
    grace_ms: u64,
    /// Folder of the run, removed if the launcher goes without a word.
    #[arg(long)]
    run_dir: Option<PathBuf>,
    /// Become the worker of the guard with this process id.
    #[arg(long = "become")]
    become_of: Option<u32>,
    /// The worker.
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

pub(super) fn run(args: Args, _sources: Sources) -> anyhow::Result<ExitCode> {
    if let Some(guard_pid) = args.become_of {
        match become_worker(guard_pid, &args.command)? {}
    }
    let options =
        GuardOptions { grace: Duration::from_millis(args.grace_ms), run_dir: args.run_dir, command: args.command };
    Ok(ExitCode::from(guard(&options)?.shell_status()))
}
