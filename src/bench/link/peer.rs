//! The other process: this program again, told over its standard input what to hold, telling over its output how to reach it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::PATIENCE;
use super::ceiling::{FILL_BYTES, PLAIN_BYTES, fill};
use super::workload::noise;
use crate::config::{NcclConfig, NixlConfig, Path};
use crate::ffi::cuda::{Device, IpcHandle};
use crate::memory::{Region, RegionOptions, to_usize};
use crate::security::Secret;
use crate::transport::{
    CudaIpc, Export, Grant, GrantToken, Nccl, NcclSetup, Nixl, NixlSetup, Run, RunList, Segment, Shm, Tcp, TcpSetup,
    Transport,
};

/// Name of the hidden subcommand of `pdlink bench` that calls [`serve`].
const SUBCOMMAND: &str = "link-peer";

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
    pub nixl: NixlConfig,
    pub nccl: NcclConfig,
}

/// How that end is reached.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ready {
    pub(super) export: Export,
    pub(super) grant: GrantToken,
    pub(super) plain_port: u16,
    /// Its memory, for the ceiling of a path between GPUs.
    pub(super) gpu_memory: Option<IpcHandle>,
}

/// An end that can be reached for as long as this lives.
pub struct Holding {
    pub ready: Ready,
    _transport: Arc<dyn Transport>,
    _grant: Grant,
}

/// The process, seen from the one that measures. Ended when dropped.
pub(super) struct Peer {
    child: Child,
}

impl Peer {
    /// Starts it, and hears how it is reached.
    pub(super) fn start(orders: &Orders) -> anyhow::Result<(Self, Ready)> {
        let child = Command::new(std::env::current_exe()?)
            .args(["bench", SUBCOMMAND])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the other process")?;
        // From here on dropping it ends the process.
        let mut peer = Self { child };
        let ready = peer.order(orders)?;
        Ok((peer, ready))
    }

    fn order(&mut self, orders: &Orders) -> anyhow::Result<Ready> {
        let stdin = self.child.stdin.as_mut().context("no way to tell the other process anything")?;
        writeln!(stdin, "{}", serde_json::to_string(orders)?)?;
        let stdout = self.child.stdout.take().context("no way to hear the other process")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        if line.is_empty() {
            bail!("the other process ended before it was ready");
        }
        serde_json::from_str(&line).context("the other process said something else")
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Closing its input ends it; the kill is for one that hangs.
        drop(self.child.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
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
    let &Orders { path, threads, .. } = orders;
    let regions = std::slice::from_ref(region);
    Ok(match path {
        Path::Shm => Arc::new(Shm::new(regions, threads)?),
        Path::Tcp => {
            let (bind, advertise_host) = (Ipv4Addr::LOCALHOST.into(), "127.0.0.1".to_owned());
            let stall_max = Duration::from_secs(10);
            Arc::new(Tcp::new(regions, secret, &TcpSetup { bind, advertise_host, streams: threads, stall_max })?)
        }
        Path::CudaIpc => Arc::new(CudaIpc::new(regions)?),
        Path::Nixl => Arc::new(Nixl::new(regions, &NixlSetup::of(&orders.nixl, threads))?),
        Path::Nccl => {
            let setup = NcclSetup::of(&orders.nccl, Ipv4Addr::LOCALHOST.into(), "127.0.0.1");
            Arc::new(Nccl::new(regions, secret, &setup)?)
        }
    })
}

/// The life of the other process: until its standard input closes.
pub fn serve() -> anyhow::Result<()> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    let orders: Orders = serde_json::from_str(&line).context("this command is started by `pdlink bench link`")?;
    let holding = hold(&orders)?;
    println!("{}", serde_json::to_string(&holding.ready)?);
    std::io::stdout().flush()?;
    std::io::stdin().lock().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Holds memory full of noise for the other process.
pub fn hold(orders: &Orders) -> anyhow::Result<Holding> {
    let secret = Secret::read_file(&orders.secret_file)?;
    let region = memory(orders.span, orders.gpu)?;
    fill(&region, SEED)?;
    let gpu_memory = region.device().map(|device| device.share(region.address())).transpose()?;
    let transport = open(orders, &region, &secret)?;
    let whole = vec![Run { src: 0, dst: 0, len: orders.span }];
    let grant = transport.grant(&RunList { segments: vec![Segment { src_region: 0, dst_region: 0, runs: whole }] })?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let plain_port = listener.local_addr()?.port();
    if orders.path == Path::Tcp {
        plain_senders(listener, orders.threads, to_usize(orders.span))?;
    }
    let ready = Ready { export: transport.export(), grant: grant.token(), plain_port, gpu_memory };
    Ok(Holding { ready, _transport: transport, _grant: grant })
}

/// Accepts `count` plain sockets, and sends on each as many bytes as it is asked for, in a plain loop over cold memory. The
/// threads end with their sockets, and at the latest with the process.
fn plain_senders(listener: TcpListener, count: usize, span: usize) -> anyhow::Result<()> {
    std::thread::Builder::new().name("plain-accept".to_owned()).spawn(move || {
        let senders: Vec<_> = listener
            .incoming()
            .take(count)
            .flatten()
            .map(|socket| std::thread::spawn(move || send_plainly(socket, span / count)))
            .collect();
        for sender in senders {
            // Ends with an error when the other side closes, which is how it is told to end.
            let _ = sender.join();
        }
    })?;
    Ok(())
}

fn send_plainly(mut socket: TcpStream, share: usize) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let block = noise(to_usize(FILL_BYTES).min(share), 9);
    let memory = block.repeat(share.div_ceil(block.len().max(1)));
    let mut at = 0;
    loop {
        let mut wanted = [0; 8];
        socket.read_exact(&mut wanted)?;
        let mut left = to_usize(u64::from_le_bytes(wanted));
        while left > 0 {
            let len = left.min(PLAIN_BYTES).min(memory.len());
            if at + len > memory.len() {
                at = 0;
            }
            socket.write_all(&memory[at..at + len])?;
            at += len;
            left -= len;
        }
    }
}
