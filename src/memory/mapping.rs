//! A mapped stretch of address space, unmapped when dropped.

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap};

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
        let _ = self.advise(Advice::LinuxHugepage);
    }

    /// Backs every page with memory and enters it into the page table, so that no later copy takes a page fault.
    /// Kernels before 5.14 lack the advice; there the pages come at first touch, as without it.
    pub(super) fn populate(&self) -> io::Result<()> {
        loop {
            match self.advise(Advice::LinuxPopulateWrite) {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::INVAL) => return Ok(()),
                done => return Ok(done?),
            }
        }
    }

    fn advise(&self, advice: Advice) -> rustix::io::Result<()> {
        // SAFETY: the range is this mapping, whole, and neither advice used here changes what the bytes are.
        unsafe { madvise(self.ptr.as_ptr().cast::<c_void>(), self.len, advice) }
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
