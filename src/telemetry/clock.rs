//! What this host's clock says.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Since 1970. A clock that stands before that counts as 1970.
pub fn unix() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The same in microseconds, as records and messages have it.
pub fn unix_us() -> u64 {
    u64::try_from(unix().as_micros()).unwrap_or(u64::MAX)
}
