//! One record per transfer and side: the proof of which path carried the KV.

use serde::{Deserialize, Serialize};

use crate::config::{Dispatch, Path};

/// Which end of a transfer wrote the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    Prefill,
    Decode,
}

impl Side {
    /// The name used in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// How a transfer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransferOutcome {
    /// Prefill confirmed it and decode has it.
    Done,
    /// It failed; the text names what, which peer, and the mend if one is known.
    Failed(String),
    /// The client left, or a leg was cancelled.
    Aborted,
    /// Nobody came for the blocks within the lease.
    Expired,
}

/// What one side knows about one transfer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferRecord {
    /// 32 hex digits, as in the `x-pdlink-transfer-id` header.
    pub transfer_id: String,
    pub side: Side,
    /// Engine id of this side, and of the other once it is known.
    pub engine_id: String,
    pub peer_engine_id: Option<String>,
    /// This side's tensor-parallel rank; the first, where one runtime holds all of its worker's.
    pub rank: u32,
    /// The path that carried the bytes; `None` when no byte had to move.
    pub path: Option<Path>,
    pub bytes: u64,
    /// Runs in the run list, and requests posted to the path for them.
    pub runs: u64,
    pub posts: u64,
    pub blocks: u64,
    pub tokens: u64,
    /// From the start of this side's part to the first byte, in microseconds.
    pub wait_us: u64,
    /// From the first byte to the last, in microseconds.
    pub copy_us: u64,
    /// From the last byte to prefill's confirmation, in microseconds.
    pub validate_us: u64,
    /// Whether decode claimed it while prefill was still to compute it, or computing it.
    pub dispatch: Dispatch,
    /// With concurrent dispatch: from prefill's end to the last byte, in microseconds. The rest was moved under prefill, and
    /// is in `copy_us` too.
    pub exposed_us: u64,
    /// Whether a digest was compared (KV-4).
    pub digest_checked: bool,
    pub weight_version: u64,
    /// When it had ended, by this host's clock, in microseconds since 1970.
    pub ended_unix_us: u64,
    pub outcome: TransferOutcome,
}
