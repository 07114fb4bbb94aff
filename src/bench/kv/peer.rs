//! The prefill worker: this program again. One line of JSON tells it what to be; then each line asks for one offer.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::shape::{Layout, Shape, blocks, memory};
use super::{PATIENCE, Worker};
use crate::config::{KvConfig, KvSendType, Role};
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
}

#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    first_block: u32,
    scattered: bool,
    tokens: u32,
}

/// The process, seen from decode. Ended when dropped.
pub(super) struct Peer {
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
        let mut peer = Self { child, input, output: BufReader::new(output) };
        writeln!(peer.input, "{}", serde_json::to_string(orders)?)?;
        Ok(peer)
    }

    /// One request's KV, ready to be fetched.
    pub(super) fn offer(&mut self, first_block: u32, scattered: bool, tokens: u32) -> anyhow::Result<TransferParams> {
        writeln!(self.input, "{}", serde_json::to_string(&Ask { first_block, scattered, tokens })?)?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(!line.is_empty(), "the prefill worker has ended");
        Ok(serde_json::from_str(&line)?)
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
    let memory = memory(&geometry, orders.layout, orders.num_blocks)?;
    for region in &memory.regions {
        region.fill(0, region.len(), 0x5a)?;
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let worker = Worker::start(&orders, geometry.clone(), memory, Role::Prefill, listener)?;
    let (sender, ended) = mpsc::channel();
    worker.tell(sender);
    for line in lines {
        let Ask { first_block, scattered, tokens } = serde_json::from_str(&line?)?;
        let taken: Vec<BlockId> =
            blocks(first_block, geometry.groups[0].blocks_for(tokens), orders.num_blocks, scattered);
        let transfer_id = TransferId::random();
        let offer = Offer { transfer_id, request_id: "bench".to_owned(), blocks: vec![taken], tokens };
        let params = worker.runtime.offer(offer)?;
        println!("{}", serde_json::to_string(&params)?);
        std::io::stdout().flush()?;
        let report = ended.recv_timeout(PATIENCE).context("no end of a transfer")?;
        ensure!(report.end == End::Sent, "transfer {} ended otherwise: {:?}", report.transfer_id, report.end);
    }
    worker.runtime.shutdown();
    Ok(())
}

/// Both processes are started by the same hand, on loopback.
pub(super) fn secret() -> Secret {
    Secret::loopback()
}
