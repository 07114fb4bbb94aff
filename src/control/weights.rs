//! What a coordinator says to a worker about new weights, and what the worker answers.
//!
//! ```text
//!           ┌──────────────── Abort, failure, or a deadline ────────────────┐
//!           ▼                                                               │
//! Serving ──Offer──► Staging ──► Staged ──Pause──► Pausing ──► Paused ──Commit──► Committing ──► Committed
//!    ▲                                                                                             │
//!    └────────────────────────────── Resume, or a deadline ◄───────────────────────────────────────┘
//! ```
//!
//! Every request is answered at once, with the worker's status; what takes time is seen by asking again. Each may be said
//! twice without harm.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{AdminHandler, Welcome};
use crate::config::{InFlight, Staging};

/// What a worker's listener does with what is about weights: the listener is the KV runtime's, which knows no weights.
#[derive(Clone)]
pub struct WeightsDoor {
    /// Gets the coordinator's requests.
    pub admin: Arc<dyn AdminHandler>,
    /// Gets the connections of workers that fetch weights here.
    pub welcome: Welcome,
}

/// Where a worker is to get weights from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightSource {
    /// From whoever serves them at this control address, `host:port`.
    Peer(String),
    /// From a checkpoint in this folder, as the worker sees it.
    Folder(String),
    /// What the worker was started with.
    Base,
    /// From the trainer whose NCCL group this worker has joined, which sends once for each step.
    Trainer { group: u64, step: String },
}

impl std::fmt::Display for WeightSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Peer(address) => write!(f, "{address}"),
            Self::Folder(folder) => write!(f, "{folder}"),
            Self::Base => f.write_str("what the worker was started with"),
            Self::Trainer { step, .. } => write!(f, "the trainer's NCCL group, {step}"),
        }
    }
}

/// New weights for one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsOffer {
    /// Names the transaction.
    pub update: u64,
    pub version: u64,
    pub source: WeightSource,
    /// How many receivers the source will have, and which of them this worker is.
    pub receivers: u32,
    pub receiver: u32,
    /// How long staging may take, in milliseconds, and how long the worker waits in each later phase for the next word.
    pub stage_ms: u64,
    pub hold_ms: u64,
}

/// A trainer's NCCL group, and a rank's place in it. The trainer is rank 0, and keeps the store where all meet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainerGroup {
    /// Names the group here.
    pub id: u64,
    pub host: String,
    pub port: u16,
    pub rank: u32,
    pub ranks: u32,
    /// How long all may take to come.
    pub timeout_ms: u64,
}

/// How far a rank has come with a trainer's group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum TrainerState {
    Joining,
    Joined,
    /// It is not in it, or not any more.
    Broken(String),
}

/// The group that a rank was last told to join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainerLink {
    pub group: u64,
    pub state: TrainerState,
}

/// What is asked of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightsRequest {
    Status,
    Offer(WeightsOffer),
    /// Stop between two steps.
    Pause {
        update: u64,
        in_flight: InFlight,
    },
    /// Take what was staged.
    Commit {
        update: u64,
    },
    /// Serve again.
    Resume {
        update: u64,
    },
    /// Drop what was staged, and serve the old weights.
    Abort {
        update: u64,
        why: String,
    },
    /// Join a trainer's group. It is no part of an update.
    Join(TrainerGroup),
}

/// Where a worker stands in an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WeightsPhase {
    Serving,
    Staging,
    Staged,
    Pausing,
    Paused,
    Committing,
    Committed,
}

impl WeightsPhase {
    pub fn name(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Staging => "staging",
            Self::Staged => "staged",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
            Self::Committing => "committing",
            Self::Committed => "committed",
        }
    }
}

/// An update that this worker gave up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsFailure {
    pub update: u64,
    /// Where it was.
    pub phase: WeightsPhase,
    pub why: String,
}

/// A worker's weights at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsStatus {
    /// What it serves, or served last.
    pub version: u64,
    /// Of what it serves: names, shapes and bytes. `None`: what it was started with.
    pub digest: Option<[u8; 16]>,
    pub phase: WeightsPhase,
    /// The update under way, or the last one committed.
    pub update: Option<u64>,
    /// Of what is staged, once all of it is.
    pub staged_digest: Option<[u8; 16]>,
    pub staged_bytes: u64,
    /// 0 until it is known.
    pub total_bytes: u64,
    /// The path that the bytes take, once it is chosen.
    pub path: Option<String>,
    /// Whether another worker can get these weights here.
    pub serves_peers: bool,
    /// Where each rank of this worker takes its own part, `host:port`, in order. Empty: this answer is for all of them.
    pub ranks: Vec<String>,
    /// Where new weights lie until all have them.
    pub staging: Staging,
    /// The last update that was given up.
    pub failure: Option<WeightsFailure>,
    /// The trainer's group that it is in, or was to join.
    pub trainer: Option<TrainerLink>,
}
