//! Sends and receives straight from and into regions: one `sendmsg` or `recvmsg` for many runs, no staging copy.
#![allow(unsafe_code, reason = "two system calls that take raw addresses")]

use std::io;
use std::marker::PhantomData;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use libc::{c_int, c_void, iovec, msghdr};

use crate::memory::{AccessError, Region, to_u64, to_usize};

/// Bytes of regions that are still to be sent or received, in order. The regions outlive it.
#[derive(Default)]
pub(in crate::transport) struct Span<'a> {
    iovecs: Vec<iovec>,
    /// Entries before this one are used up.
    first: usize,
    left: u64,
    regions: PhantomData<&'a Region>,
}

impl<'a> Span<'a> {
    pub(in crate::transport) fn push(&mut self, region: &'a Region, offset: u64, len: u64) -> Result<(), AccessError> {
        let iov_base = region.at(offset, len)?.cast::<c_void>();
        if len > 0 {
            self.iovecs.push(iovec { iov_base, iov_len: to_usize(len) });
            self.left += len;
        }
        Ok(())
    }

    /// Bytes not yet moved.
    pub(in crate::transport) fn left(&self) -> u64 {
        self.left
    }

    fn advance(&mut self, mut moved: usize) {
        self.left -= to_u64(moved);
        while moved > 0 {
            let entry = &mut self.iovecs[self.first];
            let step = moved.min(entry.iov_len);
            entry.iov_base = entry.iov_base.cast::<u8>().wrapping_add(step).cast();
            entry.iov_len -= step;
            self.first += usize::from(entry.iov_len == 0);
            moved -= step;
        }
    }

    /// A message of what is left, as far as one call takes it.
    fn message(&mut self) -> msghdr {
        let rest = &mut self.iovecs[self.first..];
        let count = rest.len().min(IOVECS_MAX);
        msghdr {
            msg_name: std::ptr::null_mut(),
            msg_namelen: 0,
            msg_iov: rest.as_mut_ptr(),
            msg_iovlen: count,
            msg_control: std::ptr::null_mut(),
            msg_controllen: 0,
            msg_flags: 0,
        }
    }

    /// Sends what the socket takes now. `WouldBlock` if it takes nothing; never waits.
    pub(in crate::transport) fn send(&mut self, socket: &TcpStream) -> io::Result<()> {
        let message = self.message();
        // SAFETY: the entries are bytes of regions that outlive this span, checked against their lengths when they were
        // pushed. The kernel reads them; a peer that writes them meanwhile changes what is sent.
        let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, FLAGS) };
        self.moved(sent)
    }

    /// Receives what has arrived. `WouldBlock` if nothing has; never waits.
    pub(in crate::transport) fn receive(&mut self, socket: &TcpStream) -> io::Result<()> {
        let mut message = self.message();
        // SAFETY: the entries are bytes of regions that outlive this span, checked against their lengths when they were
        // pushed, to which no Rust reference exists. The kernel writes no further than their lengths.
        let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, FLAGS) };
        self.moved(received)
    }

    fn moved(&mut self, moved: isize) -> io::Result<()> {
        match usize::try_from(moved) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => {
                self.advance(moved);
                Ok(())
            }
            Err(_) => Err(io::Error::last_os_error()),
        }
    }
}

/// The kernel takes no more iovecs per call.
const IOVECS_MAX: usize = 1024;

/// A peer that went away is an error to return, not a signal.
const FLAGS: c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
