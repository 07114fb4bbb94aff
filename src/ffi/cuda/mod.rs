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
mod signal;
mod survey;

pub use copier::{Copier, CopyKind, CopyRows, CopySlot};
pub use device::{Allocation, Device, DeviceMemory, IpcHandle, Mapped, Pin, allocated_bytes};
pub use digester::{DigestTile, Digester, SUMS_MAX};
pub use driver::CudaError;
pub use ordered_stream::{Mark, OrderedStream};
pub use survey::{Gpu, Pair, Survey, survey};
