//! Moves bytes between regions.
//!
//! A [`Transport`] exports this process's regions, and connects to what a peer exported. The [`Link`] that comes out takes
//! a [`TransferRequest`] and later yields exactly one [`Completion`] for it (TR-1), once the bytes are visible at the
//! destination (TR-2); after that completion no write of the transfer lands (TR-3). It does not retry, split over paths or
//! reorder: `kv` does, from above. To add a path, pass
//! `tests/transport_conformance.rs`, then add its line to `select.rs`.
//!
//! - **TR-1** Every submitted transfer yields exactly one completion: done, or one error.
//! - **TR-2** When it says done, the bytes can be read at the destination.
//! - **TR-3** After a completion no write of that transfer lands. The one exception names itself: a push whose peer did
//!   not confirm ends with [`TransportError::Unfenced`], and is fenced where the memory is, by revoking its [`Grant`].
//!
//! Everything that a remote names is checked against registered regions before the first byte moves. There is no async
//! runtime in here: paths own a bounded number of threads, and completions are called on them.
#![deny(unsafe_code)] // Allowed again, by name, in the two files that make system calls with raw addresses.

mod board;
mod copy_pool;
mod cuda_ipc;
mod error;
mod export;
mod faulty;
mod flight;
mod flight_queue;
mod grant;
mod grant_table;
mod identity;
mod links;
mod loopback;
mod mapped;
mod nccl;
mod nixl;
mod nixl_surroundings;
mod process;
mod request;
mod run_list;
mod select;
mod shm;
mod tcp;
mod threads;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use board::{Board, BoardAt, PeerBoard, Word, WordUp};
pub use cuda_ipc::CudaIpc;
pub use error::{End, TransportError};
pub use export::{Export, Offer};
pub use faulty::{Fault, FaultPlan, Faulty, When};
pub use grant::{Fence, Grant, GrantToken};
pub use loopback::{Loopback, LoopbackHub};
pub use nccl::{Caster, Ended, Nccl, NcclSetup, Seat, casts_here, group_name};
pub use nixl::{GPU_STAGING_MB as NIXL_GPU_STAGING_MB, Nixl, NixlSetup};
pub use request::{Completion, Copied, Direction, TransferRequest, TransferTicket};
pub use run_list::{Piece, Run, RunList, Runs, Segment, Sums, Totals};
pub use select::{Selected, Setup, connect_best, copy_threads, export_all, offers};
pub use shm::{Shm, allow_peers_to_read, read_peer_byte};
pub use tcp::{Tcp, TcpSetup};

use crate::config::Path;

/// A place in an engine's stream on a GPU: what it writes before may be read once that is passed.
pub use crate::ffi::cuda::Mark as StreamMark;

/// How long closing a link waits for copies in progress. They take milliseconds; a kernel that holds one up for longer must
/// not hold up whoever closes.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(5);

/// One path, as this process offers it. Owns the path's threads and listeners.
pub trait Transport: Send + Sync {
    /// Which path this is, in records and in what is offered to a peer.
    fn path(&self) -> Path;

    /// What a peer needs to reach our regions over this path. Travels in kv's hello.
    fn export(&self) -> Export;

    /// Connects to what a peer exported for this path. Blocks, until `deadline` at the latest; not for async threads. Only `nccl`
    /// may take longer, as long as its own setting says: the first communicator of a process loads kernels.
    fn connect(&self, peer: &Export, deadline: Instant) -> Result<Arc<dyn Link>, TransportError>;

    /// Allows one push into our regions: into the destination ranges of `runs`, until the grant is revoked or dropped
    /// (KV-7). The token travels to the pusher, which cites it in [`TransferRequest::grant`].
    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError>;

    /// Closes every link, ends the threads, stops serving peers. Idempotent; also done on drop.
    fn close(&self);
}

/// A connection to one peer's regions.
pub trait Link: Send + Sync {
    fn path(&self) -> Path;

    /// Starts a transfer. Never waits for bytes: small copies are made at once, on this thread, others by the path's own
    /// threads. `done` is called exactly once (TR-1), on either, so it **may run before this returns**: hold no lock in
    /// the caller that `done` takes. It must not block. A request that is refused completes with its error.
    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket;

    /// Stops a transfer. Its completion still comes, once, and when no write can land any more (TR-3); it says
    /// [`TransportError::Cancelled`], or how the transfer ended if it ended first. Unknown and finished tickets are fine.
    fn cancel(&self, ticket: TransferTicket);

    /// Whether transfers can be submitted. False after [`Link::close`], and once the connection is beyond use: then
    /// connect anew.
    fn usable(&self) -> bool;

    /// True once the peer's process is known to have ended, so that nothing of it can write here any more. On paths that
    /// cannot know (`tcp`) always false; there the grant fences.
    fn peer_gone(&self) -> bool;

    /// Ends every transfer as cancelled, waits until none of them can write, lets go of the peer's memory. Idempotent, and
    /// also done on drop. Inside a completion it waits for nothing: there it only begins, and the completions still come.
    fn close(&self);
}
