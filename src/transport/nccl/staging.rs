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
    buffers_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: Vec<Buffer>,
    made: usize,
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
        let buffers_max = usize::try_from(bytes / 2 / buffer_bytes).unwrap_or(1).max(1);
        let pool = || Arc::new(Pool { device: device.cloned(), buffer_bytes, buffers_max, state: Mutex::default() });
        Self { sending: pool(), receiving: pool() }
    }

    pub(super) fn buffer_bytes(&self) -> u64 {
        self.sending.buffer_bytes
    }

    /// A buffer for one half of a request; `None` if all are in use. Nobody waits in here: who asks may hold the one that comes
    /// free next.
    pub(super) fn take(&self, half: Half) -> Result<Option<Slot>, String> {
        let pool = if half == Half::Send { &self.sending } else { &self.receiving };
        let mut state = locked(&pool.state);
        if state.free.is_empty() && state.made < pool.buffers_max {
            let buffer = pool.make()?;
            state.made += 1;
            return Ok(Some(Slot { buffer: Some(buffer), pool: pool.clone() }));
        }
        Ok(state.free.pop().map(|buffer| Slot { buffer: Some(buffer), pool: pool.clone() }))
    }
}

impl Pool {
    fn make(&self) -> Result<Buffer, String> {
        let len = to_usize(self.buffer_bytes);
        let Some(device) = &self.device else {
            return Region::shared(len).map(|memory| Buffer { memory, mark: None }).map_err(|error| error.to_string());
        };
        let failed = |error| format!("a staging buffer of {} MiB: {error}", self.buffer_bytes >> 20);
        let memory = Region::allocated_on(device, len).map_err(failed)?;
        Ok(Buffer { memory, mark: Some(Mark::new(device).map_err(failed)?) })
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
}
