//! Moves bytes between regions.
//!
//! A [`Transport`] exports this process's regions, and connects to what a peer exported. The [`Link`] that comes out takes
//! a [`TransferRequest`] and later yields exactly one [`Completion`] for it (TR-1), once the bytes are visible at the
//! destination (TR-2); after that completion no write of the transfer lands (TR-3). It does not retry, split over paths or
//! reorder: `kv` does, from above. To add a path, pass `conformance.rs`, then add its line to `select.rs`.

mod run_list;

pub use run_list::{Run, RunList, Segment};
