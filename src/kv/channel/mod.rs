//! One transfer as two pure machines, one on each side: events in, actions out. No sockets, no clock, no memory; the
//! drivers (`producer`, `consumer`) do the I/O and hold no rule.
//!
//! ```text
//! prefill   Offered ─Claim─► Granted ─Landed─► (Checking ─DigestReady─►) Sent                            pull
//!                                    └Place──► Pushing ─CopyDone─► Pushed ─Accepted─► Sent               push
//! decode    Claiming ─Granted─► Ready ─Fetch─► Copying ─CopyDone─► (Digesting ─►) Confirming ─Confirmed─► Received
//!                                           └► Placed ─Pushed─► (Checking ─DigestReady─►) Received
//! either    any ─Abort, PeerLost, Ended, deadline─► (Stopping ─CopyDone or Fenced─►) the one report
//! ```
//!
//! With concurrent dispatch a claim may come while prefill is still computing. Decode is then told so (`Begun`) and names its
//! blocks, parts are pushed meanwhile, and the grant comes when prefill has ended (`Ready`): from there on it is a push as
//! any other, of which most has moved already.
//!
//! ```text
//! prefill   begun ─Claim─► Granted ─Place─► Pushing ─Ready─► Pushing ─CopyDone─► Pushed ─Accepted─► Sent
//! decode    Claiming ─Begun─► Ready ─Fetch─► Placed ─Granted─► Placed ─Pushed─► Received
//! ```
//!
//! A worker may run one process for each rank. Then decode has one [`Receive`] for each runtime of prefill that it reads,
//! under a [`Gather`], and prefill one [`Send`] for each runtime of decode that reads it, under a [`Hold`]. These give the
//! one report, once the last of theirs has ended; the first that goes wrong stops the others.
//!
//! - **KV-1**: a machine gives [`Report`](super::Report) as its last action, once, and takes no event after it.
//! - **KV-2**: prefill reports, and so frees, only on `Sent`, at the end of the lease, or when told to stop.
//! - **KV-3**: decode reports `Received` only on prefill's `Confirmed` or `Pushed`, which prefill gives only while it has
//!   held the blocks since the grant.
//! - **KV-7**: while something may write into decode's blocks, no end is reported: `Stopping` waits for it first.

mod decode;
mod gather;
mod hold;
mod prefill;

pub(super) use decode::{Receive, ReceiveAction, ReceiveEvent};
pub(super) use gather::{Gather, GatherAction};
pub(super) use hold::{Hold, HoldAction};
pub(super) use prefill::{Send, SendAction, SendEvent};

/// Who moves the bytes of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Pull,
    Push,
}

/// An event that does not belong to the state: our own mistake or a peer's. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{event} does not belong to state {state}")]
pub(super) struct OutOfOrder {
    pub(super) state: &'static str,
    pub(super) event: &'static str,
}

#[cfg(test)]
mod simulation;
