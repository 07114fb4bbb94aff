//! Prefill-to-decode channels: KV blocks from one worker's cache into another's.
//!
//! An engine holds a [`KvRuntime`] as a [`KvLink`]: prefill offers, decode expects and fetches, and each hears exactly one
//! [`Report`] per transfer. What a transfer is made of:
//!
//! - *where bytes lie*: `geometry`, `layout` (checked), `shares` (which rank has to do with which), `run_list` (from
//!   blocks to runs), `digest`;
//! - *what is said*: `params` and `card` (through the router), `messages` (between two runtimes);
//! - *what may happen*: `channel`, pure machines for each side;
//! - *what is done*: `core`, the thread that owns all of it, with `producer`, `claims`, `pushes`, `parts` and `clients` on prefill,
//!   `consumer`, `copies` and `peers` on decode, `siblings` between the ranks of one worker, and `traffic` for those
//!   who watch.
//!
//! Invariants KV-1 to KV-9 are stated in `docs/architecture.md`; the machines and the tests name those that they hold.
#![forbid(unsafe_code)]

mod card;
mod channel;
mod claims;
mod clients;
mod consumer;
mod copies;
mod core;
mod digest;
mod digesting;
mod error;
mod geometry;
mod layout;
mod link;
mod marks;
mod messages;
mod metrics;
mod moved;
mod params;
mod parts;
mod past;
mod peers;
mod producer;
mod push_gate;
mod pushes;
mod report;
mod run_list;
mod runtime;
mod shares;
mod siblings;
mod traffic;

#[cfg(test)]
#[path = "../../tests/support/kv_cache.rs"]
mod testing;

pub use crate::control::{EarlyParams, Role, RuntimeStatus, TransferId};
pub use card::{ParamsMaker, RankCard};
pub use digest::{Span, digest};
pub use error::KvError;
pub use geometry::{BlockId, Geometry, GroupGeometry, GroupKind, HeadRange, LayerPlacement};
pub use layout::{Layout, LayoutError, MemoryMap, RankMemory};
pub use link::{Begin, KvLink, Offer, Progress, Prompt, TransferHandle};
pub use messages::{Basis, CheckedInfo, Claim, Ending, Granted, InfoError, PeerInfo, Place, ToDecode, ToPrefill};
pub use metrics::{KvFigures, KvMetrics};
pub use params::{
    BLOCKS_MAX, GROUPS_MAX, KvRequest, PARAMS_VERSION, ParamsError, PdlinkParams, RankEndpoint, TransferParams,
};
pub use report::{End, Report, TransferFailure};
pub use run_list::{Extent, PairPlan, Part};
pub use runtime::{KvRuntime, ReportSink, RuntimeConfig};
