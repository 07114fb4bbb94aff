//! The launcher's end of a guard: starts it, hears its reports, asks it to end the worker.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::exit::{Exit, from_wire};
use super::tree;

/// How often strays are looked for, and how many times before the rest is left to the system.
const SWEEP_EVERY: Duration = Duration::from_millis(20);
const SWEEPS_MAX: u32 = 100;

/// How a guard is started.
#[derive(Debug, Clone)]
pub struct GuardSetup {
    /// Our own program.
    pub program: PathBuf,
    /// Time between `SIGTERM` and `SIGKILL`.
    pub grace: Duration,
    /// Removed by the guard if the launcher goes without a word.
    pub run_dir: Option<PathBuf>,
}

/// What a guard says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuardReport {
    /// The worker runs with this process id.
    Started { pid: u32 },
    /// The worker and all its descendants have ended.
    Exited(Exit),
}

/// The guards of one launcher, by process id: who is not among them and yet our child is a stray.
#[derive(Debug, Clone, Default)]
pub struct Guards {
    pids: Arc<Mutex<BTreeSet<i32>>>,
    /// Set once this process adopts orphans; only then are strays looked for.
    adopts: bool,
}

impl Guards {
    /// Makes this process adopt what a killed guard leaves behind, so that it can be ended. Meant for a process that
    /// starts nothing but guards.
    pub fn adopting() -> io::Result<Self> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        Ok(Self { adopts: true, ..Self::default() })
    }

    fn pids(&self) -> MutexGuard<'_, BTreeSet<i32>> {
        self.pids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends every descendant that belongs to no guard.
    async fn sweep(&self) {
        for _ in 0..SWEEPS_MAX {
            if !self.adopts || self.kill_strays() == 0 {
                return;
            }
            tokio::time::sleep(SWEEP_EVERY).await;
        }
    }

    /// Under the lock, so that a guard that is just being started is not taken for a stray.
    fn kill_strays(&self) -> usize {
        let guards = self.pids();
        let strays: Vec<Pid> = tree::children(rustix::process::getpid())
            .into_iter()
            .filter(|pid| !guards.contains(&pid.as_raw_pid()))
            .collect();
        for stray in &strays {
            tree::signal_all(&tree::descendants(*stray), Signal::KILL);
            tree::signal_all(&[*stray], Signal::KILL);
            let _ = waitpid(Some(*stray), WaitOptions::NOHANG);
        }
        strays.len()
    }
}

/// A worker under its guard. Dropping it ends the worker in order: the guard sees its lifeline end.
pub struct Guarded {
    guard: Child,
    lifeline: ChildStdin,
    reports: Lines<BufReader<ChildStdout>>,
    exit: Option<Exit>,
    pid: i32,
    guards: Guards,
}

impl Guarded {
    /// Starts `command` with `env` added to our environment; its output goes to `log`.
    pub fn spawn(
        setup: &GuardSetup,
        guards: &Guards,
        command: &[String],
        env: &BTreeMap<String, String>,
        log: File,
    ) -> io::Result<Self> {
        let mut guard = guard_command(setup);
        guard.arg("--").args(command).envs(env).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let (mut guard, pid) = {
            let mut pids = guards.pids();
            let guard = guard.spawn()?;
            let pid = guard.id().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(ended_at_once)?;
            pids.insert(pid);
            (guard, pid)
        };
        let lifeline = guard.stdin.take().ok_or_else(ended_at_once)?;
        let reports = BufReader::new(guard.stdout.take().ok_or_else(ended_at_once)?).lines();
        Ok(Self { guard, lifeline, reports, exit: None, pid, guards: guards.clone() })
    }

    /// The next report. After [`GuardReport::Exited`] there is none. Safe to cancel.
    pub async fn report(&mut self) -> GuardReport {
        while let Ok(Some(line)) = self.reports.next_line().await {
            match line.split_once(' ') {
                Some(("started", pid)) => return GuardReport::Started { pid: pid.parse().unwrap_or(0) },
                Some(("exited", how)) => self.exit = from_wire(how),
                _ => tracing::debug!(line, "a guard said something unknown"),
            }
        }
        let _ = self.guard.wait().await;
        self.guards.pids().remove(&self.pid);
        match self.exit.take() {
            Some(exit) => GuardReport::Exited(exit),
            None => {
                self.guards.sweep().await;
                GuardReport::Exited(Exit::GuardLost)
            }
        }
    }

    /// Asks the worker to end; it is killed after the grace period.
    pub async fn terminate(&mut self) {
        self.ask(b"t").await;
    }

    /// Kills the worker's tree.
    pub async fn kill(&mut self) {
        self.ask(b"k").await;
    }

    /// A guard that is gone reads nothing, and [`Self::report`] says so.
    async fn ask(&mut self, what: &[u8]) {
        let _ = self.lifeline.write_all(what).await;
        let _ = self.lifeline.flush().await;
    }
}

fn guard_command(setup: &GuardSetup) -> Command {
    let mut command = Command::new(&setup.program);
    command.arg("guard").arg("--grace-ms").arg(setup.grace.as_millis().to_string());
    if let Some(run_dir) = setup.run_dir.as_deref().map(Path::as_os_str) {
        command.arg("--run-dir").arg(run_dir);
    }
    command
}

fn ended_at_once() -> io::Error {
    io::Error::other("the guard process ended at once")
}
