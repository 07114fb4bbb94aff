//! How paths between senders and receivers of weights are opened, and which memory they move.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use super::casts::Casts;
use crate::config::{KvConfig, KvMemory, Path, WeightsConfig};
use crate::memory::{CudaError, Device, Region};
use crate::security::Secret;
use crate::transport::{self, NcclSetup, Offer, Transport, TransportError};

/// What a process that sends or receives weights has for it.
#[derive(Clone)]
pub struct Paths {
    pub weights: WeightsConfig,
    /// For what the paths themselves can be told: streams, threads, how long a copy may stall.
    pub kv: KvConfig,
    pub secret: Secret,
    /// Where data ports listen, and how peers reach them.
    pub bind: IpAddr,
    pub advertise_host: String,
    /// The GPU that this process works with, by CUDA's number of it here.
    pub gpu: Option<i32>,
    /// The engine takes weights as they come, if they are staged nowhere.
    pub streams: bool,
    /// The groups that this process is in.
    pub casts: Arc<Casts>,
    /// Groups are made of host memory too, which a stand-in for NCCL moves.
    #[doc(hidden)]
    pub casts_host: bool,
    /// Put around each path: how tests make paths go wrong.
    #[doc(hidden)]
    pub wrap_path: Option<WrapPath>,
}

/// Makes one path of another.
#[doc(hidden)]
pub type WrapPath = Arc<dyn Fn(Arc<dyn Transport>) -> Arc<dyn Transport> + Send + Sync>;

impl Paths {
    /// The allowed paths between two processes that move such memory, best first. Over `nccl` a sender speaks to all at once.
    pub(super) fn that_move(&self, memory: KvMemory) -> Vec<Path> {
        let paths = self.weights.paths.iter().copied();
        paths.filter(|path| *path != Path::Nccl && path.moves(memory)).collect()
    }

    /// Kinds of memory that are worth trying, in the order of the paths that move them.
    pub(super) fn kinds(&self) -> Vec<KvMemory> {
        let mut kinds = Vec::new();
        for path in &self.weights.paths {
            let kind = kind_of(*path);
            if !kinds.contains(&kind) && (kind == KvMemory::Host || self.gpu.is_some()) {
                kinds.push(kind);
            }
        }
        kinds
    }

    /// For groups, if there may be any with memory like this.
    pub(super) fn nccl(&self, device: Option<&Arc<Device>>) -> Option<NcclSetup> {
        let may = self.weights.paths.contains(&Path::Nccl) && (device.is_some() || self.casts_host);
        may.then(|| NcclSetup::of(&self.kv.nccl, self.bind, &self.advertise_host))
    }

    /// How long one bucket may take on its way.
    pub(super) fn stall_max(&self) -> Duration {
        Duration::from_millis(self.kv.transfer_timeout_ms)
    }

    /// The GPU, open.
    pub(super) fn device(&self) -> Result<Option<Arc<Device>>, CudaError> {
        self.gpu.map(Device::open).transpose()
    }

    /// Opens every allowed path to `region`.
    pub(super) fn open(&self, region: &Arc<Region>) -> Result<Vec<Arc<dyn Transport>>, TransportError> {
        let kind = if region.device().is_some() { KvMemory::Gpu } else { KvMemory::Host };
        let mut paths = self.that_move(kind);
        if paths.is_empty() {
            // The refusal says which paths there would be.
            paths.clone_from(&self.weights.paths);
        }
        let kv = KvConfig { paths: Some(paths), ..self.kv.clone() };
        let regions = [Arc::clone(region)];
        let opened = transport::offers(&transport::Setup {
            config: &kv,
            regions: &regions,
            secret: &self.secret,
            bind: self.bind,
            advertise_host: &self.advertise_host,
        })?;
        Ok(match &self.wrap_path {
            Some(wrap) => opened.into_iter().map(|path| wrap(path)).collect(),
            None => opened,
        })
    }
}

/// The offers of paths that move such memory.
pub(super) fn of_kind(offers: &[Offer], kind: KvMemory) -> Vec<Offer> {
    offers.iter().filter(|offer| kind_of(offer.path) == kind).cloned().collect()
}

/// What a path moves here: host memory, if it can.
fn kind_of(path: Path) -> KvMemory {
    if path.moves(KvMemory::Host) { KvMemory::Host } else { KvMemory::Gpu }
}
