//! A mapped stretch of address space, unmapped when dropped.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

/// How much is backed with memory in one call: nobody else in the process can map anything meanwhile.
const POPULATED_BYTES: usize = 64 << 20;

/// One shared mapping of a file. Nobody else unmaps or remaps these addresses while it lives.
#[derive(Debug)]
pub(super) struct Mapping {
    ptr: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Maps the first `len` bytes of `fd`, shared, for reading and writing.
    pub(super) fn shared(fd: BorrowedFd<'_>, len: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a null hint without MAP_FIXED makes the kernel choose addresses that nothing in this process uses.
        let ptr = unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, fd, 0) }?;
        let ptr = NonNull::new(ptr.cast::<u8>()).ok_or_else(|| io::Error::other("mmap answered address zero"))?;
        Ok(Self { ptr, len })
    }

    pub(super) fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    /// Asks for huge pages. Advice only: a kernel that gives none for shared memory is no error.
    pub(super) fn advise_huge_pages(&self) {
        let _ = self.advise(0, self.len, Advice::LinuxHugepage);
    }

    /// Backs every page with memory and enters it into the page table, so that no later copy takes a page fault.
    /// Kernels before 5.14 lack the advice; there the pages come at first touch, as without it.
    pub(super) fn populate(&self) -> io::Result<()> {
        let mut start = 0;
        while start < self.len {
            let len = (self.len - start).min(POPULATED_BYTES);
            match self.advise(start, len, Advice::LinuxPopulateWrite) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::INVAL) => return Ok(()),
                done => {
                    done?;
                    start += len;
                }
            }
        }
        Ok(())
    }

    fn advise(&self, start: usize, len: usize, advice: Advice) -> rustix::io::Result<()> {
        let from = self.ptr.as_ptr().wrapping_add(start).cast::<c_void>();
        // SAFETY: the range lies in this mapping, and neither advice used here changes what the bytes are.
        unsafe { madvise(from, len, advice) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was returned by mmap for this value alone, and only its owner, which is being dropped,
        // gave out addresses in it.
        let unmapped = unsafe { munmap(self.ptr.as_ptr().cast::<c_void>(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping refused: {unmapped:?}");
    }
}
