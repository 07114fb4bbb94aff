//! What a caller asks of a link, and what it gets back.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use super::{GrantToken, RunList, TransportError};

/// Which way the bytes go, seen from the process that submits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the peer's regions into ours: `src` is remote, `dst` local.
    Pull,
    /// From our regions into the peer's: `src` is local, `dst` remote.
    Push,
}

/// One transfer.
#[derive(Debug, Clone)]
pub struct TransferRequest {
    pub direction: Direction,
    /// What to copy. Destination ranges must not overlap one another: pieces are copied in parallel, so the last writer
    /// would be a matter of chance.
    pub runs: RunList,
    /// The peer's permission for a push. Not needed for a pull.
    pub grant: Option<GrantToken>,
    /// When the transfer is failed if bytes are still missing. At least some time from now, or it fails at once.
    pub deadline: Instant,
}

/// Names one submitted transfer on its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TransferTicket(pub u64);

/// A transfer that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    pub bytes: u64,
    /// Requests that were posted to the path: one per segment, or one per piece where the path sends pieces.
    pub posts: u64,
    /// From the submission to the last byte.
    pub started: Instant,
    pub finished: Instant,
}

impl Copied {
    pub fn elapsed(&self) -> Duration {
        self.finished.saturating_duration_since(self.started)
    }
}

/// Called once, when a transfer has ended (TR-1).
pub type Completion = Box<dyn FnOnce(Result<Copied, TransportError>) + Send>;
