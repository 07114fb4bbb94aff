//! What any part may ask an engine's runtime over a control connection, and what it answers.

use serde::{Deserialize, Serialize};

use super::{TransferId, WeightsRequest, WeightsStatus};
use crate::config::{Path, Role};
use crate::telemetry::TransferRecord;

/// Which program is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// A worker's runtime.
    Engine,
    /// The proxy or the launcher.
    Admin,
    /// A worker that fetches weights.
    Weights,
    /// The launcher of a node.
    Node,
}

/// What an abort found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AbortAnswer {
    /// The transfer was in progress; its blocks are being freed.
    Aborted,
    /// It had ended before.
    Ended,
    /// Nothing is known of it. The id is remembered for a while, and refused when it comes.
    Unknown,
}

/// A pair that can work (KV-6).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paired {
    /// The path that bytes between the two will take.
    pub path: Path,
    pub peer_engine_id: String,
}

/// What a worker's ranks know of one transfer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankRecords {
    /// In order of rank.
    pub records: Vec<TransferRecord>,
    /// Ranks that could not be asked, and why.
    pub unheard: Vec<String>,
}

/// A runtime at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeStatus {
    pub engine_id: String,
    /// Drawn anew at each start: tells a worker from its restarted self (KV-8).
    pub incarnation: u64,
    pub role: Role,
    /// Blocks that prefill holds for decode workers.
    pub held_blocks: u64,
    /// Transfers of either side that have not been reported yet.
    pub transfers_active: u64,
    pub weight_version: u64,
}

/// What decode has fetched from one prefill worker over one path, since its runtime started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkTraffic {
    pub peer_engine_id: String,
    /// `None`: transfers that ended before a path was chosen, or that had nothing to move.
    pub path: Option<Path>,
    pub done: u64,
    pub failed: u64,
    pub bytes: u64,
    /// Of those that were done, in microseconds.
    pub wait_us: u64,
    pub copy_us: u64,
    pub validate_us: u64,
}

/// A transfer that failed, or that nobody came for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecentFailure {
    /// The rank whose runtime it is.
    pub rank: u32,
    /// Counts up from 1 with each failure of a runtime.
    pub number: u64,
    pub at_unix_ms: u64,
    pub transfer_id: String,
    /// The short name that metrics use.
    pub kind: String,
    pub cause: String,
}

/// A runtime and what went over its links.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub status: RuntimeStatus,
    /// What the worker's clock said when this was told, in microseconds since 1970.
    pub told_unix_us: u64,
    /// By peer and path.
    pub links: Vec<LinkTraffic>,
    /// Engine ids of prefill workers that every rank is connected with, and the path to each.
    pub connected: Vec<(String, Path)>,
    /// The last of them, oldest first.
    pub failures: Vec<RecentFailure>,
    /// Ranks that could not be asked, and why: their part is missing.
    pub unheard: Vec<String>,
}

/// A question to a runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminRequest {
    /// On every rank of the worker.
    Abort(TransferId),
    /// Of every rank of the worker.
    Records(TransferId),
    /// Of a prefill worker with a runtime for each of so many ranks: which of them this runtime has to do with.
    PeersOf(u32),
    /// Connect to the prefill worker at this `host:port` now, and say whether the pair can work.
    Pair(String),
    Status,
    /// On this rank alone: how the ranks of a worker pass an abort on.
    AbortHere(TransferId),
    /// Of this runtime alone.
    RecordsHere(TransferId),
    Weights(WeightsRequest),
    /// Of every rank of the worker, added up.
    Traffic,
    TrafficHere,
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminAnswer {
    Abort(AbortAnswer),
    Records(RankRecords),
    PeersOf(Vec<u32>),
    Pair(Paired),
    Status(RuntimeStatus),
    /// The request was understood and refused; the text says why.
    Refused(String),
    Weights(Box<WeightsStatus>),
    Traffic(Box<Traffic>),
}
