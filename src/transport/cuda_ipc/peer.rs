//! A peer's GPU memory, mapped.
#![forbid(unsafe_code)]

use std::sync::Arc;

use super::{Description, RegionDescription};
use crate::ffi::cuda::{Device, Sight, uuid_text};
use crate::memory::Region;
use crate::transport::mapped::PeerMemory;
use crate::transport::process::Process;
use crate::transport::{Direction, TransportError};

/// One peer process and our way into its memory. Dropping it unmaps everything.
pub struct Peer {
    process: Process,
    allocations: Vec<Arc<Region>>,
    /// For each of its regions: which allocation, and where in it.
    theirs: Vec<(usize, u64)>,
    their_lens: Vec<u64>,
    ours: Arc<[Arc<Region>]>,
    our_lens: Vec<u64>,
    on_our_gpu: bool,
}

/// Where a region of ours or theirs starts.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) region: &'a Region,
    pub(super) offset: u64,
}

impl Peer {
    pub(super) fn open(
        device: &Arc<Device>,
        description: &Description,
        ours: Arc<[Arc<Region>]>,
    ) -> Result<Self, TransportError> {
        let process = Process::open(&description.owner, "cuda-ipc")?;
        let name = process.name().to_owned();
        let unreachable = |reason: String| TransportError::Unreachable { path: "cuda-ipc", peer: name.clone(), reason };
        if process.is_this() {
            return Err(unreachable("a process cannot map its own GPU memory".to_owned()));
        }
        let map = |allocation: &super::SharedAllocation| {
            Region::of_gpu_peer(device, &allocation.handle, allocation.len)
                .map_err(|error| unreachable(format!("{error}; {}", why(device, &description.gpu))))
        };
        let allocations = description.allocations.iter().map(map).collect::<Result<Vec<_>, _>>()?;
        let place = |region: &RegionDescription| {
            let at = usize::try_from(region.allocation).ok()?;
            allocations.get(at)?.check(region.offset, region.len).ok()?;
            Some((at, region.offset))
        };
        let theirs: Option<Vec<_>> = description.regions.iter().map(place).collect();
        let theirs = theirs.ok_or_else(|| unreachable("a region lies outside its allocation".to_owned()))?;
        let their_lens = description.regions.iter().map(|region| region.len).collect();
        let our_lens = ours.iter().map(|region| region.len()).collect();
        let on_our_gpu = device.uuid().is_ok_and(|uuid| uuid == description.gpu);
        Ok(Self { process, allocations, theirs, their_lens, ours, our_lens, on_our_gpu })
    }

    pub(super) fn on_our_gpu(&self) -> bool {
        self.on_our_gpu
    }

    /// Where source and destination of a copy start. Both were found to exist when it was admitted.
    pub(super) fn ends(&self, direction: Direction, src: u16, dst: u16) -> (Place<'_>, Place<'_>) {
        match direction {
            Direction::Pull => (self.their_place(src), self.our_place(dst)),
            Direction::Push => (self.our_place(src), self.their_place(dst)),
        }
    }

    fn our_place(&self, region: u16) -> Place<'_> {
        Place { region: &self.ours[usize::from(region)], offset: 0 }
    }

    fn their_place(&self, region: u16) -> Place<'_> {
        let (allocation, offset) = self.theirs[usize::from(region)];
        Place { region: &self.allocations[allocation], offset }
    }
}

/// Why memory of the GPU `theirs` may be out of reach, and what helps.
fn why(device: &Device, theirs: &[u8; 16]) -> String {
    let (gpu, ours) = (uuid_text(theirs), device.ordinal());
    match device.sight_of(theirs) {
        Ok(Sight::Visible { ordinal, reached: false }) => format!(
            "its memory is on {gpu}, GPU {ordinal} here, to which GPU {ours} has no peer access; pair GPUs that have \
             (`pdlink doctor`, gpu-peers), or allow nccl in kv.paths"
        ),
        Ok(Sight::Elsewhere { visible, variable }) => format!(
            "its memory is on {gpu}, none of the {visible} that are visible here (CUDA_VISIBLE_DEVICES is {variable}): \
             GPU {ours} has no peer access to it (`pdlink doctor`, gpu-peers), or it is another container's, or a slice \
             of one (MIG); pair whole GPUs of one container that have, or allow nccl in kv.paths"
        ),
        Ok(Sight::Same | Sight::Visible { .. }) => {
            format!("its memory is on {gpu}, which GPU {ours} reaches: it may have ended, or freed that memory")
        }
        Err(error) => format!("its memory is on {gpu}, of which the driver says nothing: {error}"),
    }
}

impl PeerMemory for Peer {
    fn name(&self) -> &str {
        self.process.name()
    }

    fn gone(&self) -> bool {
        self.process.gone()
    }

    fn lens(&self) -> (&[u64], &[u64]) {
        (&self.our_lens, &self.their_lens)
    }
}
