//! Everything that can go wrong with a path, one variant per thing a caller could do differently.
#![forbid(unsafe_code)]

use std::fmt;
use std::io;
use std::sync::Arc;

/// An end of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Source,
    Destination,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Destination => "destination",
        })
    }
}

/// Why a path could not be offered, connected, or carry a transfer. Cheap to clone: one broken connection ends many
/// transfers with the same cause.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TransportError {
    #[error("{end} region {region} does not exist: {regions} are registered")]
    UnknownRegion { end: End, region: u16, regions: usize },

    #[error("{end} bytes {offset}..{offset}+{len} lie outside region {region} of {region_len} bytes")]
    OutOfRange { end: End, region: u16, offset: u64, len: u64, region_len: u64 },

    #[error("the run list names more than {} bytes", u64::MAX)]
    TooManyBytes,

    #[error(
        "push refused: bytes {offset}..{offset}+{len} of region {region} are not granted, or the grant was revoked"
    )]
    NotGranted { region: u16, offset: u64, len: u64 },

    #[error("transfer cancelled")]
    Cancelled,

    #[error("transfer with {peer} missed its deadline, {bytes} bytes long, {late_by_ms} ms ago")]
    DeadlineMissed { peer: String, bytes: u64, late_by_ms: u64 },

    #[error("{peer} has ended")]
    PeerGone { peer: String },

    #[error("the link to {peer} is closed")]
    LinkClosed { peer: String },

    #[error("{inflight} transfers are in flight to {peer}, at most {inflight_max} are taken; wait for one to complete")]
    Busy { peer: String, inflight: usize, inflight_max: usize },

    #[error("{peer} cannot be reached over {path}: {reason}")]
    Unreachable { path: &'static str, peer: String, reason: String },

    #[error("a peer's description for {path} cannot be used: {reason}")]
    BadExport { path: &'static str, reason: String },

    #[error("{peer} does not know this run's secret; start both sides with the same secret file")]
    Unauthenticated { peer: String },

    #[error("{peer} broke the data protocol: {what}")]
    Protocol { peer: String, what: String },

    #[error("{attempt} failed with {peer}: {source}")]
    Io { attempt: &'static str, peer: String, source: Arc<io::Error> },

    #[error("no path moves {memory} memory here: allowed are {allowed}; allow one of {possible} in kv.paths")]
    NoUsablePath { memory: &'static str, allowed: String, possible: String },

    #[error(
        "no path in common: this side offers {local}, the peer {remote}{tried}; allow one more in kv.paths on both"
    )]
    NoCommonPath { local: String, remote: String, tried: String },

    /// Only a push ends like this: bytes that we sent may still be written by the peer. Revoking its grant fences them.
    #[error("push to {peer} is not fenced until the peer revokes its grant: {cause}")]
    Unfenced { peer: String, cause: Box<Self> },
}

impl TransportError {
    /// Whether TR-3 holds already: no write of the failed transfer can land any more.
    pub fn fenced(&self) -> bool {
        !matches!(self, Self::Unfenced { .. })
    }

    pub(super) fn io(attempt: &'static str, peer: &str, source: impl Into<io::Error>) -> Self {
        Self::Io { attempt, peer: peer.to_owned(), source: Arc::new(source.into()) }
    }
}
