//! How a transfer ended, as its engine is told: exactly once for each `offer` and each `expect` (KV-1).

use serde::{Deserialize, Serialize};

use crate::control::TransferId;
use crate::telemetry::Side;

/// The one report that ends a transfer on one side (KV-1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    pub transfer_id: TransferId,
    /// Which end of the transfer this process was. A worker of role `both` can be both ends at once.
    pub side: Side,
    pub end: End,
}

/// How it ended. After the report the runtime neither reads nor writes the transfer's blocks, but see `fenced`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Prefill: decode has the KV and has validated it.
    Sent,
    /// Decode: the KV is in its blocks and prefill has confirmed it (KV-3).
    Received,
    /// Decode: `release` was called; nothing was loaded.
    Released,
    /// Either side: `abort` was called here, by the proxy, or on the other side.
    Aborted,
    /// Prefill: nobody came for the blocks within the lease.
    Expired,
    /// It failed. With `fenced` no write lands in the blocks any more (KV-7). Without, a peer that can no longer be asked
    /// may still write into decode's blocks: keep them out of use until the runtime ends.
    Failed { failure: TransferFailure, fenced: bool },
}

/// Why a transfer failed. The text names the peer, the numbers and, if it is known, the mend. One side may tell it to the
/// other, so it says prefill and decode, not here and there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum TransferFailure {
    #[error("prefill at {peer} holds no transfer {transfer_id}: it was never offered, has ended, or was freed")]
    Unknown { peer: String, transfer_id: TransferId },
    #[error("the lease on transfer {transfer_id} ended at {peer} before its KV was validated; raise `kv.lease_ms`")]
    Expired { peer: String, transfer_id: TransferId },
    #[error("transfer {transfer_id} at {peer} is already claimed by another request or worker")]
    AlreadyClaimed { peer: String, transfer_id: TransferId },
    #[error("{peer} is incarnation {current:016x}, the parameters name {named:016x}: the worker has restarted since")]
    StaleIncarnation { peer: String, named: u64, current: u64 },
    #[error("KV made by weight version {theirs} at {peer} cannot be used with weight version {ours}")]
    WeightVersion { peer: String, theirs: u64, ours: u64 },
    #[error("{peer} does not fit the decode worker: {why}")]
    Incompatible { peer: String, why: String },
    #[error("transfer {transfer_id}: the request disagrees with what {peer} offered: {why}")]
    BadReference { peer: String, transfer_id: TransferId, why: String },
    #[error("{peer} was lost: {why}")]
    PeerLost { peer: String, why: String },
    #[error("cannot reach {peer}: {why}")]
    Unreachable { peer: String, why: String },
    #[error("the copy over {path} from {peer} failed: {why}")]
    Copy { peer: String, path: String, why: String },
    #[error(
        "the KV of transfer {transfer_id} at decode is not what prefill sent (digest {decode:016x}, not {prefill:016x})"
    )]
    DigestMismatch { transfer_id: TransferId, prefill: u64, decode: u64 },
    #[error("transfer {transfer_id} took longer than `kv.transfer_timeout_ms` in state {state}, with {peer}")]
    TimedOut { peer: String, transfer_id: TransferId, state: String },
    #[error("the {} worker's runtime shut down", side.name())]
    ShutDown { side: Side },
}

impl TransferFailure {
    /// A short name for the `outcome` label of metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "unknown_transfer",
            Self::Expired { .. } => "expired",
            Self::AlreadyClaimed { .. } => "already_claimed",
            Self::StaleIncarnation { .. } => "stale_incarnation",
            Self::WeightVersion { .. } => "weight_version",
            Self::Incompatible { .. } => "incompatible",
            Self::BadReference { .. } => "bad_reference",
            Self::PeerLost { .. } => "peer_lost",
            Self::Unreachable { .. } => "unreachable",
            Self::Copy { .. } => "copy",
            Self::DigestMismatch { .. } => "digest_mismatch",
            Self::TimedOut { .. } => "timed_out",
            Self::ShutDown { .. } => "shut_down",
        }
    }
}
