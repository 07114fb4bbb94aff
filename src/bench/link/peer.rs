//! The other process: this program again, here or on another host, told what to hold, telling how to reach it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::SecretFile;
use super::ceiling::fill;
use super::plain::Plain;
use crate::bench::environment::Environment;
use crate::bench::partner::{Lines, Part, Partner, Place, answer};
use crate::config::{NcclConfig, NixlConfig, Path};
use crate::ffi::cuda::{Device, IpcHandle};
use crate::memory::{Region, RegionOptions, to_usize};
use crate::security::Secret;
use crate::transport::{
    CudaIpc, Export, Grant, GrantToken, Nccl, NcclSetup, Nixl, NixlSetup, Run, RunList, Segment, Shm, Tcp, TcpSetup,
    Transport,
};

/// What its memory is filled with.
pub(super) const SEED: u64 = 5;

/// What one end of a link is to hold, and how it is reached.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Orders {
    pub path: Path,
    pub span: u64,
    pub threads: usize,
    /// Its GPU; none holds host memory.
    pub gpu: Option<i32>,
    pub secret_file: PathBuf,
    /// Where it listens, and what the other end reaches it under.
    #[serde(default = "loopback")]
    pub host: IpAddr,
    pub nixl: NixlConfig,
    pub nccl: NcclConfig,
}

/// What two processes of one host reach each other under.
pub(in crate::bench) fn loopback() -> IpAddr {
    Ipv4Addr::LOCALHOST.into()
}

/// How that end is reached.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ready {
    pub(super) export: Export,
    pub(super) grant: GrantToken,
    /// Plain sockets to it, for the ceiling of a path between hosts.
    pub(super) plain: Plain,
    /// Its memory, for the ceiling of a path between GPUs.
    pub(super) gpu_memory: Option<IpcHandle>,
}

/// An end that can be reached for as long as this lives.
pub struct Holding {
    pub ready: Ready,
    _transport: Arc<dyn Transport>,
    _grant: Grant,
}

/// The process, seen from the one that measures.
pub(super) struct Peer {
    _partner: Partner,
}

impl Peer {
    /// Finds or starts it, and hears how it is reached. The second is our own end's orders.
    pub(super) fn start(place: &Place, orders: &Orders, our_gpu: Option<i32>) -> anyhow::Result<(Self, Orders, Ready)> {
        let mut partner = Partner::find(place, Part::Link)?;
        let ready = partner.ask(orders)?;
        let ours = Orders { gpu: our_gpu, host: partner.host(), ..orders.clone() };
        Ok((Self { _partner: partner }, ours, ready))
    }
}

/// Memory on a GPU, or of this host.
pub(in crate::bench) fn memory(span: u64, gpu: Option<i32>) -> anyhow::Result<Arc<Region>> {
    match gpu {
        Some(gpu) => Ok(Region::allocated_on(&Device::open(gpu)?, to_usize(span))?),
        None => Ok(Region::shared_with(to_usize(span), RegionOptions { prefault: true, huge_pages: false })?),
    }
}

/// The path of these orders over one region.
pub(super) fn open(orders: &Orders, region: &Arc<Region>, secret: &Secret) -> anyhow::Result<Arc<dyn Transport>> {
    let &Orders { path, threads, host, .. } = orders;
    let regions = std::slice::from_ref(region);
    Ok(match path {
        Path::Shm => Arc::new(Shm::new(regions, threads)?),
        Path::Tcp => {
            let (advertise_host, stall_max) = (host.to_string(), Duration::from_secs(10));
            let setup = TcpSetup { bind: host, advertise_host, streams: threads, stall_max };
            Arc::new(Tcp::new(regions, secret, &setup)?)
        }
        Path::CudaIpc => Arc::new(CudaIpc::new(regions)?),
        Path::Nixl => Arc::new(Nixl::new(regions, &NixlSetup::of(&orders.nixl, threads))?),
        Path::Nccl => {
            let setup = NcclSetup::of(&orders.nccl, host, &host.to_string());
            Arc::new(Nccl::new(regions, secret, &setup)?)
        }
    })
}

/// The life of the other process: until the one that measures leaves. It has the secret of the orders, but for a listener's
/// own, which no caller names a file for.
pub fn serve(mut lines: Lines, secret: Option<&Secret>) -> anyhow::Result<()> {
    let host = lines.host;
    let mut holding = Vec::new();
    while let Some(orders) = lines.next::<Orders>().context("this command is started by `pdlink bench link`")? {
        let held = match secret {
            Some(secret) => hold_as(&Orders { host, ..orders }, secret),
            None => hold(&orders),
        };
        answer(&mut lines, &held.as_ref().map(|held| &held.ready).map_err(|error| anyhow::anyhow!("{error:#}")))?;
        holding.extend(held);
    }
    Ok(())
}

/// Holds memory full of noise for the other process.
pub fn hold(orders: &Orders) -> anyhow::Result<Holding> {
    hold_as(orders, &Secret::read_file(&orders.secret_file)?)
}

fn hold_as(orders: &Orders, secret: &Secret) -> anyhow::Result<Holding> {
    if orders.gpu.is_none() {
        fits(orders.span)?;
    }
    let region = memory(orders.span, orders.gpu)?;
    fill(&region, SEED)?;
    let gpu_memory = region.device().map(|device| device.share(region.address())).transpose()?;
    let transport = open(orders, &region, secret)?;
    let whole = vec![Run { src: 0, dst: 0, len: orders.span }];
    let grant = transport.grant(&RunList { segments: vec![Segment::new(0, 0, whole)] })?;
    let plain = Plain::serve(orders.host, orders.threads, to_usize(orders.span))?;
    let ready = Ready { export: transport.export(), grant: grant.token(), plain, gpu_memory };
    Ok(Holding { ready, _transport: transport, _grant: grant })
}

/// Whether this host may give so much memory to a measurement.
pub(in crate::bench) fn fits(span: u64) -> anyhow::Result<usize> {
    let all = Environment::memory_bytes();
    ensure!(span <= all / 2, "{span} B are more than half of this host's memory ({all} B): measure smaller sizes");
    Ok(to_usize(span))
}

/// Memory on a GPU of another process, for as long as this.
pub(in crate::bench) struct Held {
    pub(in crate::bench) memory: IpcHandle,
    _peer: Peer,
}

impl Held {
    pub(in crate::bench) fn start(span: u64, gpu: i32) -> anyhow::Result<Self> {
        let file = SecretFile::new()?;
        let orders = Orders {
            path: Path::CudaIpc,
            span,
            threads: 1,
            gpu: Some(gpu),
            secret_file: file.path.clone(),
            host: loopback(),
            nixl: NixlConfig::default(),
            nccl: NcclConfig::default(),
        };
        let (peer, _, ready) = Peer::start(&Place::Here, &orders, None)?;
        Ok(Self { memory: ready.gpu_memory.context("the other process named no GPU memory")?, _peer: peer })
    }
}
