//! Much memory between a GPU and host memory that is not fixed in place, so that nobody else who works with the GPU waits.
//!
//! The driver takes such a copy apart itself, and lets no other thread of the process in before its end: a vLLM worker whose 16 GB of
//! weights left the GPU in one copy launched nothing for 15 s. So each part goes through a little memory that is fixed, where the
//! driver only starts it, and the processor brings it on.

use std::sync::Arc;

use super::region::{AccessError, Region};
use super::to_u64;
use crate::ffi::cuda::Device;

/// What is longer goes in parts of this size.
const PART_BYTES: usize = 8 << 20;

impl Region {
    /// Whether bytes between here and a GPU are to go in parts, by way of memory that is fixed.
    pub(super) fn takes_detour(&self, len: u64) -> bool {
        len > to_u64(PART_BYTES) && !self.is_pinned()
    }

    /// As [`Region::copy_to`], between a GPU's memory and the host's, in parts.
    pub(super) fn copy_in_parts(
        &self,
        offset: u64,
        dst: &Self,
        dst_offset: u64,
        len: u64,
        device: &Arc<Device>,
    ) -> Result<(), AccessError> {
        let bounce = Self::shared(PART_BYTES).map_err(|error| AccessError::NoMemory(error.to_string()))?;
        if let Err(error) = bounce.pin_for(device) {
            tracing::debug!(%error, "memory between a GPU and the host is not fixed: copies are slower");
        }
        let mut done = 0;
        while done < len {
            let part = (len - done).min(to_u64(PART_BYTES));
            self.copy_to(offset + done, &bounce, 0, part)?;
            bounce.copy_to(0, dst, dst_offset + done, part)?;
            done += part;
        }
        Ok(())
    }
}
