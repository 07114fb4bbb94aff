//! A communicator of two ranks: what it sends and receives, in one order.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

use super::library::{
    BYTES, CONFIG_MAGIC, Comm, Config, FLOOR, IN_PROGRESS, Library, NcclError, Status, UNSET, UniqueId,
};
use crate::ffi::cuda::{Device, OrderedStream};

/// Memory that a communicator sends from and receives into.
///
/// # Safety
/// What `span` names, as (address, length), is there, readable and writable by the communicator's device, for as long as the
/// value lives; and nobody relies on its bytes staying as they are.
pub unsafe trait Buffer: Send + Sync {
    fn span(&self) -> (u64, u64);
}

/// Which of the two ranks this process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    First,
    Second,
}

impl Side {
    fn rank(self) -> c_int {
        match self {
            Self::First => 0,
            Self::Second => 1,
        }
    }

    fn peer(self) -> c_int {
        1 - self.rank()
    }
}

/// One half of moving bytes: the other rank must do the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    Send,
    Receive,
}

/// How a communicator is to be.
#[derive(Debug, Clone, Copy)]
pub struct Settings<'a> {
    pub side: Side,
    pub id: UniqueId,
    /// Most multiprocessors that one send or receive occupies.
    pub multiprocessors_max: u32,
    /// The GPU. `None`: host memory, which only a stand-in for the library moves.
    pub device: Option<&'a Arc<Device>>,
}

/// Two ranks, one in this process. Everything posted is done in the order in which it was posted, on both sides: so both
/// must post in the same order.
pub struct Communicator {
    library: &'static Library,
    comm: Comm,
    peer: c_int,
    /// Absent with host memory.
    stream: Option<OrderedStream>,
    /// Everything that was posted, held until nothing of the communicator runs any more.
    buffers: RefCell<Vec<Arc<dyn Buffer>>>,
}

// SAFETY: NCCL ties a communicator to no thread; one uses it at a time, since it is not Sync.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Begins to make it. Not ready before [`Communicator::settled`] says so.
    pub fn begin(library: &'static Library, settings: &Settings) -> Result<Self, NcclError> {
        let stream = settings.device.map(OrderedStream::new).transpose()?;
        let mut config = Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: FLOOR,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: c_int::try_from(settings.multiprocessors_max).unwrap_or(UNSET),
            net_name: std::ptr::null(),
            split_share: UNSET,
        };
        let mut made = Self {
            library,
            comm: std::ptr::null_mut(),
            peer: settings.side.peer(),
            stream,
            buffers: RefCell::default(),
        };
        let comm = &raw mut made.comm;
        let mut init = || {
            // SAFETY: writes one handle, ended in `drop`; the settings are read before the call returns, and are laid out as
            // the version that they name has them.
            unsafe { (library.init)(comm, 2, settings.id, settings.side.rank(), &raw mut config) }
        };
        let status = match settings.device {
            Some(device) => device.within(init)?,
            None => init(),
        };
        made.begun("ncclCommInitRankConfig", status).map(|()| made)
    }

    fn begun(&self, call: &'static str, status: Status) -> Result<(), NcclError> {
        if status == IN_PROGRESS { Ok(()) } else { self.library.check(call, status) }
    }

    /// Whether the last call has ended: until then there must be no other.
    pub fn settled(&self) -> Result<bool, NcclError> {
        let mut state = 0;
        // SAFETY: the handle is ours; writes one number.
        let status = unsafe { (self.library.async_error)(self.comm, &raw mut state) };
        self.library.check("ncclCommGetAsyncError", status)?;
        if state == IN_PROGRESS {
            return Ok(false);
        }
        self.library.check("NCCL", state).map(|()| true)
    }

    /// Posts one half of moving `len` bytes at `offset` of `buffer`.
    pub fn post(&self, half: Half, buffer: &Arc<dyn Buffer>, offset: u64, len: u64) -> Result<(), NcclError> {
        let (address, buffer_len) = buffer.span();
        let call = if half == Half::Send { "ncclSend" } else { "ncclRecv" };
        if offset.checked_add(len).is_none_or(|end| end > buffer_len) {
            return Err(NcclError::OutOfRange { call, offset, len, buffer_len });
        }
        self.hold(buffer);
        let stream = self.stream.as_ref().map_or(std::ptr::null_mut(), OrderedStream::raw);
        let place = std::ptr::without_provenance_mut::<c_void>(usize::try_from(address + offset).unwrap_or(0));
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        let post = || match half {
            // SAFETY: the bytes are the buffer's, which is held until nothing of the communicator runs any more.
            Half::Send => unsafe { (self.library.send)(place, count, BYTES, self.peer, self.comm, stream) },
            // SAFETY: as above.
            Half::Receive => unsafe { (self.library.receive)(place, count, BYTES, self.peer, self.comm, stream) },
        };
        let status = match &self.stream {
            Some(stream) => stream.device().within(post)?,
            None => post(),
        };
        self.begun(call, status)
    }

    fn hold(&self, buffer: &Arc<dyn Buffer>) {
        let mut buffers = self.buffers.borrow_mut();
        if !buffers.iter().any(|held| Arc::ptr_eq(held, buffer)) {
            buffers.push(buffer.clone());
        }
    }

    /// The stream that everything runs on.
    pub fn stream(&self) -> Option<&OrderedStream> {
        self.stream.as_ref()
    }
}

impl Drop for Communicator {
    /// Ends whatever runs, on this side; the other rank must be told by other means.
    fn drop(&mut self) {
        if !self.comm.is_null() {
            let abort = || {
                // SAFETY: made once, and ended here.
                unsafe { (self.library.abort)(self.comm) }
            };
            let _ = match &self.stream {
                Some(stream) => stream.device().within(abort).unwrap_or(0),
                None => abort(),
            };
        }
        if let Some(stream) = &self.stream {
            // What ran was told to end; after this nothing touches the buffers.
            let _ = stream.wait();
        }
    }
}
