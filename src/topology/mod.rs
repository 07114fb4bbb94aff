//! Configuration to plan: workers, GPUs, ports, command lines.
//!
//! [`Plan`] is plain data: who runs, where, with which command and environment. [`plan()`] starts nothing and asks the
//! system nothing; ports come through [`ports::Ports`], so that a table can stand in for a host.
#![forbid(unsafe_code)]

mod builder;
mod cpu;
mod experts;
pub mod host;
mod kv_transfer;
mod placement;
mod plan;
pub mod ports;
mod redact;
mod reference;
pub mod vllm;
mod vllm_args;

pub use builder::{PlanError, Surroundings, needs_p2p_nccl, plan};
pub use placement::{HINTED, Place};
pub use plan::{NodePlan, Plan, ProxyPlan, WorkerPlan, dial};
