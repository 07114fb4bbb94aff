//! Processes: hold ports, spawn, ready, watch, restart, drain.
//!
//! [`fleet::Fleet`] runs one task per worker. Each task owns a [`life::Life`], the pure machine with all the rules, and does
//! what it says: start a [`guarded::Guarded`] worker, probe it, ask it to end. What happens is told as [`fleet::FleetEvent`];
//! showing it is left to `cli`.
#![forbid(unsafe_code)]

pub mod exit;
pub mod fleet;
pub mod guard;
pub mod guarded;
pub mod life;
pub mod log_dir;
pub mod logs;
pub mod machine;
pub mod metrics;
pub mod nodes;
mod nvidia_smi;
pub mod ports;
pub mod probe;
pub mod run_dir;
mod tree;
pub mod vllm;
mod worker;
