//! NIXL, by the C face that its Python wheels carry (`libnixl_capi.so` of `nixl-cu12` and `nixl-cu13`): agents, the memory
//! they register, what they tell about it, and transfers. Nothing here may leave the thread that made the agent.
//!
//! The declarations are written by hand: NIXL installs no header for this face, the part that is used is small, and a test
//! (`tests/ffi_abi.rs`) holds it against the real library. They are the same in versions 0.9 to 1.5.
//!
//! Two habits of the library shape the types. A request is freed by the library itself when its status is asked after its
//! peer's metadata is gone, so a [`Transfer`] holds its [`Remote`]. And neither letting go of a request that has not ended
//! nor forgetting its peer keeps its bytes from landing: only the end of the [`Agent`] does.

mod agent;
mod library;
mod transfer;

pub use agent::{Agent, AgentSetup, MemoryType, Registrable, Span};
pub use library::{Library, NixlError, TESTED, is_untested};
pub use transfer::{Direction, Progress, Remote, Transfer};
