//! [`Region`]: address, length, kind, and what keeps the memory alive.

use std::any::Any;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};

use super::mapping::Mapping;
use super::{to_u64, to_usize};
use crate::ffi::cuda::{CudaError, Device, IpcHandle, Pin};

/// Most bytes that one read of a file is asked for: Linux gives no more than this at once anyway.
const READ_BYTES_MAX: u64 = 1 << 30;

/// Where memory lies, as far as paths care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MemoryKind {
    /// Memory that the processor reads and writes.
    Host,
    /// Memory of a GPU, by CUDA's number of it in this process.
    Cuda(i32),
}

impl MemoryKind {
    /// How messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Cuda(_) => "GPU",
        }
    }
}

/// A copy that would leave its region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("bytes {offset}..{offset}+{len} lie outside a region of {region_len} bytes")]
pub struct OutOfRange {
    pub offset: u64,
    pub len: u64,
    pub region_len: u64,
}

/// Why bytes of a region were not reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    #[error(transparent)]
    OutOfRange(#[from] OutOfRange),
    #[error("the processor does not address GPU memory")]
    NotHost,
    #[error("a GPU does not address the processor's memory")]
    NotGpu,
    #[error("GPU memory: {0}")]
    Cuda(#[from] CudaError),
    #[error("no host memory to copy through: {0}")]
    NoMemory(String),
}

/// How a shared region is set up. The default gives memory page by page, at first touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RegionOptions {
    /// Back the whole region with memory at once, here and in every peer that maps it. Costs the full length in memory
    /// and about 0.1 s per GB at start, and takes the page faults out of the first transfers.
    pub prefault: bool,
    /// Ask for huge pages. Advice: most kernels give none for shared memory unless `shmem_enabled` allows it.
    pub huge_pages: bool,
}

/// What a region's memory is made of, as a path needs to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A sealed memory file of this process: a peer on the same host can map it.
    Shared { fd: RawFd, device: u64, inode: u64, prefault: bool },
    /// Memory that somebody else allocated.
    Borrowed,
    /// Memory of a GPU.
    Device,
}

/// What keeps the memory alive. Dropped with the region, never before.
enum Owner {
    Shared { mapping: Mapping, fd: OwnedFd, device: u64, inode: u64, prefault: bool },
    Peer { _mapping: Mapping },
    Borrowed { _owner: Box<dyn Any + Send + Sync> },
    Device { device: Arc<Device>, _owner: Box<dyn Any + Send + Sync> },
}

/// A stretch of memory that transfers read and write.
pub struct Region {
    ptr: NonNull<u8>,
    len: u64,
    /// Before the owner, because it goes first.
    pin: OnceLock<Pin>,
    owner: Owner,
}

// SAFETY: the memory stays mapped at `ptr` for as long as the region lives, whichever thread holds it: `owner` owns it and
// is itself Send.
unsafe impl Send for Region {}
// SAFETY: no method makes a reference into the memory. All access is by bounds-checked raw copies, which other processes
// may race with in any case, and whose results are plain bytes.
unsafe impl Sync for Region {}

impl Region {
    fn new(ptr: NonNull<u8>, len: u64, owner: Owner) -> Self {
        Self { ptr, len, pin: OnceLock::new(), owner }
    }

    /// `len` bytes of zeroed memory that a peer on the same host can map: a memory file, sealed so that it never shrinks.
    pub fn shared(len: usize) -> io::Result<Arc<Self>> {
        Self::shared_with(len, RegionOptions::default())
    }

