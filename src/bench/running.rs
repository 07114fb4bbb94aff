//! A process of a scenario, with whatever it starts itself: ended when dropped.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, ensure};

/// A running process, in a group of its own.
pub(super) struct Running {
    child: Child,
    lines: Option<BufReader<ChildStdout>>,
}

impl Running {
    /// Starts this program again, as one part of the scenario, whose output is read line by line.
    pub(super) fn part(args: &[impl AsRef<std::ffi::OsStr>]) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        Self::start(Command::new(program).args(args).stdout(Stdio::piped()))
            .context("cannot start a part of the scenario")
    }

    pub(super) fn start(command: &mut Command) -> anyhow::Result<Self> {
        let mut child = command.stdin(Stdio::null()).stderr(Stdio::null()).process_group(0).spawn()?;
        let lines = child.stdout.take().map(BufReader::new);
        Ok(Self { child, lines })
    }

    /// The next line that it says.
    pub(super) fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        self.lines.as_mut().context("its output is not read")?.read_line(&mut line)?;
        ensure!(!line.is_empty(), "a part of the scenario ended before it said anything");
        Ok(line.trim().to_owned())
    }

    pub(super) fn pid(&self) -> anyhow::Result<i32> {
        Ok(i32::try_from(self.child.id())?)
    }

    /// How it ended, if it did.
    pub(super) fn ended(&mut self) -> anyhow::Result<Option<std::process::ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(group) = self.pid().ok().and_then(rustix::process::Pid::from_raw) {
            // Gone already is as good.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.child.wait();
    }
}
