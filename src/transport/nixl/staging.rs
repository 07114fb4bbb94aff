//! Memory that short runs are packed into, and when that is done.
//!
//! NIXL makes one request of its backend for every run, and over most backends each costs some microseconds whatever its length.
//! So many short runs go packed: whoever has the bytes copies them into a slot of its staging, one run of NIXL's carries the
//! slot, and whoever wants them copies them to their places. Three copies of what a cache holds cost less than many requests.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::NixlSetup;
use crate::ffi::nixl::MemoryType;
use crate::memory::{AccessError, Device, GpuCopies, GpuRun, Launches, Region, to_usize};
use crate::transport::Totals;
use crate::transport::flight::locked;

/// Most multiprocessors that packing takes from the engine.
const MULTIPROCESSORS_MAX: u32 = 16;
/// Slots that one peer is lent: enough that some are packed while one is on its way and one is unpacked.
pub(super) const LENT_MAX: usize = 8;
/// Pieces that fill a slot.
const PIECES_PER_SLOT: u64 = 4;
/// Most runs of a slot: what names them must fit into one message.
pub(super) const SLOT_RUNS_MAX: usize = 8192;

/// How much is packed, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Packing {
    /// Staging of this process, half of it for what it submits, half lent to peers. Below four slots nothing is packed.
    pub(super) staging_bytes: u64,
    /// Runs are packed that have at most this many bytes on average ...
    pub(super) run_bytes_max: u64,
    /// ... and of which a transfer has at least this many.
    pub(super) runs_min: u64,
}

/// What a process takes of a GPU where nothing is configured, in MiB.
pub const GPU_STAGING_MB: u64 = 256;

impl Packing {
    /// As configured, else what suits the memory. One request for a run of GPU memory costs as much as copying some hundred KiB;
    /// of host memory as much as copying 16 KiB, and there UCX's threads share them ([`super::spread`]).
    pub(super) fn of(setup: &NixlSetup, memory: MemoryType) -> Self {
        let (staging_mb, run_kb, runs_min) = match memory {
            MemoryType::Host => (0, 32, 16),
            MemoryType::Gpu => (GPU_STAGING_MB, 512, 8),
        };
        Self {
            staging_bytes: setup.staging_mb.unwrap_or(staging_mb).saturating_mul(1 << 20),
            run_bytes_max: setup.pack_run_kb.unwrap_or(run_kb).saturating_mul(1 << 10),
            runs_min: setup.pack_runs_min.unwrap_or(runs_min),
        }
    }

    /// Whether such a transfer goes packed.
    pub(super) fn suits(&self, totals: Totals) -> bool {
        totals.runs >= self.runs_min.max(1) && totals.bytes / totals.runs <= self.run_bytes_max
    }
}

/// Bytes of a slot: in host memory what stays in a core's cache between two copies, on a GPU what fills the link.
fn slot_bytes(memory: MemoryType) -> u64 {
    match memory {
        MemoryType::Host => 512 << 10,
        MemoryType::Gpu => 8 << 20,
    }
}

/// Most bytes of a piece of a transfer that goes in slots of this size.
pub(super) fn piece_bytes_max(slot_bytes: u64) -> u64 {
    (slot_bytes / PIECES_PER_SLOT).max(1)
}

/// Slots of equal size in one region.
pub(super) struct Slots {
    pub(super) region: Arc<Region>,
    pub(super) slot_bytes: u64,
    free: Mutex<Vec<u16>>,
}

impl Slots {
    /// As many slots as go into `bytes`. `None`: too few to be of use.
    pub(super) fn new(bytes: u64, memory: MemoryType, gpu: Option<&Arc<Device>>) -> Result<Option<Self>, String> {
        let slot_bytes = slot_bytes(memory);
        let Some(count) = u16::try_from(bytes / slot_bytes).ok().filter(|count| *count >= 2) else { return Ok(None) };
        let len = to_usize(slot_bytes * u64::from(count));
        let region = match gpu {
            Some(gpu) => Region::allocated_on(gpu, len).map_err(|error| error.to_string())?,
            None => Region::shared(len).map_err(|error| error.to_string())?,
        };
        // The lowest first: what was used last is still in the caches.
        Ok(Some(Self { region, slot_bytes, free: Mutex::new((0..count).rev().collect()) }))
    }

    pub(super) fn take(&self) -> Option<u16> {
        locked(&self.free).pop()
    }

    pub(super) fn give(&self, slot: u16) {
        locked(&self.free).push(slot);
    }

    /// Where a slot starts.
    pub(super) fn offset(&self, slot: u16) -> u64 {
        u64::from(slot) * self.slot_bytes
    }
}

/// Runs in one region, as (offset, bytes), in the order in which they lie in a slot.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Part {
    pub(super) region: u16,
    pub(super) runs: Vec<(u64, u64)>,
}

/// Which way a copy goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Copying {
    IntoSlot,
    OutOfSlot,
}

/// Copies between regions and slots; one for each thread that does.
pub(super) struct Copies(Option<GpuCopies>);

