//! Prefill-to-decode channels.
#![forbid(unsafe_code)]

mod digest;
mod error;
mod geometry;
mod layout;
mod link;
mod params;
mod report;
mod run_list;

#[cfg(test)]
#[path = "../../tests/support/kv_cache.rs"]
mod testing;

pub use crate::control::{Role, RuntimeStatus, TransferId};
pub use digest::{Span, digest, row as digest_row, row_key as digest_row_key};
pub use error::KvError;
pub use geometry::{BlockId, Geometry, HeadRange, LayerPlacement};
pub use layout::{Layout, LayoutError, MemoryMap, RankMemory};
pub use link::{KvLink, Offer, TransferHandle};
pub use params::{BLOCKS_MAX, KvRequest, PARAMS_VERSION, ParamsError, PdlinkParams, TransferParams};
pub use report::{End, Report, TransferFailure};
pub use run_list::{Extent, PairPlan};
