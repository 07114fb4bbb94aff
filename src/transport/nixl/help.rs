//! How a process asks another of its host to pack or unpack: a socket, whose messages name runs and hold none of their bytes.
//!
//! The socket's name and a word that must be said first are in what a peer exports, which travels over the connection that kv
//! has authenticated. The kernel vouches for the user at the other end.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::staging::Part;
use crate::transport::GrantToken;

/// Looks before a listener goes to sleep: who asks often is answered at once.
const BUSY_ROUNDS: u32 = 50;
/// Longest message: what the kernel takes in one by default.
const MESSAGE_BYTES_MAX: usize = 192 << 10;

/// What is asked. Runs are in the regions of whoever is asked.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ask {
    Hello {
        word: [u8; 16],
    },
    /// Copy these runs into a slot that was lent.
    Gather {
        slot: u16,
        parts: Vec<Part>,
    },
    /// Copy a slot that was lent out into these runs, which the grant must cover.
    Scatter {
        slot: u16,
        grant: Option<GrantToken>,
        parts: Vec<Part>,
    },
    /// Nothing of ours will be written into the slots any more.
    Bye,
}

/// What is answered. Every message but the goodbye has one answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Answer {
    /// These slots are lent.
    Lent {
        slots: Vec<u16>,
    },
    Done {
        slot: u16,
    },
    /// A run is not granted, or not any more. What was asked may have been done in part.
    NotGranted {
        slot: u16,
        region: u16,
        offset: u64,
        len: u64,
    },
}

/// A name in the kernel's own space of names, which goes with the socket.
fn address(name: &[u8]) -> io::Result<SocketAddrUnix> {
    Ok(SocketAddrUnix::new_abstract_name(name)?)
}

fn socket() -> io::Result<OwnedFd> {
    Ok(net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

pub(super) fn listen(name: &[u8], backlog: i32) -> io::Result<OwnedFd> {
    let listener = socket()?;
    net::bind(&listener, &address(name)?)?;
    net::listen(&listener, backlog)?;
    Ok(listener)
}

/// One end of a connection. Its other end hears when it is dropped.
pub(super) struct Wire(OwnedFd);

impl Wire {
    /// Does not wait: a peer that accepts nothing is refused by the kernel, or answers nothing.
    pub(super) fn connect(name: &[u8]) -> io::Result<Self> {
        let socket = net::socket_with(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        net::connect(&socket, &address(name)?)?;
        rustix::io::ioctl_fionbio(&socket, false)?;
        Ok(Self(socket))
    }

    /// Waits for a peer of the same user. `None`: the listener was shut down.
    pub(super) fn accept(listener: &OwnedFd) -> Option<Self> {
        loop {
            let socket = match net::accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(socket) => socket,
                Err(Errno::INTR | Errno::CONNABORTED | Errno::AGAIN) => continue,
                Err(_) => return None,
            };
            let same = net::sockopt::socket_peercred(&socket).is_ok_and(|peer| peer.uid == rustix::process::geteuid());
            if same {
                return Some(Self(socket));
            }
        }
    }

    /// Ends every wait, at both ends.
    pub(super) fn shut(&self) {
        let _ = net::shutdown(&self.0, Shutdown::Both);
    }

    /// Sends one message, waiting for room.
    pub(super) fn tell(&self, message: &impl Serialize) -> io::Result<()> {
        self.send(&encode(message)?, SendFlags::NOSIGNAL)
    }

    fn send(&self, bytes: &[u8], flags: SendFlags) -> io::Result<()> {
        loop {
            match net::send(&self.0, bytes, flags) {
                Err(Errno::INTR) => {}
                sent => return Ok(sent.map(drop)?),
            }
        }
    }

    /// Waits for a message, first awake and then asleep. `None`: the other end is gone, or this one was shut.
    pub(super) fn hear<T: DeserializeOwned>(&self, buffer: &mut Vec<u8>) -> io::Result<Option<T>> {
        for _ in 0..BUSY_ROUNDS {
            match self.listen(buffer, RecvFlags::DONTWAIT)? {
                Heard::Nothing => std::thread::yield_now(),
                Heard::Message(message) => return Ok(Some(message)),
                Heard::End => return Ok(None),
            }
        }
        match self.listen(buffer, RecvFlags::empty())? {
            Heard::Message(message) => Ok(Some(message)),
            Heard::Nothing | Heard::End => Ok(None),
        }
    }

    fn listen<T: DeserializeOwned>(&self, buffer: &mut Vec<u8>, flags: RecvFlags) -> io::Result<Heard<T>> {
        buffer.resize(MESSAGE_BYTES_MAX, 0);
        let (_, len) = loop {
            match net::recv(&self.0, &mut buffer[..], RecvFlags::TRUNC | flags) {
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Heard::Nothing),
                Err(Errno::CONNRESET) => return Ok(Heard::End),
                heard => break heard?,
            }
        };
        if len == 0 {
            return Ok(Heard::End);
        }
        let message = buffer.get(..len).ok_or_else(|| io::Error::other(format!("a message of {len} bytes")))?;
        postcard::from_bytes(message).map(Heard::Message).map_err(io::Error::other)
    }
}

/// What a look at a socket came to.
pub(super) enum Heard<T> {
    Nothing,
    Message(T),
    End,
}

fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    if bytes.len() > MESSAGE_BYTES_MAX {
        return Err(io::Error::other(format!("a message of {} bytes is too long", bytes.len())));
    }
    Ok(bytes)
}

