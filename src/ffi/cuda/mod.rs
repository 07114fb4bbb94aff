//! NVIDIA's driver library, `libcuda.so.1`: devices, their memory, memory of other processes, and our kernels. The
//! driver, not the runtime library: it is the one that every GPU machine has, in one copy, whatever PyTorch brings.

mod copier;
mod device;
mod digester;
mod driver;
mod idle;
mod list_kernel;
mod ordered_stream;
mod pinned;
mod sight;
mod signal;
mod stream;
mod survey;

pub use copier::{Copier, CopyFew, CopyKind, CopyRows, CopySlot};
pub use device::{Allocation, Device, DeviceMemory, IpcHandle, Mapped, Pin, allocated_bytes};
pub use digester::{DigestTile, Digester, Reach, SUMS_MAX};
pub use driver::CudaError;
pub use ordered_stream::{Mark, OrderedStream};
pub use sight::{Sight, uuid_text};
pub use survey::{Gpu, Pair, Survey, survey};

#[cfg(test)]
#[path = "../../../tests/support/fake_cuda.rs"]
mod fake_cuda;

#[cfg(test)]
mod tests {
    use super::fake_cuda::{Driver, pass};

    /// KV-4 and WT-5: a GPU's kernel digests as the processor does. The stand-in's are those kernels in C.
    #[test]
    fn digests_of_a_gpu_are_those_of_the_processor_over_a_stand_in_too() {
        for driver in [Driver::New, Driver::Old] {
            pass(driver, &[], &["a_gpu_makes_the_same_digest", "a_gpu_digests_like_the_processor"], 2);
        }
    }

    #[test]
    fn copies_of_few_runs_outlive_a_failed_launch_over_a_stand_in() {
        for (driver, switches) in
            [(Driver::New, &[][..]), (Driver::Old, &[]), (Driver::New, &[("FAKE_CUDA_NO_WRITES", "1")])]
        {
            pass(driver, switches, &["a_failed_launch_holds_nobody_up"], 1);
        }
    }
}
