//! What NIXL and NCCL may be told about a region.

use super::{MemoryKind, Region};
use crate::ffi::nixl::{MemoryType, Registrable, Span};

// SAFETY: a region's bytes are there, readable and writable, for as long as it lives, and nothing ever takes a reference to
// them: that is what regions are for.
unsafe impl Registrable for Region {
    fn span(&self) -> Span {
        let device = match self.kind() {
            MemoryKind::Host => 0,
            MemoryKind::Cuda(ordinal) => u64::try_from(ordinal).unwrap_or(0),
        };
        Span { address: self.address(), len: self.len(), device }
    }

    fn memory_type(&self) -> MemoryType {
        match self.kind() {
            MemoryKind::Host => MemoryType::Host,
            MemoryKind::Cuda(_) => MemoryType::Gpu,
        }
    }
}

// SAFETY: as above. A communicator's device is the region's, or, for host memory, the processor.
unsafe impl crate::ffi::nccl::Buffer for Region {
    fn span(&self) -> (u64, u64) {
        (self.address(), self.len())
    }
}
