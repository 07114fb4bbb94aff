//! The face that an engine sees of the runtime.

use std::ops::Range;
use std::sync::Arc;

use super::{BlockId, KvError, TransferParams};
use crate::control::{EarlyParams, RuntimeStatus, TransferId};
use crate::telemetry::TransferRecord;

/// Prefill's blocks of one request, ready to be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    pub transfer_id: TransferId,
    /// The engine's own id of the request, for people who read logs on both sides.
    pub request_id: String,
    /// For each KV group the blocks that cover tokens `0..tokens`, in order. Leading blocks may be absent that a window
    /// left behind: a list reaches to the last token, and begins early enough for what comes next.
    pub blocks: Vec<Vec<BlockId>>,
    pub tokens: u32,
}

/// What KV depends on besides the model: two workers must mean the same prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prompt {
    pub tokens: u32,
    /// Of the tokens and all else that the engine's KV depends on. Both engines make it alike.
    pub fingerprint: u64,
}

/// A request that prefill is about to compute, and that decode may claim meanwhile (concurrent dispatch).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Begin {
    pub transfer_id: TransferId,
    pub request_id: String,
    pub prompt: Prompt,
}

/// What a step of prefill has computed: some layers are final up to some token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    pub transfer_id: TransferId,
    /// Blocks of tokens `0..tokens`, or of more, one list for each KV group.
    pub blocks: Arc<Vec<Vec<BlockId>>>,
    pub layers: Range<u32>,
    /// Counted from the prompt's first: what came out of a prefix cache is final too.
    pub tokens: u32,
}

/// One expected transfer on decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TransferHandle {
    pub transfer_id: TransferId,
}

/// Moves KV between workers. No call blocks on a peer or on bytes; ends come as [`super::Report`]s through the callback
/// given at start, one for each `offer` and each `expect` that returned `Ok` (KV-1). The callback runs on the runtime's
/// thread: it must not block, and may call back into the link.
pub trait KvLink: Send + Sync {
    /// Prefill: holds `offer.blocks` under a lease from now on. The engine keeps them as they are until the report
    /// (`Sent`, `Expired`, `Aborted` or `Failed`), and then frees them. The answer goes into the response. A runtime
    /// that holds not all ranks names only its own in it: such an engine's scheduler has a [`super::ParamsMaker`].
    fn offer(&self, offer: Offer) -> Result<TransferParams, KvError>;

    /// Prefill, as soon as the request is known: decode may claim it from now on. Nothing is held yet, and nothing reported;
    /// each `begin` is followed by one `offer`, or by `abort` if the request ends otherwise. An offer of what has come to
    /// its end meanwhile is reported at once.
    fn begin(&self, begin: Begin) -> Result<(), KvError>;

    /// Prefill, after `begin`: this is in the cache and stays as it is, until `offer` or `restart`. Parts are pushed as they
    /// come, in order; what is not told here is pushed after `offer`.
    fn progress(&self, progress: Progress);

    /// Prefill, after `begin`: the request was preempted. Whatever was pushed is void, and is pushed again.
    fn restart(&self, transfer_id: TransferId);

    /// Decode: the same as `expect`, of a prompt that prefill is yet to compute.
    fn expect_early(&self, params: &EarlyParams, prompt: Prompt) -> Result<TransferHandle, KvError>;

    /// Decode, as soon as the request is known: claims the transfer and renews its lease from now on, also while the
    /// request waits for blocks. A claim that prefill refuses is reported at once (`Failed`).
    fn expect(&self, params: &TransferParams) -> Result<TransferHandle, KvError>;

    /// Decode, once blocks are there: moves the KV of tokens `first_token..` into `blocks`, which cover them in order,
    /// one list for each KV group, up to the last token; leading blocks outside a group's window may be absent, and
    /// groups without a window may have more, for tokens to come.
    /// `first_token` must be a multiple of decode's block sizes. Ends in `Received`, `Failed` or `Aborted`. Does
    /// nothing if the transfer was reported already.
    fn fetch(&self, handle: TransferHandle, blocks: Vec<Vec<BlockId>>, first_token: u32);

    /// Decode: nothing to load (all of it is cached here), or the client left before `fetch`. Ends in `Released`.
    fn release(&self, handle: TransferHandle);

    /// Either side, any state, any number of times. What is held is freed, copies in flight are fenced first (KV-7), and
    /// the other side is told. An id that is not known yet is remembered, and refused when it comes.
    fn abort(&self, transfer_id: TransferId);

    /// What this process knows of a recent transfer; decode's record first where both ends were here.
    fn record(&self, transfer_id: TransferId) -> Option<TransferRecord>;

    /// The recent transfers, oldest first.
    fn records(&self) -> Vec<TransferRecord>;

    fn status(&self) -> RuntimeStatus;

    /// KV that was offered before, under another version, is no longer granted (KV-5).
    fn set_weight_version(&self, weight_version: u64);
}
