//! The prefill worker: this program again. One line of JSON tells it what to be; then each line asks for one offer.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;

use anyhow::{Context, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::shape::{Layout, Shape, blocks, fill, memory};
use super::{PATIENCE, Worker};
use crate::bench::link;
use crate::config::{KvConfig, KvSendType, Role};
use crate::ffi::cuda::IpcHandle;
use crate::kv::{BlockId, End, KvLink, Offer, TransferId, TransferParams};
use crate::security::Secret;

/// Name of the hidden subcommand of `pdlink bench` that calls [`serve`].
const SUBCOMMAND: &str = "kv-peer";

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Orders {
    pub(super) kv: KvConfig,
    pub(super) shape: Shape,
    pub(super) layout: Layout,
    pub(super) block_size: u32,
    pub(super) num_blocks: u32,
    pub(super) send_type: KvSendType,
    /// Of the prefill worker; `None`: its KV lies in host memory.
    pub(super) gpu: Option<i32>,
    /// Bytes that it keeps on its GPU for the driver's own copy.
    pub(super) span: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    first_block: u32,
    scattered: bool,
    tokens: u32,
}

/// What the process says before its first offer.
#[derive(Debug, Serialize, Deserialize)]
struct Ready {
    gpu_memory: Option<IpcHandle>,
}

/// The process, seen from decode. Ended when dropped.
pub(super) struct Peer {
    /// Memory on its GPU, for the driver's own copy.
    pub(super) gpu_memory: Option<IpcHandle>,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    pub(super) fn start(orders: &Orders) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", SUBCOMMAND])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the prefill worker")?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let (Some(input), Some(output)) = (input, output) else { anyhow::bail!("the prefill worker has no pipes") };
        let mut peer = Self { gpu_memory: None, child, input, output: BufReader::new(output) };
        writeln!(peer.input, "{}", serde_json::to_string(orders)?)?;
        let Ready { gpu_memory } = peer.hear()?;
        peer.gpu_memory = gpu_memory;
        Ok(peer)
    }

    fn hear<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the prefill worker has ended");
        Ok(serde_json::from_str(&line)?)
    }

    /// One request's KV, ready to be fetched.
    pub(super) fn offer(&mut self, first_block: u32, scattered: bool, tokens: u32) -> anyhow::Result<TransferParams> {
        writeln!(self.input, "{}", serde_json::to_string(&Ask { first_block, scattered, tokens })?)?;
        self.hear()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is the prefill worker until standard input ends.
pub fn serve() -> anyhow::Result<()> {
    let mut lines = std::io::stdin().lines();
    let orders: Orders = serde_json::from_str(&lines.next().context("no orders")??)?;
    let geometry = orders.shape.geometry(orders.block_size);
    let memory = memory(&geometry, orders.layout, orders.num_blocks, orders.gpu)?;
    fill(&memory)?;
    let for_the_driver = orders.gpu.map(|_| link::memory(orders.span, orders.gpu)).transpose()?;
    let shared = for_the_driver.as_ref().and_then(|region| Some((region.device()?, region.address())));
    let gpu_memory = shared.map(|(device, address)| device.share(address)).transpose()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let worker = Worker::start(&orders, geometry.clone(), memory, Role::Prefill, listener)?;
    let (sender, ended) = mpsc::channel();
    worker.tell(sender);
    tell(&Ready { gpu_memory })?;
    for line in lines {
        let Ask { first_block, scattered, tokens } = serde_json::from_str(&line?)?;
        let taken: Vec<BlockId> =
            blocks(first_block, geometry.groups[0].blocks_for(tokens), orders.num_blocks, scattered);
        let transfer_id = TransferId::random();
        let offer = Offer { transfer_id, request_id: "bench".to_owned(), blocks: vec![taken], tokens };
        let params = worker.runtime.offer(offer)?;
        tell(&params)?;
        let report = ended.recv_timeout(PATIENCE).context("no end of a transfer")?;
        ensure!(report.end == End::Sent, "transfer {} ended otherwise: {:?}", report.transfer_id, report.end);
    }
    worker.runtime.shutdown();
    Ok(())
}

fn tell(what: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(what)?);
    Ok(std::io::stdout().flush()?)
}

/// Both processes are started by the same hand, on loopback.
pub(super) fn secret() -> Secret {
    Secret::loopback()
}