    /// As [`Region::shared`], set up as `options` say.
    pub fn shared_with(len: usize, options: RegionOptions) -> io::Result<Arc<Self>> {
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a region must have at least one byte"));
        }
        let fd = memfd_create("pdlink-region", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&fd, to_u64(len))?;
        // Sealed before anybody can open it: a file that shrinks under a mapping kills the process that reads it.
        fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let mapping = Mapping::shared(fd.as_fd(), len)?;
        if options.huge_pages {
            mapping.advise_huge_pages();
        }
        if options.prefault {
            mapping.populate()?;
        }
        let stat = fstat(&fd)?;
        let ptr = mapping.ptr();
        let prefault = options.prefault;
        let owner = Owner::Shared { mapping, fd, device: stat.st_dev, inode: stat.st_ino, prefault };
        Ok(Arc::new(Self::new(ptr, to_u64(len), owner)))
    }

    /// Memory that somebody else allocated: an engine's own KV tensors.
    ///
    /// # Safety
    /// `ptr` must point at `len` bytes that stay readable and writable until `owner` is dropped. Rust code must hold no
    /// reference into them while a transfer that names them runs.
    pub unsafe fn borrowed(ptr: NonNull<u8>, len: usize, owner: Box<dyn Any + Send + Sync>) -> Arc<Self> {
        Arc::new(Self::new(ptr, to_u64(len), Owner::Borrowed { _owner: owner }))
    }

    /// Memory of a GPU that somebody allocated: an engine's KV tensors.
    ///
    /// # Safety
    /// `address` must name `len` bytes that `device` can read and write until `owner` is dropped.
    pub unsafe fn on_device(
        device: Arc<Device>,
        address: u64,
        len: u64,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Option<Arc<Self>> {
        let ptr = NonNull::new(std::ptr::without_provenance_mut::<u8>(to_usize(address)))?;
        Some(Arc::new(Self::new(ptr, len, Owner::Device { device, _owner: owner })))
    }

    /// `len` bytes of our own on a GPU.
    pub fn allocated_on(device: &Arc<Device>, len: usize) -> Result<Arc<Self>, CudaError> {
        let memory = device.allocate(len)?;
        let address = memory.address();
        // SAFETY: `memory` is `len` bytes of `device`, and the region owns it from here on.
        let region = unsafe { Self::on_device(Arc::clone(device), address, to_u64(len), Box::new(memory)) };
        Ok(region.expect("no allocation starts at address 0"))
    }

    /// Maps `len` bytes of a peer's GPU memory for `device`. Unmapped when the region is dropped.
    pub fn of_gpu_peer(device: &Arc<Device>, handle: &IpcHandle, len: u64) -> Result<Arc<Self>, AccessError> {
        let mapped = device.map(handle)?;
        let allocation = device.allocation_of(mapped.address())?;
        if len > allocation.len {
            return Err(OutOfRange { offset: 0, len, region_len: allocation.len }.into());
        }
        let address = mapped.address();
        // SAFETY: the mapping is at least `len` bytes, as the driver just said, and the region owns it from here on.
        let region = unsafe { Self::on_device(Arc::clone(device), address, len, Box::new(mapped)) };
        Ok(region.expect("no mapping starts at address 0"))
    }

    /// Maps a peer's sealed memory file of exactly `len` bytes. The mapping outlives the peer: its bytes then stay as the
    /// peer left them. Unmapped when the region is dropped.
    pub fn of_peer(fd: BorrowedFd<'_>, len: u64, prefault: bool) -> io::Result<Arc<Self>> {
        let size = u64::try_from(fstat(fd)?.st_size).unwrap_or(0);
        if size != len || len == 0 {
            return Err(io::Error::other(format!("the peer's region has {size} bytes, {len} were announced")));
        }
        // Without this seal the peer could cut the file short, and our next read of it would be a SIGBUS.
        if !fcntl_get_seals(fd)?.contains(SealFlags::SHRINK) {
            return Err(io::Error::other("the peer's region is not sealed against shrinking"));
        }
        let mapping = Mapping::shared(fd, to_usize(len))?;
        if prefault {
            mapping.populate()?;
        }
        let ptr = mapping.ptr();
        Ok(Arc::new(Self::new(ptr, len, Owner::Peer { _mapping: mapping })))
    }

    /// Backs a region of our own with memory now, not page by page at first touch.
    pub fn populate(&self) -> io::Result<()> {
        match &self.owner {
            Owner::Shared { mapping, .. } => mapping.populate(),
            _ => Ok(()),
        }
    }

    pub(super) fn is_pinned(&self) -> bool {
        self.pin.get().is_some()
    }

    /// The GPU whose kernels can read it, and where they find it: it lies there, or is fixed for it.
    pub(super) fn seen_from_gpu(&self) -> Option<(&Arc<Device>, u64)> {
        let fixed = || self.pin.get().map(|pin| (pin.device(), pin.address()));
        self.device().map(|device| (device, self.address())).or_else(fixed)
    }

    /// The GPU that can make digests of it.
    pub fn digested_by(&self) -> Option<&Arc<Device>> {
        self.seen_from_gpu().map(|(device, _)| device)
    }

    /// Fixes host memory in place, all of it, so that `device` copies at the full speed of the bus. Memory of a GPU is fixed.
    pub fn pin_for(&self, device: &Arc<Device>) -> Result<(), CudaError> {
        if self.device().is_some() || self.pin.get().is_some() {
            return Ok(());
        }
        // SAFETY: the region keeps its memory mapped for as long as it lives, and lets go of the pin before it.
        let pin = unsafe { device.pin(self.ptr.as_ptr(), to_usize(self.len)) }?;
        // Two at once: the driver has refused the second.
        let _ = self.pin.set(pin);
        Ok(())
    }

    /// Bytes in the region.
    #[allow(clippy::len_without_is_empty, reason = "a region is never empty in a way anybody asks about")]
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn kind(&self) -> MemoryKind {
        self.device().map_or(MemoryKind::Host, |device| MemoryKind::Cuda(device.ordinal()))
    }

    /// The GPU that the memory is on.
    pub fn device(&self) -> Option<&Arc<Device>> {
        match &self.owner {
            Owner::Device { device, .. } => Some(device),
            _ => None,
        }
    }

    /// Where the region starts, as a number: the processor's address, or the GPU's.
    pub fn address(&self) -> u64 {
        to_u64(self.ptr.as_ptr().addr())
    }

    pub fn backing(&self) -> Backing {
        match &self.owner {
            Owner::Shared { fd, device, inode, prefault, .. } => {
                Backing::Shared { fd: fd.as_raw_fd(), device: *device, inode: *inode, prefault: *prefault }
            }
            Owner::Peer { .. } | Owner::Borrowed { .. } => Backing::Borrowed,
            Owner::Device { .. } => Backing::Device,
        }
    }

    /// Refuses a range that does not lie in the region.
    pub fn check(&self, offset: u64, len: u64) -> Result<(), OutOfRange> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(OutOfRange { offset, len, region_len: self.len }),
        }
    }

    /// The address of `offset`, of which `len` bytes are the region's. Valid while the region lives. Host memory only.
    pub fn at(&self, offset: u64, len: u64) -> Result<*mut u8, AccessError> {
        self.check(offset, len)?;
        if self.device().is_some() {
            return Err(AccessError::NotHost);
        }
        // SAFETY: `offset` is at most the length of the one allocation that starts at `ptr`.
        Ok(unsafe { self.ptr.as_ptr().add(to_usize(offset)) })
    }

    /// Copies `bytes` into the region.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) -> Result<(), AccessError> {
        if let Some(device) = self.device() {
            self.check(offset, to_u64(bytes.len()))?;
            // SAFETY: checked to lie in the region, which `device` can write; `bytes` are as many as are named.
            return Ok(unsafe { device.copy_in(self.address() + offset, bytes.as_ptr(), bytes.len()) }?);
        }
        let dst = self.at(offset, to_u64(bytes.len()))?;
        // SAFETY: `dst` is as many writable bytes of this region as `bytes` has. `copy` allows the two to overlap, which
        // they would if a borrowed region's owner passed a slice of it.
        unsafe { std::ptr::copy(bytes.as_ptr(), dst, bytes.len()) };
        Ok(())
    }

    /// Reads `len` bytes of a file into the region. A file that ends before is an error, also if it was cut short while it
    /// was read: a mapping of it would be a SIGBUS. Host memory only.
    pub fn read_file(&self, offset: u64, file: &File, file_offset: u64, len: u64) -> io::Result<()> {
        let dst = self.at(offset, len).map_err(io::Error::other)?;
        let mut done = 0;
        while done < len {
            let (at, from) = (dst.wrapping_add(to_usize(done)), i64::try_from(file_offset + done));
            let (from, left) = (from.map_err(io::Error::other)?, to_usize((len - done).min(READ_BYTES_MAX)));
            // SAFETY: `left` bytes from `at` on are this region's, as was checked above, and nothing refers to them.
            let read = unsafe { libc::pread(file.as_raw_fd(), at.cast::<libc::c_void>(), left, from) };
            match u64::try_from(read) {
                Ok(0) => {
                    let why = format!("the file ends {} bytes early", len - done);
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
                }
                Ok(read) => done += read,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Copies bytes of the region out into `bytes`.
    pub fn copy_out(&self, offset: u64, bytes: &mut [u8]) -> Result<(), AccessError> {
        if let Some(device) = self.device() {
            self.check(offset, to_u64(bytes.len()))?;
            // SAFETY: checked to lie in the region, which `device` can read; `bytes` has room for as many as are named.
            return Ok(unsafe { device.copy_out(self.address() + offset, bytes.as_mut_ptr(), bytes.len()) }?);
        }
        let src = self.at(offset, to_u64(bytes.len()))?;
        // SAFETY: `src` is as many readable bytes of this region as `bytes` has room for. A concurrent write by a peer
        // yields old or new bytes, and any bytes are valid.
        unsafe { std::ptr::copy(src, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Bytes of the region, copied out.
    pub fn to_vec(&self, offset: u64, len: u64) -> Result<Vec<u8>, AccessError> {
        self.check(offset, len)?;
        let mut bytes = vec![0; to_usize(len)];
        self.copy_out(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies `len` bytes from here into `dst`, which may be this region; in host memory ranges may overlap. Either may be on a
    /// GPU, and both if the one can address the other.
    pub fn copy_to(&self, offset: u64, dst: &Self, dst_offset: u64, len: u64) -> Result<(), AccessError> {
        self.check(offset, len)?;
        dst.check(dst_offset, len)?;
        let (from, to, count) = (self.address() + offset, dst.address() + dst_offset, to_usize(len));
        match (self.device(), dst.device()) {
            // SAFETY: checked to lie in two regions that `device` can address: its own, and a peer's mapped for it.
            (Some(_), Some(device)) => Ok(unsafe { device.copy_within(from, to, count) }?),
            (Some(device), None) if dst.takes_detour(len) => self.copy_in_parts(offset, dst, dst_offset, len, device),
            (None, Some(device)) if self.takes_detour(len) => self.copy_in_parts(offset, dst, dst_offset, len, device),
            // SAFETY: checked to lie in a region of `device` and in one of this process.
            (Some(device), None) => Ok(unsafe { device.copy_out_beside(from, dst.at(dst_offset, len)?, count) }?),
            // SAFETY: as above.
            (None, Some(device)) => Ok(unsafe { device.copy_in_beside(to, self.at(offset, len)?, count) }?),
            (None, None) => {
                let (src, dst) = (self.at(offset, len)?, dst.at(dst_offset, len)?);
                // SAFETY: both are `len` bytes of live regions, and `copy` allows overlap.
                unsafe { std::ptr::copy(src, dst, count) };
                Ok(())
            }
        }
    }

    /// Sets `len` bytes to `byte`.
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> Result<(), AccessError> {
        if let Some(device) = self.device() {
            self.check(offset, len)?;
            // SAFETY: checked to lie in the region, which `device` can write.
            return Ok(unsafe { device.fill(self.address() + offset, byte, to_usize(len)) }?);
        }
        let dst = self.at(offset, len)?;
        // SAFETY: `dst` is `len` writable bytes of this region.
        unsafe { std::ptr::write_bytes(dst, byte, to_usize(len)) };
        Ok(())
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region").field("len", &self.len).field("backing", &self.backing()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn bytes_go_in_and_come_out_and_their_neighbours_stay() {
        let region = Region::shared(4096).unwrap();
        region.fill(0, 4096, 0xEE).unwrap();
        region.copy_in(100, b"hello").unwrap();
        assert_eq!(region.to_vec(99, 7).unwrap(), b"\xEEhello\xEE");
        region.copy_to(100, &region, 102, 5).unwrap();
        assert_eq!(region.to_vec(99, 9).unwrap(), b"\xEEhehello\xEE", "overlapping ranges copy as if through a buffer");
    }

    #[test]
    fn every_access_is_held_to_the_length() {
        let region = Region::shared(16).unwrap();
        let want = |offset, len| Err(OutOfRange { offset, len, region_len: 16 }.into());
        assert_eq!(region.copy_in(15, b"ab"), want(15, 2));
        assert_eq!(region.copy_out(17, &mut []), want(17, 0));
        assert_eq!(region.fill(u64::MAX, 2, 0), want(u64::MAX, 2));
        assert_eq!(region.to_vec(0, u64::MAX), want(0, u64::MAX).map(|()| Vec::new()));
        assert_eq!(region.copy_to(0, &region, 8, 9), want(8, 9));
        assert_eq!(region.copy_in(16, b""), Ok(()));
    }

    #[test]
    fn a_peer_maps_the_same_bytes_and_cannot_cut_them_short() {
        for options in [RegionOptions::default(), RegionOptions { prefault: true, huge_pages: true }] {
            let region = Region::shared_with(8192, options).unwrap();
            let Owner::Shared { fd, .. } = &region.owner else { panic!("made shared") };
            let peer = Region::of_peer(fd.as_fd(), 8192, options.prefault).unwrap();
            region.copy_in(8190, b"xy").unwrap();
            assert_eq!(peer.to_vec(8190, 2).unwrap(), b"xy");
            assert!(ftruncate(fd, 1).is_err(), "sealed against shrinking");
            assert!(Region::of_peer(fd.as_fd(), 8191, false).is_err(), "another length than announced");
        }
        let loose = memfd_create("loose", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&loose, 4096).unwrap();
        assert!(Region::of_peer(loose.as_fd(), 4096, false).is_err(), "a file that could shrink");
    }

    #[test]
    fn a_borrowed_region_keeps_its_owner_until_it_goes() {
        struct Guard(Arc<AtomicBool>, Box<[u8; 8]>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.store(true, Ordering::SeqCst);
            }
        }
        let gone = Arc::new(AtomicBool::new(false));
        let mut guard = Box::new(Guard(gone.clone(), Box::new([7; 8])));
        let ptr = NonNull::new(guard.1.as_mut_ptr()).unwrap();
        // SAFETY: the boxed bytes live as long as `guard`, which the region owns from here on.
        let region = unsafe { Region::borrowed(ptr, 8, guard) };
        assert_eq!((region.to_vec(0, 8).unwrap(), region.backing()), (vec![7; 8], Backing::Borrowed));
        assert!(!gone.load(Ordering::SeqCst));
        drop(region);
        assert!(gone.load(Ordering::SeqCst));
    }

    #[test]
    fn a_file_is_read_into_its_place_and_one_cut_short_is_an_error() {
        let path = std::env::temp_dir().join(format!("pdlink-region-{}", std::process::id()));
        std::fs::write(&path, b"0123456789").unwrap();
        let (file, region) = (File::open(&path).unwrap(), Region::shared(16).unwrap());
        std::fs::remove_file(&path).unwrap();
        region.read_file(4, &file, 2, 3).unwrap();
        assert_eq!(region.to_vec(3, 5).unwrap(), b"\x00234\x00");
        let short = region.read_file(0, &file, 8, 5).unwrap_err();
        assert!(short.to_string().contains("ends 3 bytes early"), "{short}");
        assert!(region.read_file(12, &file, 0, 5).is_err(), "beyond the region");
    }

    #[test]
    fn an_empty_region_is_refused() {
        assert_eq!(Region::shared(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}
