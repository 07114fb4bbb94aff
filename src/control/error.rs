//! Why a control connection failed. Every variant names the peer.

use std::time::Duration;

/// One connection's failure. The connection is closed; others are not touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    #[error("cannot connect to {peer}: {why}")]
    Connect { peer: String, why: String },
    #[error(
        "{peer} does not speak pdlink's control protocol (it began with {began}); is another program on that port?"
    )]
    BadMagic { peer: String, began: String },
    #[error(
        "{peer} speaks control protocol v{theirs_min} to v{theirs_max}, this build speaks v{ours_min} to v{ours_max}; upgrade the older side"
    )]
    Version { peer: String, theirs_min: u16, theirs_max: u16, ours_min: u16, ours_max: u16 },
    #[error("{peer} does not hold this run's secret; give both sides the same --secret-file")]
    WrongSecret { peer: String },
    #[error("{peer} hung up during the handshake; it may hold another secret, or be full: see its log")]
    HungUp { peer: String },
    #[error("{peer} sent a frame of {bytes} bytes; at most {max} are allowed")]
    Oversize { peer: String, bytes: u64, max: u64 },
    #[error("{peer} sent a frame that cannot be read: {why}")]
    Malformed { peer: String, why: String },
    #[error("{peer} did not answer within {} ms while {doing}", within.as_millis())]
    TimedOut { peer: String, doing: &'static str, within: Duration },
    #[error("{peer} has been silent for {} ms: it counts as dead", silent.as_millis())]
    Silent { peer: String, silent: Duration },
    #[error("the connection to {peer} ended: {why}")]
    Closed { peer: String, why: String },
    #[error("{peer} does not take messages as fast as they come ({queued} are queued)")]
    Backlog { peer: String, queued: usize },
    #[error("{peer} refused: {why}")]
    Refused { peer: String, why: String },
}
