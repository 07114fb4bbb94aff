//! Scenarios, statistics, tables.
#![forbid(unsafe_code)]

pub mod client;
pub mod environment;
pub mod kv;
pub mod link;
pub mod process;
pub mod soak;
pub mod stats;
pub mod table;
