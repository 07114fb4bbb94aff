//! Prefill-to-decode channels.
#![forbid(unsafe_code)]

mod error;
mod geometry;
mod layout;
mod link;
mod params;
mod report;

pub use crate::control::{Role, RuntimeStatus, TransferId};
pub use error::KvError;
pub use geometry::{BlockId, Geometry, HeadRange, LayerPlacement};
pub use layout::LayoutError;
pub use link::{KvLink, Offer, TransferHandle};
pub use params::{BLOCKS_MAX, KvRequest, PARAMS_VERSION, ParamsError, PdlinkParams, TransferParams};
pub use report::{End, Report, TransferFailure};
