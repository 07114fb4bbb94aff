//! Scenarios, statistics, tables.
#![forbid(unsafe_code)]

pub mod all;
pub mod client;
pub mod compare;
pub mod environment;
pub mod html;
pub mod kv;
pub mod link;
pub mod load;
pub mod mock;
pub mod partner;
pub mod process;
pub mod proxy;
pub mod raw;
pub mod relay;
pub mod report;
mod running;
pub mod serve;
pub mod soak;
pub mod stats;
pub mod table;
mod turns;
pub mod weights;
