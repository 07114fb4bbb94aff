//! The prefill worker: this program again, here or on another host. One line tells it what to be; then each asks for one offer.

use std::net::IpAddr;
use std::sync::mpsc::{self, Receiver};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::PATIENCE;
use super::rig::Worker;
use super::shape::{Layout, Shape, blocks, fill, ranks};
use crate::bench::link::{self, Plain};
use crate::bench::partner::{Lines, Part, Partner, Place, answer};
use crate::config::{KvConfig, KvSendType, Role};
use crate::ffi::cuda::IpcHandle;
use crate::kv::{BlockId, End, Geometry, KvLink, Offer, Report as TransferReport, TransferId, TransferParams};
use crate::memory::{Region, to_usize};
use crate::security::Secret;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Orders {
    pub(super) kv: KvConfig,
    pub(super) shape: Shape,
    pub(super) layout: Layout,
    pub(super) block_size: u32,
    /// Ranks of the prefill worker.
    pub(super) tp: u32,
    pub(super) num_blocks: u32,
    pub(super) send_type: KvSendType,
    /// Of the prefill worker; `None`: its KV lies in host memory.
    pub(super) gpu: Option<i32>,
    /// Bytes that it keeps on its GPU for the driver's own copy, and walks through for plain sockets.
    pub(super) span: u64,
    pub(super) threads: usize,
}

/// Requests that are to be offered, one from each of these blocks on.
#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    first_blocks: Vec<u32>,
    scattered: bool,
    tokens: u32,
}

/// What the process says before its first offer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Memory on its GPU, for the driver's own copy.
    pub(super) gpu_memory: Option<IpcHandle>,
    /// Plain sockets to it, for the ceiling between hosts.
    pub(super) plain: Plain,
}

/// The process, seen from decode.
pub(super) struct Peer {
    pub(super) ready: Ready,
    partner: Partner,
}

impl Peer {
    pub(super) fn start(place: &Place, orders: &Orders) -> anyhow::Result<Self> {
        let mut partner = Partner::find(place, Part::Kv)?;
        Ok(Self { ready: partner.ask(orders)?, partner })
    }

    /// Under which address it reaches us.
    pub(super) fn our_host(&self) -> IpAddr {
        self.partner.host()
    }

    /// The KV of one request from each of these blocks on, ready to be fetched.
    pub(super) fn offer(
        &mut self,
        first_blocks: &[u32],
        scattered: bool,
        tokens: u32,
    ) -> anyhow::Result<Vec<TransferParams>> {
        let offered: Vec<TransferParams> =
            self.partner.ask(&Ask { first_blocks: first_blocks.to_vec(), scattered, tokens })?;
        ensure!(offered.len() == first_blocks.len(), "{} requests for {}", offered.len(), first_blocks.len());
        Ok(offered)
    }
}

/// Is the prefill worker until the one that measures leaves. A listener has a secret of its own; both processes of one hand, on
/// loopback, need none.
pub fn serve(mut lines: Lines, secret: Option<&Secret>) -> anyhow::Result<()> {
    let orders: Orders = lines.next()?.context("no orders")?;
    let (host, secret) = (lines.host, secret.cloned().unwrap_or_else(Secret::loopback));
    let prefill = match Prefill::start(&orders, host, &secret) {
        Ok((prefill, ready)) => {
            answer(&mut lines, &Ok(ready))?;
            prefill
        }
        Err(error) => return answer::<Ready>(&mut lines, &Err(error)),
    };
    while let Some(ask) = lines.next::<Ask>()? {
        let offered: anyhow::Result<Vec<_>> =
            ask.first_blocks.iter().map(|first| prefill.offer(*first, ask.scattered, ask.tokens)).collect();
        answer(&mut lines, &offered)?;
        for _ in offered.iter().flatten() {
            prefill.ended()?;
        }
    }
    prefill.worker.runtime.shutdown();
    Ok(())
}

struct Prefill {
    worker: Worker,
    geometry: Geometry,
    num_blocks: u32,
    reports: Receiver<TransferReport>,
    _for_the_driver: Option<std::sync::Arc<Region>>,
}

impl Prefill {
    fn start(orders: &Orders, host: IpAddr, secret: &Secret) -> anyhow::Result<(Self, Ready)> {
        let geometry = orders.shape.geometry(orders.block_size, orders.tp);
        let memory = ranks(&geometry, orders.layout, orders.num_blocks, orders.gpu)?;
        fill(&geometry, &memory)?;
        let for_the_driver = orders.gpu.map(|_| link::memory(orders.span, orders.gpu)).transpose()?;
        let shared = for_the_driver.as_ref().and_then(|region| Some((region.device()?, region.address())));
        let gpu_memory = shared.map(|(device, address)| device.share(address)).transpose()?;
        let plain = Plain::serve(host, orders.threads, to_usize(orders.span))?;
        let worker = Worker::start(orders, geometry.clone(), memory, Role::Prefill, host, secret)?;
        let (sender, reports) = mpsc::channel();
        worker.tell(sender);
        let num_blocks = orders.num_blocks;
        let prefill = Self { worker, geometry, num_blocks, reports, _for_the_driver: for_the_driver };
        Ok((prefill, Ready { gpu_memory, plain }))
    }

    fn offer(&self, first_block: u32, scattered: bool, tokens: u32) -> anyhow::Result<TransferParams> {
        let count = self.geometry.groups[0].blocks_for(tokens);
        let taken: Vec<BlockId> = blocks(first_block, count, self.num_blocks, scattered);
        let transfer_id = TransferId::random();
        let offer = Offer { transfer_id, request_id: "bench".to_owned(), blocks: vec![taken], tokens };
        Ok(self.worker.runtime.offer(offer)?)
    }

    fn ended(&self) -> anyhow::Result<()> {
        let report = self.reports.recv_timeout(PATIENCE).context("no end of a transfer")?;
        ensure!(report.end == End::Sent, "transfer {} ended otherwise: {:?}", report.transfer_id, report.end);
        Ok(())
    }
}
