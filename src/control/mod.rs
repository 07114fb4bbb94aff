//! The control connection: how two processes of one run talk.
//!
//! `handshake` proves that both belong to the run, `wire` bounds what they say, `connection` carries notices and requests
//! and notices a dead peer, `listener` is the server side, `admin` what proxy and launcher ask of a worker. What engines
//! say to each other is `kv`'s; it travels in the bodies of notices.
#![forbid(unsafe_code)]

mod admin;
mod connection;
mod early;
mod error;
mod handshake;
mod listener;
mod messages;
mod transfer_id;
mod weights;
mod wire;

pub use crate::config::Role;
pub use admin::{AdminClient, AdminHandler, AdminReply, admin_sink, connect};
pub use connection::{Answerer, Connection, Inbound, Liveness, Message, Sink, connection};
pub use early::{EarlyParams, PARAMS_VERSION};
pub use error::ControlError;
pub use handshake::{Hello, Identity, VERSIONS, Versions, accept, open};
pub use listener::{CONNECTIONS_MAX, STRANGERS_MAX, Welcome, serve};
pub use messages::{
    AbortAnswer, AdminAnswer, AdminRequest, LinkTraffic, Paired, Part, RankRecords, RecentFailure, RuntimeStatus,
    Traffic,
};
pub use transfer_id::{BadTransferId, TransferId};
pub use weights::{
    TrainerGroup, TrainerLink, TrainerState, WeightSource, WeightsDoor, WeightsFailure, WeightsOffer, WeightsPhase,
    WeightsRequest, WeightsStatus,
};
pub use wire::{FRAME_BYTES_MAX, Frame, FrameBuffer, WireError, from_body, to_body};
