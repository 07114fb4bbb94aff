//! The fleet's weights: one version for all workers of all roles.
//!
//! `desk` takes orders and knows which version is the fleet's; `update` is one transaction over all workers, in the words of
//! `members`; `handoffs` holds requests back while the weights flip; `versions` keeps a worker that has another version out of
//! the pools until it has caught up; `trainer` brings all workers into a trainer's own NCCL group; `routes` is the HTTP side, PRIME-RL's calls included. Only control messages are spoken
//! here: bytes go between the workers and whoever has them.
//!
//! WT-1 and WT-2 are held in `update`, with each worker's own part in `weights::session`; WT-4 in `members`.

mod desk;
mod handoffs;
mod members;
mod routes;
mod trainer;
mod update;
mod versions;

pub(crate) use desk::{Desk, Orders, keep};
pub(crate) use routes::{reload_weights, status, update, update_weights};
pub(crate) use trainer::join_trainer;
