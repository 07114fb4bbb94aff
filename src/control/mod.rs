//! The control connection: frames, handshake, liveness, request and answer.
#![forbid(unsafe_code)]

mod error;
mod messages;
mod transfer_id;

pub use error::ControlError;
pub use messages::{AbortAnswer, AdminAnswer, AdminRequest, Paired, Part, Role, RuntimeStatus};
pub use transfer_id::{BadTransferId, TransferId};
