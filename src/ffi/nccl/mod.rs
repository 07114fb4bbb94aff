//! NCCL, `libnccl.so.2`: communicators of two ranks, and what they send and receive; and of many, in
//! which one sends to all. The library that the process has already
//! (PyTorch's) is taken before any other, because two copies of NCCL in a process know nothing of each other's memory.
//!
//! The declarations are written by hand: fourteen functions of a C interface that keeps its promises since 2.18, which the
//! structure of settings names as the version that it was written for.

mod communicator;
mod group;
mod library;

pub use communicator::{Buffer, Communicator, Half, Origin, Settings, Side};
pub use group::{Group, GroupSettings};
pub use library::{FLOOR, Library, NcclError, UNIQUE_ID_BYTES, UniqueId};
