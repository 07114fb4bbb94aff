//! Libraries that are not ours, one folder each, opened at run time where they exist: a machine without a GPU has none, and
//! a program that named them at link time would not start there. All that is unsafe about them stays in here; what comes
//! out are owned handles and errors that name the call.
#![deny(unsafe_op_in_unsafe_fn)]

pub mod cuda;
pub mod nccl;
pub mod nixl;
pub mod nvml;
mod search;
pub mod ucx;

pub use search::Search;
