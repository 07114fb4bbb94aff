//! What happened, in words and numbers: transfer records, the names of all metrics, traces, the set-up of the log.
#![forbid(unsafe_code)]

pub mod clock;
pub mod log;
pub mod names;
mod record;
pub mod traces;

pub use record::{Side, TransferOutcome, TransferRecord};
