//! What happened, in words and numbers: transfer records, the names of all metrics, the set-up of the log.
#![forbid(unsafe_code)]

pub mod log;
pub mod names;
mod record;

pub use record::{Side, TransferOutcome, TransferRecord};
