//! What the runtime refuses at once, before there is a transfer to report on.

use super::layout::LayoutError;
use super::{BLOCKS_MAX, ParamsError};
use crate::control::{ControlError, TransferId};

/// A call or a configuration that cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum KvError {
    #[error(transparent)]
    Params(#[from] ParamsError),
    #[error("this does not fit the worker's KV cache: {0}")]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("transfer {transfer_id} is in progress here already")]
    Duplicate { transfer_id: TransferId },
    #[error(
        "the parameters name {named} ranks of {tp_size}, at {distinct} addresses: they must name every rank, each at an \
         address of its own or all at one"
    )]
    Endpoints { tp_size: u32, named: usize, distinct: usize },
    #[error("{what}: this worker only does {role}")]
    WrongRole { what: &'static str, role: &'static str },
    #[error(
        "transfer {transfer_id}: {tokens} tokens in {given} blocks; at least 1 and at most {BLOCKS_MAX} are allowed"
    )]
    Extent { transfer_id: TransferId, tokens: u32, given: usize },
    #[error(
        "transfer {transfer_id} was dispatched concurrently, and this worker sends KV by {send_type}: set `kv_send_type = \
         \"PUT_ASYNC\"` on both sides, or `[proxy] dispatch = \"sequential\"`"
    )]
    NotAsync { transfer_id: TransferId, send_type: &'static str },
    #[error("cannot start the KV runtime: {0}")]
    Start(String),
    #[error("none of the paths {wanted} can be used with this worker's memory; offered here: {offered}")]
    NoPath { wanted: String, offered: String },
    #[error("the KV runtime has shut down")]
    ShutDown,
}
