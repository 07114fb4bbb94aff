//! A communicator of several ranks, in which the first sends the same to all others.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::Arc;

use super::communicator::{Buffer, Handle};
use super::library::{BYTES, CONFIG_MAGIC, Config, FLOATS, FLOOR, Library, NcclError, SUM, Status, UNSET, UniqueId};
use crate::ffi::cuda::{Device, Mark, OrderedStream};

/// How a group is to be, and who of it this process is.
#[derive(Debug, Clone)]
pub struct GroupSettings {
    pub id: UniqueId,
    pub rank: u32,
    pub ranks: u32,
    /// Most multiprocessors that a broadcast occupies.
    pub multiprocessors_max: u32,
    /// The GPU. `None`: host memory, which only a stand-in for the library moves.
    pub device: Option<Arc<Device>>,
}

/// One rank of a group. Broadcasts are done in the order in which they were posted, by all ranks alike. Dropping it ends whatever
/// runs, on this rank; the others must be told by other means.
pub struct Group {
    handle: Handle,
    stream: Option<OrderedStream>,
    posted: RefCell<VecDeque<Posted>>,
}

/// A broadcast's place in the stream, if there is one, and its memory.
type Posted = (Option<Mark>, Arc<dyn Buffer>);

impl Group {
    /// Makes it together with all others, who must do so at the same time. `gives_up` is asked meanwhile.
    pub fn make(
        library: &'static Library,
        settings: &GroupSettings,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<Self, NcclError> {
        let GroupSettings { id, rank, ranks, multiprocessors_max, device } = settings;
        let stream = device.as_ref().map(OrderedStream::new).transpose()?;
        let number = |number: u32| c_int::try_from(number).unwrap_or(c_int::MAX);
        // Not blocking: what hangs in it must be given up at a deadline.
        let mut config = Config {
            size: size_of::<Config>(),
            magic: CONFIG_MAGIC,
            version: FLOOR,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: number(*multiprocessors_max),
            net_name: std::ptr::null(),
            split_share: 0,
        };
        let mut handle = Handle { library, comm: std::ptr::null_mut(), device: device.clone() };
        let made = &raw mut handle.comm;
        let status = handle.within(|| {
            // SAFETY: writes one handle, ended when it is dropped; the settings are read before the call returns, and are laid out
            // as the version that they name has them.
            unsafe { (library.init)(made, number(*ranks), *id, number(*rank), &raw mut config) }
        })?;
        library.begun("ncclCommInitRankConfig", status)?;
        handle.settle(gives_up)?;
        Ok(Self { handle, stream, posted: RefCell::default() })
    }

    /// Posts a broadcast of `len` bytes at `offset` of `buffer`: from there on the first rank, to there on the others.
    pub fn broadcast(
        &self,
        buffer: &Arc<dyn Buffer>,
        offset: u64,
        len: u64,
        gives_up: &dyn Fn() -> bool,
    ) -> Result<(), NcclError> {
        let Handle { library, comm, .. } = self.handle;
        let count = usize::try_from(len).unwrap_or(usize::MAX);
        self.post("ncclBroadcast", (buffer, offset, len), gives_up, |place, stream| {
            // SAFETY: the bytes are the buffer's, which is held until the broadcast is done or nothing of the communicator runs.
            unsafe { (library.broadcast)(place, place, count, BYTES, 0, comm, stream) }
        })
    }

    /// Posts the sum of one number of each rank, which lies at the beginning of `buffer` and is replaced.
    pub fn sum(&self, buffer: &Arc<dyn Buffer>, gives_up: &dyn Fn() -> bool) -> Result<(), NcclError> {
        let Handle { library, comm, .. } = self.handle;
        self.post("ncclAllReduce", (buffer, 0, size_of::<f32>() as u64), gives_up, |place, stream| {
            // SAFETY: as above, of one number.
            unsafe { (library.all_reduce)(place, place, 1, FLOATS, SUM, comm, stream) }
        })
    }

    fn post(
        &self,
        call: &'static str,
        (buffer, offset, len): (&Arc<dyn Buffer>, u64, u64),
        gives_up: &dyn Fn() -> bool,
        posts: impl FnOnce(*mut c_void, *mut c_void) -> Status,
    ) -> Result<(), NcclError> {
        let (address, buffer_len) = buffer.span();
        if offset.checked_add(len).is_none_or(|end| end > buffer_len) {
            return Err(NcclError::OutOfRange { call, offset, len, buffer_len });
        }
        let mark = self.stream.as_ref().map(|stream| Mark::new(stream.device())).transpose()?;
        let stream = self.stream.as_ref().map_or(std::ptr::null_mut(), OrderedStream::raw);
        let place = std::ptr::without_provenance_mut::<c_void>(usize::try_from(address + offset).unwrap_or(0));
        // Held before it is posted: what is posted runs until it is done, or the communicator is ended.
        self.posted.borrow_mut().push_back((mark, buffer.clone()));
        let status = self.handle.within(|| posts(place, stream))?;
        self.handle.library.begun(call, status)?;
        // Until the call has ended there must be no other, and nothing of it is in the stream for sure.
        self.handle.settle(gives_up)?;
        if let (Some(stream), Some((Some(mark), _))) = (&self.stream, self.posted.borrow().back()) {
            stream.mark(mark)?;
        }
        Ok(())
    }

    /// How many broadcasts that were posted are not done. An error: the communicator is beyond use.
    pub fn under_way(&self) -> Result<usize, NcclError> {
        let settled = self.handle.settled()?;
        let mut posted = self.posted.borrow_mut();
        while settled
            && let Some((mark, _)) = posted.front()
            && mark.as_ref().map_or(Ok(true), Mark::passed)?
        {
            posted.pop_front();
        }
        Ok(posted.len())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.handle.end();
        if let Some(stream) = &self.stream {
            // What ran was told to end; after this nothing touches the buffers.
            let _ = stream.wait();
        }
    }
}
