//! The process between the launcher and one worker: it ends the worker's whole tree when the launcher goes, however it goes.
//!
//! ```text
//! launcher ──stdin: lifeline──► guard ──► worker ──► its children, in whatever session
//!          ◄─stdout: reports──┘   └ stderr: the worker's log (the worker's stdout and stderr)
//! ```
//!
//! The lifeline is a pipe. `t` on it asks for an orderly end, `k` for an end at once; its end of file means that the
//! launcher is gone and counts as `t`, and cannot be missed: the kernel closes it even after `kill -9`. The guard is the
//! reaper of all its descendants, also of those that changed session, and it leaves only when none is left. If the guard
//! itself is killed, the worker goes with it (`PR_SET_PDEATHSIG`), and the launcher sweeps what the worker leaves.
//!
//! The parent-death signal is not asked for the guard itself: it is bound to the launcher's *thread* that started it, and
//! threads of a runtime come and go. It is safe for the worker, since a guard has one thread that starts processes.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::signal::unix::{Signal as Caught, SignalKind, signal};
use tokio::time::{Instant, sleep_until};

use super::exit::{Exit, to_wire};
use super::tree;

/// How long the worker's leftover children get between `SIGTERM` and `SIGKILL`.
const LEFTOVER_GRACE: Duration = Duration::from_millis(500);

/// How often the tree is looked at while it is being ended.
const SWEEP_EVERY: Duration = Duration::from_millis(10);

/// How long a tree may resist `SIGKILL` (uninterruptible in the kernel) before the guard leaves it to the system.
const KILL_PATIENCE: Duration = Duration::from_secs(30);

/// What a guard is told on its command line.
#[derive(Debug, Clone)]
pub struct GuardOptions {
    /// Time between `SIGTERM` and `SIGKILL`.
    pub grace: Duration,
    /// Removed once the tree has ended without a launcher: it holds the run's secret.
    pub run_dir: Option<PathBuf>,
    /// The worker.
    pub command: Vec<OsString>,
}

/// Why a guard could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    #[error("a guard is started by `pdlink up`, which keeps a pipe on its standard input: {0}")]
    NoLifeline(io::Error),
    #[error("guard: {what} failed: {source}")]
    Os { what: &'static str, source: io::Error },
    #[error("guard: no command to run")]
    NoCommand,
    #[error("cannot run {program}: {source}")]
    Exec { program: String, source: io::Error },
    #[error("the guard that started this process is gone")]
    Orphaned,
}

fn os(what: &'static str) -> impl Fn(rustix::io::Errno) -> GuardError {
    move |errno| GuardError::Os { what, source: errno.into() }
}

/// Runs the worker and stays until its tree has ended. The result is how the worker itself ended.
pub fn run(options: &GuardOptions) -> Result<Exit, GuardError> {
    rustix::process::setsid().map_err(os("setsid"))?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(os("becoming the tree's reaper"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|source| GuardError::Os { what: "starting the event loop", source })?;
    runtime.block_on(async {
        let mut guard = Guard::start(options)?;
        let exit = guard.watch().await;
        report(&format!("exited {}", to_wire(&exit)));
        Ok(exit)
    })
}

/// Becomes the worker: asks to die with the guard, then replaces this process.
pub fn become_worker(guard_pid: u32, command: &[OsString]) -> Result<std::convert::Infallible, GuardError> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(os("PR_SET_PDEATHSIG"))?;
    // The guard may have ended before the signal was asked for.
    let parent = rustix::process::getppid().map(Pid::as_raw_pid);
    if parent.and_then(|pid| u32::try_from(pid).ok()) != Some(guard_pid) {
        return Err(GuardError::Orphaned);
    }
    let (program, args) = command.split_first().ok_or(GuardError::NoCommand)?;
    let source = Command::new(program).args(args).exec();
    Err(GuardError::Exec { program: program.to_string_lossy().into_owned(), source })
}

/// One line to the launcher. A launcher that is gone does not read it.
fn report(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

/// How far the end of the tree has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// The worker was asked to end; at the instant the tree is killed.
    Asked(Instant),
    /// The worker has ended; its leftovers were asked, and are killed at the instant.
    Leftovers(Instant),
    /// Everything is killed until nothing is left, or until the instant.
    Killing(Instant),
}

struct Guard<'a> {
    options: &'a GuardOptions,
    lifeline: pipe::Receiver,
    lifeline_open: bool,
    launcher_gone: bool,
    child_ended: Caught,
    asked: [Caught; 3],
    worker: Pid,
    exit: Option<Exit>,
    phase: Phase,
}

enum Wake {
    Lifeline(Option<u8>),
    ChildEnded,
    Asked,
    Time,
}

