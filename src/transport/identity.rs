//! Which process this is, so that nobody else is ever taken for it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use crate::config::HOST_ENV;

/// One process of one boot of one host. A process id alone is reused; with its start time it is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Identity {
    /// The kernel's random id of this boot differs between any two hosts; with it, what the run calls this host.
    boot: String,
    /// Inode of the process id namespace: in another one our `pid` means somebody else.
    pid_namespace: u64,
    pub(super) pid: i32,
    /// Clock ticks since boot.
    start_time: u64,
}

/// Whether a peer can be reached through the kernel.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reach {
    Here,
    OtherHost,
    OtherNamespace,
    Gone,
}

impl Identity {
    pub(super) fn of_self() -> io::Result<Self> {
        Self::of(i32::try_from(std::process::id()).map_err(io::Error::other)?)
    }

    /// Another process of our process id namespace.
    pub(super) fn of(pid: i32) -> io::Result<Self> {
        Ok(Self {
            boot: boot()?,
            pid_namespace: fs::metadata("/proc/self/ns/pid")?.ino(),
            pid,
            start_time: start_time(pid)?,
        })
    }

    /// Where this process is, seen from here. Ask again once a descriptor of it is held: that one stays the same process.
    pub(super) fn reach(&self) -> io::Result<Reach> {
        let here = Self::of_self()?;
        if self.boot != here.boot {
            return Ok(Reach::OtherHost);
        }
        if self.pid_namespace != here.pid_namespace {
            return Ok(Reach::OtherNamespace);
        }
        match start_time(self.pid) {
            Ok(start_time) if start_time == self.start_time => Ok(Reach::Here),
            Ok(_) => Ok(Reach::Gone),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Reach::Gone),
            // The process ended between opening the file and reading it.
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(Reach::Gone),
            Err(error) => Err(error),
        }
    }
}

/// The boot, and the host as the run names it, if it does: two that are named as different hosts share nothing.
fn boot() -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let named = std::env::var(HOST_ENV).unwrap_or_default();
    Ok(format!("{} {named}", boot.trim()).trim_end().to_owned())
}

/// When a process started, in clock ticks since boot.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

/// Field 22. The second field is the command in parentheses, which may hold anything, so counting starts behind its last.
fn parse_start_time(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_command_name() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(parse_start_time(stat), Some(4242));
        assert_eq!(parse_start_time("7 (x) S 1"), None);
    }

    #[test]
    fn another_boot_namespace_or_start_time_is_another_process() {
        let here = Identity::of_self().unwrap();
        assert_eq!(here.reach().unwrap(), Reach::Here);
        let with = |change: fn(&mut Identity)| {
            let mut other = here.clone();
            change(&mut other);
            other.reach().unwrap()
        };
        assert_eq!(with(|other| other.boot.push('x')), Reach::OtherHost);
        assert_eq!(with(|other| other.pid_namespace += 1), Reach::OtherNamespace);
        assert_eq!(with(|other| other.start_time += 1), Reach::Gone);
        assert_eq!(with(|other| other.pid = i32::MAX), Reach::Gone);
    }
}