impl Copies {
    pub(super) fn on(gpu: Option<&Arc<Device>>) -> Result<Self, String> {
        let made = gpu.map(|gpu| GpuCopies::on(gpu, MULTIPROCESSORS_MAX, Launches::ONE)).transpose();
        Ok(Self(made.map_err(|error| error.to_string())?))
    }

    /// Copies all runs of `parts` into the slot that starts at `at`, or out of it. The parts name regions that there are.
    pub(super) fn copy(
        &mut self,
        copying: Copying,
        regions: &[Arc<Region>],
        parts: &[Part],
        (staging, at): (&Region, u64),
    ) -> Result<(), AccessError> {
        let mut at = at;
        let runs = parts.iter().flat_map(|part| part.runs.iter().map(|run| (part.region, *run)));
        let placed = runs.map(|(region, (offset, len))| {
            let (region, slot_offset) = (&*regions[usize::from(region)], at);
            at += len;
            match copying {
                Copying::IntoSlot => {
                    GpuRun { src: region, src_offset: offset, dst: staging, dst_offset: slot_offset, len }
                }
                Copying::OutOfSlot => {
                    GpuRun { src: staging, src_offset: slot_offset, dst: region, dst_offset: offset, len }
                }
            }
        });
        match &mut self.0 {
            Some(copies) => copies.copy(placed),
            None => copy_on_host(copying, placed),
        }
    }
}

fn copy_on_host<'a>(copying: Copying, mut runs: impl Iterator<Item = GpuRun<'a>>) -> Result<(), AccessError> {
    match copying {
        // What is to be sent next stays in the caches; what is in its place leaves them to whoever needs them.
        Copying::IntoSlot => runs.try_for_each(|run| run.src.copy_to(run.src_offset, run.dst, run.dst_offset, run.len)),
        Copying::OutOfSlot => runs
            .try_for_each(|run| run.src.stream_to(run.dst, std::iter::once((run.src_offset, run.dst_offset, run.len)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NixlConfig;

    #[test]
    fn many_short_runs_are_packed_and_a_few_or_long_ones_are_not() {
        let totals = |runs: u64, run_bytes: u64| Totals { bytes: runs * run_bytes, runs, posts: 1 };
        let of = |config: &NixlConfig, memory| Packing::of(&NixlSetup::of(config, 1), memory);
        let host = of(&NixlConfig::default(), MemoryType::Host);
        assert!(host.suits(totals(2048, 16 << 10)) && host.suits(totals(16, 512)));
        assert!(!host.suits(totals(1, 4096)) && !host.suits(totals(15, 4096)) && !host.suits(totals(2048, 64 << 10)));
        let gpu = of(&NixlConfig::default(), MemoryType::Gpu);
        assert!(gpu.suits(totals(2048, 64 << 10)) && !gpu.suits(totals(1, 256 << 20)));
        assert!(!host.suits(Totals::default()));
        let set = NixlConfig { pack_run_kb: Some(0), staging_mb: Some(1), ..NixlConfig::default() };
        let set = of(&set, MemoryType::Host);
        assert!(!set.suits(totals(2048, 16)) && set.staging_bytes == 1 << 20);
    }

    #[test]
    fn what_goes_into_a_slot_comes_out_at_its_place() {
        let regions = [Region::shared(8192).unwrap(), Region::shared(8192).unwrap()];
        let staging = Slots::new(2 << 20, MemoryType::Host, None).unwrap().unwrap();
        regions[0].copy_in(100, b"first").unwrap();
        regions[1].copy_in(7, b"second").unwrap();
        let part = |region, runs: &[(u64, u64)]| Part { region, runs: runs.to_vec() };
        let mut copies = Copies::on(None).unwrap();
        let slot = (staging.take().unwrap(), staging.take().unwrap()).1;
        let at = (&*staging.region, staging.offset(slot));
        copies.copy(Copying::IntoSlot, &regions, &[part(0, &[(100, 5)]), part(1, &[(7, 3), (10, 3)])], at).unwrap();
        assert_eq!(staging.region.to_vec(512 << 10, 11).unwrap(), b"firstsecond");
        copies.copy(Copying::OutOfSlot, &regions, &[part(1, &[(4000, 2), (5000, 9)])], at).unwrap();
        assert_eq!(regions[1].to_vec(4000, 2).unwrap(), b"fi");
        assert_eq!(regions[1].to_vec(5000, 9).unwrap(), b"rstsecond");
        assert!(copies.copy(Copying::OutOfSlot, &regions, &[part(1, &[(8190, 3)])], at).is_err());
    }

    #[test]
    fn staging_too_small_for_two_slots_is_none() {
        assert!(Slots::new(1023 << 10, MemoryType::Host, None).unwrap().is_none());
        let two = Slots::new(1 << 20, MemoryType::Host, None).unwrap().unwrap();
        assert_eq!((two.take(), two.take(), two.take()), (Some(0), Some(1), None));
        two.give(1);
        assert_eq!(two.take(), Some(1));
    }
}