impl<'a> Guard<'a> {
    fn start(options: &'a GuardOptions) -> Result<Self, GuardError> {
        let lifeline = io::stdin().as_fd().try_clone_to_owned().map_err(GuardError::NoLifeline)?;
        let lifeline = pipe::Receiver::from_owned_fd(lifeline).map_err(GuardError::NoLifeline)?;
        let catch = |kind| signal(kind).map_err(|source| GuardError::Os { what: "catching signals", source });
        let child_ended = catch(SignalKind::child())?;
        let asked = [catch(SignalKind::terminate())?, catch(SignalKind::interrupt())?, catch(SignalKind::hangup())?];
        let worker = spawn_worker(&options.command)?;
        report(&format!("started {}", worker.as_raw_pid()));
        Ok(Self {
            options,
            lifeline,
            lifeline_open: true,
            launcher_gone: false,
            child_ended,
            asked,
            worker,
            exit: None,
            phase: Phase::Running,
        })
    }

    async fn watch(&mut self) -> Exit {
        loop {
            self.reap();
            if self.advance(Instant::now()) {
                break;
            }
            match self.wake().await {
                Wake::Lifeline(Some(b'k')) => self.kill(Instant::now()),
                Wake::Lifeline(Some(_)) | Wake::Asked => self.ask(Instant::now()),
                Wake::Lifeline(None) => {
                    (self.lifeline_open, self.launcher_gone) = (false, true);
                    self.ask(Instant::now());
                }
                Wake::ChildEnded | Wake::Time => {}
            }
        }
        // With nothing alive below, whoever ended since the last look is our own child; left alone it would stay a zombie of
        // the launcher for as long as that runs.
        self.reap();
        if let (true, Some(run_dir)) = (self.launcher_gone, &self.options.run_dir) {
            let _ = std::fs::remove_dir_all(run_dir);
        }
        self.exit.clone().unwrap_or(Exit::Signal(libc::SIGKILL))
    }

    async fn wake(&mut self) -> Wake {
        let until = match self.phase {
            Phase::Running => None,
            Phase::Asked(until) => Some(until),
            Phase::Leftovers(_) | Phase::Killing(_) => Some(Instant::now() + SWEEP_EVERY),
        };
        let [terminate, interrupt, hangup] = &mut self.asked;
        let mut byte = [0_u8];
        tokio::select! {
            read = self.lifeline.read(&mut byte), if self.lifeline_open => {
                Wake::Lifeline(read.ok().filter(|count| *count > 0).map(|_| byte[0]))
            }
            _ = self.child_ended.recv() => Wake::ChildEnded,
            _ = terminate.recv() => Wake::Asked,
            _ = interrupt.recv() => Wake::Asked,
            _ = hangup.recv() => Wake::Asked,
            () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => Wake::Time,
        }
    }

    fn ask(&mut self, now: Instant) {
        if self.phase == Phase::Running {
            tree::signal_all(&[self.worker], Signal::TERM);
            self.phase = Phase::Asked(now + self.options.grace);
        }
    }

    fn kill(&mut self, now: Instant) {
        if !matches!(self.phase, Phase::Killing(_)) {
            self.phase = Phase::Killing(now + KILL_PATIENCE);
        }
    }

    /// Moves the end on; true when nothing is left to do.
    fn advance(&mut self, now: Instant) -> bool {
        match self.phase {
            Phase::Running | Phase::Asked(_) if self.exit.is_some() => {
                let left = self.left();
                tree::signal_all(&left, Signal::TERM);
                self.phase = Phase::Leftovers(now + LEFTOVER_GRACE);
                left.is_empty()
            }
            Phase::Asked(until) | Phase::Leftovers(until) if now >= until => {
                self.kill(now);
                self.advance(now)
            }
            Phase::Running | Phase::Asked(_) => false,
            Phase::Leftovers(_) => self.left().is_empty(),
            Phase::Killing(until) => {
                let left = self.left();
                tree::signal_all(&left, Signal::KILL);
                left.is_empty() || now >= until
            }
        }
    }

    fn left(&self) -> Vec<Pid> {
        tree::descendants(rustix::process::getpid())
    }

    /// Takes the status of every child that has ended: the worker's, and those of orphans that became ours.
    fn reap(&mut self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            if pid == self.worker {
                self.exit = Some(exit_of(status));
            }
        }
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Signal(libc::SIGKILL),
    }
}

/// Starts ourselves once more as the process that becomes the worker.
fn spawn_worker(command: &[OsString]) -> Result<Pid, GuardError> {
    let failed = |source| GuardError::Os { what: "starting the worker", source };
    let log = || io::stderr().as_fd().try_clone_to_owned().map(Stdio::from).map_err(failed);
    let child = Command::new(std::env::current_exe().map_err(failed)?)
        .args(["guard", "--become", &std::process::id().to_string(), "--"])
        .args(command)
        .stdin(Stdio::null())
        .stdout(log()?)
        .stderr(log()?)
        .spawn()
        .map_err(failed)?;
    // Never waited for through the handle: `reap` takes every child's status.
    Ok(Pid::from_child(&child))
}
