//! Scenarios, statistics, tables.
#![forbid(unsafe_code)]

pub mod client;
pub mod process;
pub mod soak;
