//! What the runtime refuses at once, before there is a transfer to report on.

use super::ParamsError;
use super::layout::LayoutError;
use crate::control::{ControlError, TransferId};

/// A call or a configuration that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    #[error(transparent)]
    Params(#[from] ParamsError),
    #[error("this worker's KV cache is described wrongly: {0}")]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("transfer {transfer_id} is in progress here already")]
    Duplicate { transfer_id: TransferId },
    #[error("the parameters name {count} runtimes; this build fetches from one runtime for each worker")]
    Endpoints { count: usize },
    #[error("{what}: this worker only does {role}")]
    WrongRole { what: &'static str, role: &'static str },
    #[error("transfer {transfer_id}: {tokens} tokens need {needed} blocks, {given} were given")]
    WrongBlockCount { transfer_id: TransferId, tokens: u32, needed: u32, given: usize },
    #[error("transfer {transfer_id}: blocks were given for {given} KV groups, the cache has {groups}")]
    WrongGroupCount { transfer_id: TransferId, groups: usize, given: usize },
    #[error("transfer {transfer_id}: block {block} is beyond the cache's {num_blocks} blocks")]
    BlockOutOfRange { transfer_id: TransferId, block: u32, num_blocks: u32 },
    #[error("cannot start the KV runtime: {0}")]
    Start(String),
    #[error("none of the paths {wanted} can be used with this worker's memory; offered here: {offered}")]
    NoPath { wanted: String, offered: String },
    #[error("the KV runtime has shut down")]
    ShutDown,
}
