//! A communicator of two ranks: what it sends and receives, in one order.

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::Duration;

use super::library::{BYTES, CONFIG_MAGIC, Comm, Config, FLOOR, IN_PROGRESS, Library, NcclError, UNSET, UniqueId};
use crate::ffi::cuda::{Device, Mark, OrderedStream};

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
#[derive(Clone)]
pub struct Settings {
    pub side: Side,
    pub id: UniqueId,
    /// Most multiprocessors that one send or receive occupies.
    pub multiprocessors_max: u32,
    /// The GPU. `None`: host memory, which only a stand-in for the library moves.
    pub device: Option<Arc<Device>>,
    /// A little memory there, for the first bytes.
    pub scratch: Arc<dyn Buffer>,
}

/// Two ranks, one in this process. Everything posted is done in the order in which it was posted, on both sides: so both
/// must post in the same order.
pub struct Communicator {
    handle: Handle,
    peer: c_int,
    /// Absent with host memory.
    stream: Option<OrderedStream>,
    /// Everything that was posted, held until nothing of the communicator runs any more.
    buffers: RefCell<Vec<Arc<dyn Buffer>>>,
}

/// What a communicator was made out of. Ending it, by dropping it, takes most of a second, for which nobody needs to wait.
pub struct Origin {
    _handle: Handle,
}

/// One of the library's communicators. Dropping it ends whatever runs, on this side; the other rank must be told by other means.
pub(super) struct Handle {
    pub(super) library: &'static Library,
    pub(super) comm: Comm,
    pub(super) device: Option<Arc<Device>>,
}

// SAFETY: NCCL ties a communicator to no thread; one uses it at a time, since it is not Sync.
unsafe impl Send for Handle {}

/// How often a communicator in the making is asked about.
const MAKING_INTERVAL: Duration = Duration::from_micros(200);

impl Communicator {
    /// Makes it together with the other side, who must do so at the same time. Between its steps `gives_up` is asked; but the
    /// last one waits inside the library for the other side, and ends only with it.
    ///
    /// A non-blocking communicator can be given up while it is made, but then takes 50 us for every post, because it hands each
    /// to a thread of its own. So it gives birth to a blocking one, which posts in 8. Nothing that a blocking one posts waits for
    /// the peer once both have sent to each other, which is why they do so here.
    pub fn make(
        library: &'static Library,
        settings: &Settings,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<(Self, Origin), NcclError> {
        let Settings { side, id, multiprocessors_max, device, scratch } = settings;
        let stream = device.as_ref().map(OrderedStream::new).transpose()?;
        let config = |blocking| Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: FLOOR,
            blocking,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: c_int::try_from(*multiprocessors_max).unwrap_or(UNSET),
            net_name: std::ptr::null(),
            split_share: 0,
        };
        let new = || Handle { library, comm: std::ptr::null_mut(), device: device.clone() };
        let (mut origin, mut handle, mut settings) = (new(), new(), config(0));
        let made = &raw mut origin.comm;
        let status = origin.within(|| {
            // SAFETY: writes one handle, ended when it is dropped; the settings are read before the call returns, and are laid out
            // as the version that they name has them.
            unsafe { (library.init)(made, 2, *id, side.rank(), &raw mut settings) }
        })?;
        library.begun("ncclCommInitRankConfig", status)?;
        origin.settle(gives_up)?;
        settings = config(1);
        let born = &raw mut handle.comm;
        let status = origin.within(|| {
            // SAFETY: as above; the communicator that it comes from is ready, and outlives the call's work, which is waited for.
            unsafe { (library.split)(origin.comm, 0, side.rank(), born, &raw mut settings) }
        })?;
        library.begun("ncclCommSplit", status)?;
        origin.settle(gives_up)?;
        let made = Self { handle, peer: side.peer(), stream, buffers: RefCell::default() };
        made.greet(*side, scratch, gives_up)?;
        Ok((made, Origin { _handle: origin }))
    }

    /// Sends a byte each way.
    fn greet(&self, side: Side, scratch: &Arc<dyn Buffer>, gives_up: &dyn Fn() -> bool) -> Result<(), NcclError> {
        let halves = match side {
            Side::First => [Half::Send, Half::Receive],
            Side::Second => [Half::Receive, Half::Send],
        };
        halves.into_iter().try_for_each(|half| self.post(half, scratch, 0, 1))?;
        let Some(stream) = &self.stream else { return self.handle.settle(gives_up) };
        let mark = Mark::new(stream.device())?;
        stream.mark(&mark)?;
        wait(gives_up, || Ok(mark.passed()?))
    }

    /// Whether nothing has gone wrong; without a stream, also whether everything posted has been done.
    pub fn settled(&self) -> Result<bool, NcclError> {
        self.handle.settled()
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
        let Handle { library, comm, .. } = self.handle;
        let post = || match half {
            // SAFETY: the bytes are the buffer's, which is held until nothing of the communicator runs any more.
            Half::Send => unsafe { (library.send)(place, count, BYTES, self.peer, comm, stream) },
            // SAFETY: as above.
            Half::Receive => unsafe { (library.receive)(place, count, BYTES, self.peer, comm, stream) },
        };
        let status = self.handle.within(post)?;
        library.begun(call, status)
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
    fn drop(&mut self) {
        self.handle.end();
        if let Some(stream) = &self.stream {
            // What ran was told to end; after this nothing touches the buffers.
            let _ = stream.wait();
        }
    }
}

impl Handle {
    /// Calls the library with the communicator's GPU current.
    pub(super) fn within<T>(&self, call: impl FnOnce() -> T) -> Result<T, NcclError> {
        match &self.device {
            Some(device) => Ok(device.within(call)?),
            None => Ok(call()),
        }
    }

    /// Whether the last call has ended: until then there must be no other.
    pub(super) fn settled(&self) -> Result<bool, NcclError> {
        let mut state = 0;
        // SAFETY: the handle is ours; writes one number.
        let status = unsafe { (self.library.async_error)(self.comm, &raw mut state) };
        self.library.check("ncclCommGetAsyncError", status)?;
        if state == IN_PROGRESS {
            return Ok(false);
        }
        self.library.check("what was posted (ncclCommGetAsyncError)", state).map(|()| true)
    }

    pub(super) fn settle(&self, gives_up: &dyn Fn() -> bool) -> Result<(), NcclError> {
        wait(gives_up, || self.settled())
    }

    pub(super) fn end(&mut self) {
        let comm = std::mem::replace(&mut self.comm, std::ptr::null_mut());
        if !comm.is_null() {
            let library = self.library;
            let _ = self.within(|| {
                // SAFETY: made once, and ended here.
                unsafe { (library.abort)(comm) }
            });
        }
    }
}

fn wait(gives_up: &dyn Fn() -> bool, mut ended: impl FnMut() -> Result<bool, NcclError>) -> Result<(), NcclError> {
    while !ended()? {
        if gives_up() {
            return Err(NcclError::GivenUp);
        }
        std::thread::sleep(MAKING_INTERVAL);
    }
    Ok(())
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.end();
    }
}
