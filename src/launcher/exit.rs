//! How a process ended, in words.

use std::fmt;
use std::str::FromStr;

/// How a worker ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It returned this status.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// Its guard was ended from outside, and the worker with it.
    GuardLost,
    /// It could not be started at all.
    NotStarted(String),
}

impl Exit {
    /// The status a shell would show.
    pub fn shell_status(&self) -> u8 {
        let status = match self {
            Self::Code(code) => *code,
            Self::Signal(signal) => 128 + *signal,
            Self::GuardLost | Self::NotStarted(_) => 127,
        };
        u8::try_from(status & 0xff).unwrap_or(1)
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "ended with status {code}"),
            Self::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "was ended by signal {signal} ({name})"),
                None => write!(f, "was ended by signal {signal}"),
            },
            Self::GuardLost => write!(f, "was ended together with its guard process"),
            Self::NotStarted(why) => write!(f, "could not be started: {why}"),
        }
    }
}

/// The form in which a guard reports it: `code 3`, `signal 9`.
pub fn to_wire(exit: &Exit) -> String {
    match exit {
        Exit::Code(code) => format!("code {code}"),
        Exit::Signal(signal) => format!("signal {signal}"),
        Exit::GuardLost | Exit::NotStarted(_) => "lost".to_owned(),
    }
}

/// Reads what [`to_wire`] wrote.
pub fn from_wire(text: &str) -> Option<Exit> {
    let (kind, number) = text.split_once(' ')?;
    let number = i32::from_str(number).ok()?;
    match kind {
        "code" => Some(Exit::Code(number)),
        "signal" => Some(Exit::Signal(number)),
        _ => None,
    }
}

fn signal_name(signal: i32) -> Option<&'static str> {
    Some(match signal {
        libc::SIGHUP => "SIGHUP",
        libc::SIGINT => "SIGINT",
        libc::SIGQUIT => "SIGQUIT",
        libc::SIGILL => "SIGILL",
        libc::SIGTRAP => "SIGTRAP",
        libc::SIGABRT => "SIGABRT",
        libc::SIGBUS => "SIGBUS",
        libc::SIGFPE => "SIGFPE",
        libc::SIGKILL => "SIGKILL",
        libc::SIGSEGV => "SIGSEGV",
        libc::SIGPIPE => "SIGPIPE",
        libc::SIGALRM => "SIGALRM",
        libc::SIGTERM => "SIGTERM",
        libc::SIGXCPU => "SIGXCPU",
        libc::SIGSYS => "SIGSYS",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exit_survives_the_wire_and_reads_well() {
        let cases = [
            (Exit::Code(0), "ended with status 0", 0),
            (Exit::Code(3), "ended with status 3", 3),
            (Exit::Signal(9), "was ended by signal 9 (SIGKILL)", 137),
            (Exit::Signal(50), "was ended by signal 50", 178),
        ];
        for (exit, text, status) in cases {
            assert_eq!(from_wire(&to_wire(&exit)), Some(exit.clone()));
            assert_eq!((exit.to_string().as_str(), exit.shell_status()), (text, status));
        }
        assert_eq!(from_wire(&to_wire(&Exit::GuardLost)), None);
    }
}
