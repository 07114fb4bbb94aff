//! `process_vm_readv` and `process_vm_writev`: the kernel copies between our region and another process's addresses.
#![allow(unsafe_code, reason = "two system calls that take raw addresses")]

use std::fs;
use std::io;

use libc::{c_void, iovec};

use crate::memory::{Region, to_u64, to_usize};

/// The kernel takes no more iovecs per side and call.
const IOVECS_MAX: usize = 1024;

/// Which way a copy goes, seen from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Read,
    Write,
}

impl Way {
    pub(super) fn call(self) -> &'static str {
        match self {
            Self::Read => "process_vm_readv",
            Self::Write => "process_vm_writev",
        }
    }
}

/// Another process, by its id. Whether it still is the one that was meant is for the caller to watch.
pub(in crate::transport) struct ProcessVm {
    pid: i32,
}

/// Lets processes of the same user read and write this process's memory where Yama restricts that to ancestors, as UCX and
/// Open MPI do for the same system calls. Elsewhere it changes nothing.
pub fn allow_peers() {
    let restricted = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").is_ok_and(|scope| scope.trim() == "1");
    if restricted {
        // SAFETY: PR_SET_PTRACER takes a number and touches no memory of ours.
        let set = unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY) };
        tracing::info!(
            allowed = set == 0,
            "borrowed memory is offered over shm: peers of this user may access this process"
        );
    }
}

/// One byte of another process, where that is permitted: what the path does with borrowed memory, in its smallest form.
pub fn read_byte(pid: i32, address: u64) -> io::Result<u8> {
    let scratch = Region::shared(1)?;
    ProcessVm::new(pid).copy(Way::Read, &scratch, std::iter::once((0, address, 1)))?;
    let mut byte = [0];
    scratch.copy_out(0, &mut byte).map_err(io::Error::other)?;
    Ok(byte[0])
}

impl ProcessVm {
    pub(in crate::transport) fn new(pid: i32) -> Self {
        Self { pid }
    }

