//! Scenarios, statistics, tables.
#![forbid(unsafe_code)]

pub mod client;
pub mod environment;
pub mod kv;
pub mod link;
pub mod load;
pub mod mock;
pub mod process;
pub mod proxy;
pub mod relay;
mod running;
pub mod serve;
pub mod soak;
pub mod stats;
pub mod table;
