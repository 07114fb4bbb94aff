//! Memory that scattered runs are packed into before they are sent, and received into before they are put in their places.
//!
//! Bounded for the whole process, in buffers of one size, made when they are first needed and then kept. Half of them send and
//! half receive: whoever holds one to send into has a peer that receives already, so a sender always gets on, and nobody
//! waits in a circle.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use crate::ffi::cuda::{Device, Mark};
use crate::ffi::nccl::Half;
use crate::memory::{Region, to_usize};
use crate::transport::flight::locked;

/// All staging of a process.
pub(super) struct Staging {
    sending: Arc<Pool>,
    receiving: Arc<Pool>,
}

struct Pool {
    device: Option<Arc<Device>>,
    buffer_bytes: u64,
    state: Mutex<State>,
}

struct State {
    free: Vec<Buffer>,
    made: usize,
    /// Most that are made. Fewer than was meant, once there was no memory for more.
    most: usize,
}

struct Buffer {
    memory: Arc<Region>,
    /// Behind what was last done with it. Host memory has none.
    mark: Option<Mark>,
}

/// A buffer, to be used by one request; goes back when dropped.
pub(super) struct Slot {
    buffer: Option<Buffer>,
    pool: Arc<Pool>,
}

impl Staging {
    /// Of `bytes` altogether at the most, on `device` or in host memory.
    pub(super) fn new(device: Option<&Arc<Device>>, bytes: u64, buffer_bytes: u64) -> Self {
        let most = usize::try_from(bytes / 2 / buffer_bytes).unwrap_or(1).max(1);
        let pool = || {
            let state = Mutex::new(State { free: Vec::new(), made: 0, most });
            Arc::new(Pool { device: device.cloned(), buffer_bytes, state })
        };
        Self { sending: pool(), receiving: pool() }
    }

    pub(super) fn buffer_bytes(&self) -> u64 {
        self.sending.buffer_bytes
    }

    /// A buffer for one half of a request; `None` if all are in use. Nobody waits in here: who asks may hold the one that comes
    /// free next. An error only if there is none to wait for, and no memory for the first.
    pub(super) fn take(&self, half: Half) -> Result<Option<Slot>, String> {
        let pool = if half == Half::Send { &self.sending } else { &self.receiving };
        let mut state = locked(&pool.state);
        let buffer = match state.free.pop() {
            Some(buffer) => Some(buffer),
            None => state.one_more(|| pool.make())?,
        };
        Ok(buffer.map(|buffer| Slot { buffer: Some(buffer), pool: pool.clone() }))
    }
}

impl State {
    /// A buffer that was not there before, unless there are as many as there may be.
    fn one_more(&mut self, make: impl FnOnce() -> Result<Buffer, String>) -> Result<Option<Buffer>, String> {
        if self.made >= self.most {
            return Ok(None);
        }
        match make() {
            Ok(buffer) => {
                self.made += 1;
                Ok(Some(buffer))
            }
            Err(reason) if self.made > 0 => {
                tracing::warn!(%reason, buffers = self.made, wanted = self.most, "nccl stages in fewer buffers");
                // For good: who waits would otherwise ask the driver again and again.
                self.most = self.made;
                Ok(None)
            }
            Err(reason) => Err(reason),
        }
    }
}

impl Pool {
    fn make(&self) -> Result<Buffer, String> {
        let len = to_usize(self.buffer_bytes);
        let mend = match &self.device {
            Some(_) => "leave it more (vLLM's --gpu-memory-utilization), or lower kv.nccl.staging_mib",
            None => "lower kv.nccl.staging_mib",
        };
        let failed = |reason: String| format!("a staging buffer of {} MiB: {reason}; {mend}", self.buffer_bytes >> 20);
        let Some(device) = &self.device else {
            let memory = Region::shared(len).map_err(|error| failed(error.to_string()))?;
            return Ok(Buffer { memory, mark: None });
        };
        let memory = Region::allocated_on(device, len).map_err(|error| failed(error.to_string()))?;
        Ok(Buffer { memory, mark: Some(Mark::new(device).map_err(|error| failed(error.to_string()))?) })
    }
}

impl Slot {
    fn buffer(&self) -> &Buffer {
        self.buffer.as_ref().expect("taken only when dropped")
    }

    pub(super) fn memory(&self) -> &Arc<Region> {
        &self.buffer().memory
    }

    pub(super) fn mark(&self) -> Option<&Mark> {
        self.buffer().mark.as_ref()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            locked(&self.pool.state).free.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_bounded_reused_and_apart_for_each_half() {
        let staging = Staging::new(None, 4 << 20, 1 << 20);
        let take = |half| staging.take(half).unwrap();
        let (first, second) = (take(Half::Send).unwrap(), take(Half::Send).unwrap());
        assert!(take(Half::Send).is_none());
        assert!(take(Half::Receive).is_some(), "senders never take from those who receive");
        let address = first.memory().address();
        drop(first);
        assert_eq!(take(Half::Send).unwrap().memory().address(), address);
        drop(second);
    }

    #[test]
    fn who_finds_no_memory_waits_for_what_there_is_and_fails_only_with_nothing() {
        let buffer = || Ok(Buffer { memory: Region::shared(4096).unwrap(), mark: None });
        let none = || Err("no memory".to_owned());
        let mut state = State { free: Vec::new(), made: 0, most: 3 };
        assert_eq!(state.one_more(none).err().as_deref(), Some("no memory"), "there is none to wait for");
        assert!(state.one_more(buffer).unwrap().is_some(), "and the next one may have more luck");
        assert!(state.one_more(none).unwrap().is_none(), "the one that is out comes back");
        assert!(state.one_more(|| panic!("the driver was asked already")).unwrap().is_none());
    }
}
