//! Connections between the two ends of a path, apart from kv's own: sockets whose every wait is bounded, both ends known to
//! each other, and whoever accepts them. `tcp` moves its bytes over them; `nccl` agrees over them on what to move.

mod acceptor;
mod handshake;
mod socket;
mod vectored;

pub(super) use acceptor::{Acceptor, Serve};
pub(super) use handshake::{ExportId, greet};
pub(super) use socket::{Patience, Socket};
pub(super) use vectored::Span;