/// Asks and hears without ever waiting: the driver does, who serves other peers too.
pub(super) struct Asker {
    wire: Wire,
    buffer: Vec<u8>,
    /// What the socket has no room for yet, in order.
    unsent: VecDeque<Vec<u8>>,
}

impl Asker {
    pub(super) fn over(wire: Wire) -> Self {
        Self { wire, buffer: Vec::new(), unsent: VecDeque::new() }
    }

    /// What has been answered meanwhile.
    pub(super) fn hear(&mut self) -> io::Result<Heard<Answer>> {
        self.wire.listen(&mut self.buffer, RecvFlags::DONTWAIT)
    }

    pub(super) fn ask(&mut self, ask: &Ask) -> io::Result<()> {
        self.unsent.push_back(encode(ask)?);
        self.flush()
    }

    /// Sends what there is room for.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while let Some(message) = self.unsent.front() {
            match self.wire.send(message, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(()) => drop(self.unsent.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_the_end_is_heard() {
        let name = format!("pdlink-test-{:032x}", rand::random::<u128>());
        let listener = listen(name.as_bytes(), 1).unwrap();
        let ours = Wire::connect(name.as_bytes()).unwrap();
        let theirs = Wire::accept(&listener).unwrap();
        let mut buffer = Vec::new();
        let runs = (0..8192).map(|index| (u64::from(u32::MAX) + index * 40_000, 16_384)).collect();
        let ask = Ask::Scatter { slot: 3, grant: Some(GrantToken([7; 16])), parts: vec![Part { region: 2, runs }] };
        let mut asker = Asker::over(ours);
        assert!(matches!(asker.hear(), Ok(Heard::Nothing)));
        asker.ask(&ask).unwrap();
        assert_eq!(theirs.hear::<Ask>(&mut buffer).unwrap(), Some(ask));
        theirs.tell(&Answer::Done { slot: 3 }).unwrap();
        assert!(matches!(asker.hear(), Ok(Heard::Message(Answer::Done { slot: 3 }))));
        let rubbish = theirs.send(&[0xFF; 40], SendFlags::NOSIGNAL);
        assert!(rubbish.is_ok() && asker.hear().is_err());
        drop(asker);
        assert_eq!(theirs.hear::<Ask>(&mut buffer).unwrap(), None);
        let ours = Wire::connect(name.as_bytes()).unwrap();
        let theirs = Wire::accept(&listener).unwrap();
        drop(theirs);
        assert!(matches!(Asker::over(ours).hear(), Ok(Heard::End)));
        drop(listener);
        assert!(Wire::connect(name.as_bytes()).is_err(), "the name goes with the socket");
    }
}
