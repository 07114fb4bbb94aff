//! The NCCL stream that PRIME-RL's trainer sends, as its own inference servers take it.
//!
//! ```text
//! /init_broadcaster    the trainer, rank 0, and every rank of every worker meet in a store at the trainer's address, take NCCL's name
//!                      of their group from it, make the group, and add up one number
//! /update_weights      int64: how many dictionaries; then for each: int64: bytes of its description · the description, pickled
//!                      (`pickled`) · for each dtype the tensors' bytes, one behind the other, in one broadcast
//! ```
//!
//! What comes is staged like any other weights (`receive`), so that all workers take it or none (WT-1). The stream has no digests: what
//! each rank has is digested here, and the coordinator holds all ranks against one another (WT-5). A group lasts until a broadcast does
//! not end well. Then the trainer has to make a new one, because nobody can tell it to begin again.

mod pickled;
mod receive;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::oneshot;

pub(super) use self::receive::receive;
use super::paths::Paths;
use super::receiver::WeightTarget;
use crate::control::{TrainerGroup, TrainerLink, TrainerState};
use crate::transport::{Caster, NcclSetup, Seat, TransportError};

/// Why a rank is not in a trainer's group.
#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    #[error("this rank has no GPU, and NCCL moves GPU memory alone; use weight_broadcast.type = \"filesystem\"")]
    NoGpu,
    #[error("the trainer's store at {address}: {why}")]
    Store { address: String, why: String },
    #[error("what the trainer put into its store at {address} is no name of an NCCL group: {why}")]
    Name { address: String, why: pickled::PickleError },
    #[error(
        "rank {rank} of {ranks} is not in the trainer's group: {why}; is each rank on a GPU of its own, the trainer too?"
    )]
    Group { rank: u32, ranks: u32, why: TransportError },
    #[error("memory on a GPU: {0}")]
    Gpu(#[from] crate::memory::CudaError),
}

/// A group that this rank is in.
pub(super) struct Joined {
    pub(super) caster: Caster,
    /// Bytes that the last set of weights took; 0 before the first.
    expected_bytes: AtomicU64,
}

/// This rank's part in a trainer's group, as far as it has come.
pub(super) struct Trainer {
    group: u64,
    state: Result<Option<Arc<Joined>>, String>,
}

impl Trainer {
    pub(super) fn joining(group: u64) -> Self {
        Self { group, state: Ok(None) }
    }

    /// How joining that group has ended. Of another one nobody wants to know any more.
    pub(super) fn joined(&mut self, group: u64, result: Result<Joined, JoinError>) {
        if self.group != group {
            return;
        }
        self.state = match result {
            Ok(joined) => Ok(Some(Arc::new(joined))),
            Err(error) => {
                tracing::warn!(%error, "not in the trainer's group");
                Err(error.to_string())
            }
        };
    }

    pub(super) fn link(&self) -> TrainerLink {
        let state = match &self.state {
            Ok(None) => TrainerState::Joining,
            Ok(Some(joined)) if joined.caster.is_sound() => TrainerState::Joined,
            Ok(Some(_)) => TrainerState::Broken("a broadcast did not end well, which ends the group".to_owned()),
            Err(why) => TrainerState::Broken(why.clone()),
        };
        TrainerLink { group: self.group, state }
    }

    /// To take weights from, if it is that group.
    pub(super) fn of(&self, group: u64) -> Option<Arc<Joined>> {
        let joined = self.state.as_ref().ok()?.as_ref()?;
        (self.group == group && joined.caster.is_sound()).then(|| Arc::clone(joined))
    }
}

/// Joins a trainer's group: the engine meets it in its store, the rest is done here.
pub(super) async fn join(
    group: TrainerGroup,
    target: Arc<dyn WeightTarget>,
    paths: Paths,
) -> Result<Joined, JoinError> {
    let device = paths.device()?;
    if device.is_none() && !paths.casts_host {
        return Err(JoinError::NoGpu);
    }
    let address = format!("{}:{}", group.host, group.port);
    let (met, name) = oneshot::channel();
    target.meet(group.clone(), Box::new(move |name| drop(met.send(name))));
    let name = name.await.unwrap_or_else(|_| Err("nobody went there".to_owned()));
    let name = name.map_err(|why| JoinError::Store { address: address.clone(), why })?;
    let name = pickled::unique_id(&name).map_err(|why| JoinError::Name { address, why })?;
    let connect_max = Duration::from_millis(group.timeout_ms);
    let setup = NcclSetup { connect_max, ..NcclSetup::of(&paths.kv.nccl, paths.bind, &paths.advertise_host) };
    let failed = |why| JoinError::Group { rank: group.rank, ranks: group.ranks, why };
    let seat = Seat { name, rank: group.rank, ranks: group.ranks, device, greets: true };
    let (done, made) = oneshot::channel();
    let caster = Caster::start(&setup, seat, Box::new(move |result| drop(done.send(result)))).map_err(failed)?;
    made.await.unwrap_or(Err(TransportError::Cancelled)).map_err(failed)?;
    tracing::info!(rank = group.rank, ranks = group.ranks, "in the trainer's group");
    Ok(Joined { caster, expected_bytes: AtomicU64::new(0) })
}

impl Joined {
    pub(super) fn expected_bytes(&self) -> Option<u64> {
        Some(self.expected_bytes.load(Relaxed)).filter(|&bytes| bytes > 0)
    }

    fn expect_bytes(&self, bytes: u64) {
        self.expected_bytes.store(bytes, Relaxed);
    }
}