    /// Eight bytes at an address over there.
    pub(in crate::transport) fn read_word(&self, address: u64) -> io::Result<u64> {
        let (mut word, len) = ([0; size_of::<u64>()], size_of::<u64>());
        let local = iovec { iov_base: word.as_mut_ptr().cast(), iov_len: len };
        let remote = iovec { iov_base: std::ptr::without_provenance_mut(to_usize(address)), iov_len: len };
        let read = vectored(self.pid, Way::Read, &[local], &[remote])?;
        if read == to_u64(len) { Ok(u64::from_ne_bytes(word)) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Reads the first and the last byte of a peer's region, so that what is not permitted is known before a transfer.
    pub(super) fn probe(&self, base: u64, len: u64) -> io::Result<()> {
        let scratch = Region::shared(1)?;
        let last = base + len.saturating_sub(1);
        self.copy(Way::Read, &scratch, [(0, base, len.min(1))].into_iter())?;
        self.copy(Way::Read, &scratch, [(0, last, len.min(1))].into_iter())
    }

    /// Copies runs of (offset in `ours`, address over there, bytes), in batches.
    pub(super) fn copy(&self, way: Way, ours: &Region, runs: impl Iterator<Item = (u64, u64, u64)>) -> io::Result<()> {
        let mut batch = Batch::default();
        for (offset, address, len) in runs {
            if batch.local.len() == IOVECS_MAX {
                batch.copy(self.pid, way)?;
            }
            let local = ours.at(offset, len).map_err(io::Error::other)?;
            batch.push(local.cast::<c_void>(), address, len);
        }
        batch.copy(self.pid, way)
    }
}

#[derive(Default)]
struct Batch {
    local: Vec<iovec>,
    remote: Vec<iovec>,
}

impl Batch {
    /// `local` must be `len` bytes of a region that outlives the batch.
    fn push(&mut self, local: *mut c_void, remote: u64, len: u64) {
        let iov_len = to_usize(len);
        self.local.push(iovec { iov_base: local, iov_len });
        self.remote.push(iovec { iov_base: std::ptr::without_provenance_mut(to_usize(remote)), iov_len });
    }

    /// Copies all of the batch and empties it. The kernel may stop anywhere in between; then it is asked for the rest.
    fn copy(&mut self, pid: i32, way: Way) -> io::Result<()> {
        let mut first = 0;
        while first < self.local.len() {
            let moved = vectored(pid, way, &self.local[first..], &self.remote[first..])?;
            if moved == 0 {
                return Err(io::Error::other("the kernel copied nothing"));
            }
            first += advance(&mut self.local[first..], &mut self.remote[first..], moved);
        }
        self.local.clear();
        self.remote.clear();
        Ok(())
    }
}

/// Takes `moved` bytes off the front of both lists. Returns how many entries were used up.
fn advance(local: &mut [iovec], remote: &mut [iovec], mut moved: u64) -> usize {
    for (index, (local, remote)) in local.iter_mut().zip(remote).enumerate() {
        let len = to_u64(local.iov_len);
        if moved < len {
            let step = to_usize(moved);
            local.iov_base = local.iov_base.cast::<u8>().wrapping_add(step).cast();
            remote.iov_base = remote.iov_base.cast::<u8>().wrapping_add(step).cast();
            local.iov_len -= step;
            remote.iov_len -= step;
            return index;
        }
        moved -= len;
    }
    local.len()
}

fn vectored(pid: i32, way: Way, local: &[iovec], remote: &[iovec]) -> io::Result<u64> {
    let call = match way {
        Way::Read => libc::process_vm_readv,
        Way::Write => libc::process_vm_writev,
    };
    let count = libc::c_ulong::try_from(local.len()).map_err(io::Error::other)?;
    // SAFETY: each local entry is bytes that the caller holds, of a region and checked against its length, or of its own, and no
    // reference to them is used meanwhile; the remote addresses mean nothing here, and the kernel checks them against that process's own memory.
    let moved = unsafe { call(pid, local.as_ptr(), count, remote.as_ptr(), count, 0) };
    u64::try_from(moved).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_copy_goes_on_where_it_stopped() {
        let entry = |base, iov_len| iovec { iov_base: std::ptr::without_provenance_mut(base), iov_len };
        let show = |entry: &iovec| (entry.iov_base.addr(), entry.iov_len);
        let cases = [
            (0, 0, Some((100, 10))),
            (4, 0, Some((104, 6))),
            (10, 1, Some((200, 5))),
            (12, 1, Some((202, 3))),
            (15, 2, None),
        ];
        for (moved, used, first) in cases {
            let mut local = vec![entry(100, 10), entry(200, 5)];
            let mut remote = vec![entry(1100, 10), entry(1200, 5)];
            assert_eq!(advance(&mut local, &mut remote, moved), used, "after {moved} bytes");
            assert_eq!(local.get(used).map(show), first);
            assert_eq!(remote.get(used).map(show), first.map(|(address, len)| (address + 1000, len)));
        }
    }

    #[test]
    fn many_runs_of_borrowed_memory_arrive_whole() {
        let bytes: Vec<u8> = (0..9000_u32).map(|i| u8::try_from(i % 253).unwrap()).collect();
        let base = to_u64(bytes.as_ptr().addr());
        let ours = Region::shared(9000).unwrap();
        let vm = ProcessVm::new(i32::try_from(std::process::id()).unwrap());
        // More runs than one call takes, read back to front.
        let runs = (0..3000_u64).map(|i| (i * 3, base + (2999 - i) * 3, 3));
        vm.copy(Way::Read, &ours, runs).unwrap();
        let want: Vec<u8> = bytes.chunks(3).rev().flatten().copied().collect();
        assert_eq!(ours.to_vec(0, 9000).unwrap(), want);
        assert!(vm.probe(8, 1).is_err(), "an address that is not mapped");
    }
}
