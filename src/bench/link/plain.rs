//! Plain sockets with read and write loops: what the network does without us.

use std::io::{Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::PATIENCE;
use super::ceiling::FILL_BYTES;
use super::workload::noise;
use crate::memory::{to_u64, to_usize};
use crate::security::{NONCE_BYTES, Nonce, nonce};

/// How much one plain read or write asks for.
const PLAIN_BYTES: usize = 256 * 1024;
/// In an order: the bytes come from the caller, rather than go to it.
const GIVES: u64 = 1 << 63;

/// Where the sockets are to be had, and the word that opens them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::bench) struct Plain {
    pub(super) host: IpAddr,
    port: u16,
    pass: Nonce,
}

impl Plain {
    /// Accepts sockets, and serves each in a thread: so many bytes to it or from it as it orders, over cold memory. The threads
    /// end with their sockets, and at the latest with the process.
    pub(in crate::bench) fn serve(host: IpAddr, count: usize, span: usize) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((host, 0)).with_context(|| format!("cannot listen on {host}"))?;
        let (port, pass) = (listener.local_addr()?.port(), nonce()?);
        std::thread::Builder::new().name("plain-accept".to_owned()).spawn(move || {
            // For both ways at once there are twice as many.
            for socket in listener.incoming().flatten().take(2 * count) {
                // Ends with an error when the other side closes, which is how it is told to end.
                std::thread::spawn(move || drop(obey(socket, &pass, span / count)));
            }
        })?;
        Ok(Self { host, port, pass })
    }
}

fn obey(mut socket: TcpStream, pass: &Nonce, share: usize) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut said = [0; NONCE_BYTES];
    socket.read_exact(&mut said)?;
    if said != *pass {
        return Ok(());
    }
    socket.set_read_timeout(None)?;
    let mut end = End::new(socket, share);
    loop {
        let mut order = [0; 8];
        end.socket.read_exact(&mut order)?;
        let order = u64::from_le_bytes(order);
        let bytes = to_usize(order & !GIVES);
        if order & GIVES == 0 { end.send(bytes)? } else { end.receive(bytes)? }
    }
}

/// One end of a plain socket, with memory of its own that is walked through.
struct End {
    socket: TcpStream,
    memory: Vec<u8>,
    at: usize,
}

impl End {
    fn new(socket: TcpStream, share: usize) -> Self {
        let block = noise(to_usize(FILL_BYTES).min(share.max(1)), 9);
        Self { socket, memory: block.repeat(share.div_ceil(block.len()).max(1)), at: 0 }
    }

    /// The next piece of memory, `len` bytes at most.
    fn piece(&mut self, len: usize) -> std::ops::Range<usize> {
        let len = len.min(PLAIN_BYTES).min(self.memory.len());
        if self.at + len > self.memory.len() {
            self.at = 0;
        }
        let start = self.at;
        self.at += len;
        start..self.at
    }

    fn send(&mut self, mut left: usize) -> std::io::Result<()> {
        while left > 0 {
            let piece = self.piece(left);
            left -= piece.len();
            self.socket.write_all(&self.memory[piece])?;
        }
        Ok(())
    }

    fn receive(&mut self, mut left: usize) -> std::io::Result<()> {
        while left > 0 {
            let piece = self.piece(left);
            let read = self.socket.read(&mut self.memory[piece])?;
            if read == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            left -= read;
        }
        Ok(())
    }
}

/// The caller's end.
pub(super) struct Socket {
    end: End,
}

impl Socket {
    pub(super) fn connect(to: &Plain, share: usize) -> anyhow::Result<Self> {
        let mut socket = TcpStream::connect((to.host, to.port)).context("connecting a plain socket")?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.write_all(&to.pass)?;
        Ok(Self { end: End::new(socket, share) })
    }

    /// Has the other side send `bytes` bytes, and reads them to where `at` is in our memory.
    pub(super) fn take(&mut self, at: u64, bytes: u64) -> anyhow::Result<()> {
        self.order(at, bytes, 0)?;
        self.end.receive(to_usize(bytes)).context("the other process closed a plain socket")
    }

    /// Sends `bytes` bytes, until the system has taken them.
    pub(super) fn give(&mut self, at: u64, bytes: u64) -> anyhow::Result<()> {
        self.order(at, bytes, GIVES)?;
        self.end.send(to_usize(bytes)).context("the other process closed a plain socket")
    }

    fn order(&mut self, at: u64, bytes: u64, way: u64) -> anyhow::Result<()> {
        ensure!(bytes < GIVES, "more bytes than an order can name");
        self.end.at = to_usize(at % to_u64(self.end.memory.len()));
        Ok(self.end.socket.write_all(&(bytes | way).to_le_bytes())?)
    }
}
