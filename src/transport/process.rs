//! A peer's process, held so that its number can never come to mean somebody else.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::TransportError;
use super::identity::{Identity, Reach};

/// A process of this host.
pub(super) struct Process {
    pid: i32,
    name: String,
    /// Stays this process however often its number is reused, and turns readable when it ends.
    pidfd: OwnedFd,
}

impl Process {
    /// Finds the process that `identity` means. `path` is whose need it is, for the error.
    pub(super) fn open(identity: &Identity, path: &'static str) -> Result<Self, TransportError> {
        let pid = identity.pid;
        let name = format!("process {pid}");
        let unreachable = |reason: String| TransportError::Unreachable { path, peer: name.clone(), reason };
        // The descriptor first, then the question whether that process is the one meant: so it cannot change in between.
        let number = (pid > 0).then(|| Pid::from_raw(pid)).flatten();
        let number = number.ok_or_else(|| unreachable("no process has that id".to_owned()))?;
        let pidfd = pidfd_open(number, PidfdFlags::empty());
        match identity.reach().map_err(|error| unreachable(error.to_string()))? {
            Reach::Here => {}
            Reach::OtherHost => {
                return Err(unreachable("it runs on another host; allow a path between hosts in kv.paths".to_owned()));
            }
            Reach::OtherNamespace => {
                let mend = "start both with one process id namespace (docker: --pid=host), or allow tcp in kv.paths";
                return Err(unreachable(format!("it runs in another process id namespace; {mend}")));
            }
            Reach::Gone => return Err(TransportError::PeerGone { peer: name }),
        }
        let pidfd = pidfd.map_err(|error| unreachable(format!("pidfd_open: {error}")))?;
        Ok(Self { pid, name, pidfd })
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Whether it is this very process.
    pub(super) fn is_this(&self) -> bool {
        u32::try_from(self.pid).is_ok_and(|pid| pid == std::process::id())
    }

    /// Whether the process has ended. Cannot be wrong about a reused process id.
    pub(super) fn gone(&self) -> bool {
        let mut ended = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut ended, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}
