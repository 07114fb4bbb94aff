//! What may be ordered, and what is done about it in the other process.

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::{next_line, tell, until_told_to_end};
use crate::bench::link::{self, Orders, Ready, canary};
use crate::ffi::cuda::{Device, survey};
use crate::ffi::nixl::{Agent, AgentSetup, Library};
use crate::ffi::{Search, nccl, ucx};
use crate::memory::Region;
use crate::transport::{
    Direction, Export, Nixl, NixlSetup, Run, RunList, Segment, TransferRequest, Transport, allow_peers_to_read,
    read_peer_byte,
};

/// What the other process is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::doctor) enum Order {
    /// Keeps a byte, tells where, and lets peers read it as a worker would.
    HoldMemory,
    /// Reads that byte.
    ReadMemory { pid: u32, address: u64 },
    /// Tells which GPUs there are, whatever `CUDA_VISIBLE_DEVICES` says.
    Gpus,
    /// Opens NCCL, and tells its version.
    Nccl { library: Option<PathBuf>, environments: Vec<PathBuf> },
    /// Opens NIXL, starts an agent, and tells what came of it; with a GPU, whether its memory is taken for what it is.
    Nixl { wish: NixlWish, gpu: Option<i32> },
    /// Opens NIXL, waits for a line, and takes part in the path: tells its export, then reads from each that it is given.
    NixlEnd(NixlWish),
    /// Holds one end of a link, and tells how it is reached.
    HoldLink(Orders),
    /// Moves a canary from the end that is ready.
    Fly { orders: Orders, ready: Ready, corrupt: bool },
}

/// Which NIXL, as [`NixlSetup`] has it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::doctor) struct NixlWish {
    pub(in crate::doctor) library: Option<PathBuf>,
    pub(in crate::doctor) environments: Vec<PathBuf>,
    pub(in crate::doctor) backend: String,
    pub(in crate::doctor) parameters: Vec<(String, String)>,
}

/// NIXL as it was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::doctor) struct NixlFound {
    pub(in crate::doctor) library: PathBuf,
    pub(in crate::doctor) version: String,
    /// Backends that it has plugins for, or why no agent came up.
    pub(in crate::doctor) agent: Result<Vec<String>, String>,
    pub(in crate::doctor) ucx: ucx::Loaded,
    /// Whether GPU memory could be registered, where that was tried.
    pub(in crate::doctor) gpu: Option<Result<(), String>>,
}

/// NCCL as it was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::doctor) struct NcclFound {
    pub(in crate::doctor) library: PathBuf,
    pub(in crate::doctor) version: String,
}

/// What is kept for a peer to read.
const HELD: u8 = 0xA5;
/// What a NIXL end keeps and reads.
const END_BYTES: u64 = 4096;
const REACH_MAX: Duration = Duration::from_secs(5);
const WAKE_INTERVAL: Duration = Duration::from_millis(100);

pub(super) fn obey(order: Order) -> anyhow::Result<()> {
    match order {
        Order::HoldMemory => hold_memory(),
        Order::ReadMemory { pid, address } => tell(read_memory(pid, address)),
        Order::Gpus => tell(survey().map_err(anyhow::Error::from)),
        Order::Nccl { library, environments } => tell(look_at_nccl(library.as_deref(), &environments)),
        Order::Nixl { wish, gpu } => tell(look_at_nixl(&wish, gpu)),
        Order::NixlEnd(wish) => be_nixl_end(wish),
        Order::HoldLink(orders) => hold_link(&orders),
        Order::Fly { orders, ready, corrupt } => tell(canary::fly(&orders, &ready, corrupt)),
    }
}

fn hold_memory() -> anyhow::Result<()> {
    let byte = Box::new(HELD);
    allow_peers_to_read();
    tell(Ok((&raw const *byte).addr()))?;
    until_told_to_end()?;
    drop(byte);
    Ok(())
}

fn look_at_nccl(library: Option<&Path>, environments: &[PathBuf]) -> anyhow::Result<NcclFound> {
    let library = nccl::Library::open(&Search { library, environments })?;
    Ok(NcclFound { library: library.path().to_owned(), version: library.version_text() })
}

fn hold_link(orders: &Orders) -> anyhow::Result<()> {
    let holding = match link::hold(orders) {
        Ok(holding) => holding,
        Err(error) => return tell::<()>(Err(error)),
    };
    tell(Ok(&holding.ready))?;
    until_told_to_end()
}

fn read_memory(pid: u32, address: u64) -> anyhow::Result<()> {
    let byte = read_peer_byte(i32::try_from(pid)?, address)?;
    ensure!(byte == HELD, "it was given another byte than the one that is there");
    Ok(())
}

impl NixlWish {
    fn open(&self) -> anyhow::Result<&'static Library> {
        let search = Search { library: self.library.as_deref(), environments: &self.environments };
        Ok(Library::open(&search)?)
    }

    fn setup(self) -> NixlSetup {
        let Self { library, environments, backend, parameters } = self;
        // A few bytes: nothing to pack.
        NixlSetup {
            library,
            environments,
            backend,
            parameters,
            threads: 1,
            staging_mb: Some(0),
            pack_run_kb: None,
            pack_runs_min: None,
        }
    }
}

fn look_at_nixl(wish: &NixlWish, gpu: Option<i32>) -> anyhow::Result<NixlFound> {
    let library = wish.open()?;
    let name = format!("pdlink-doctor-{}", std::process::id());
    let setup = AgentSetup {
        name: &name,
        backend: &wish.backend,
        parameters: &wish.parameters,
        wake_interval: Some(WAKE_INTERVAL),
    };
    let agent = Agent::new(library, &setup);
    let gpu = agent.as_ref().ok().zip(gpu).map(|(agent, gpu)| {
        let registered = || -> anyhow::Result<()> {
            let region = Region::allocated_on(&Device::open(gpu)?, 1 << 20)?;
            Ok(agent.register(region)?)
        };
        registered().map_err(|error| format!("{error:#}"))
    });
    Ok(NixlFound {
        library: library.path().to_owned(),
        version: library.version().to_owned(),
        agent: agent.and_then(|agent| agent.backends()).map_err(|error| error.to_string()),
        ucx: ucx::Loaded::here(),
        gpu,
    })
}

/// The library is opened before the line is waited for, so that two ends that get it at once start their agents at once.
fn be_nixl_end(wish: NixlWish) -> anyhow::Result<()> {
    let opened = wish.open().map(drop);
    let failed = opened.is_err();
    tell(opened)?;
    if failed || next_line()?.is_none() {
        return Ok(());
    }
    let end = match NixlEnd::start(wish) {
        Ok(end) => end,
        Err(error) => return tell::<()>(Err(error)),
    };
    tell(Ok(end.transport.export()))?;
    while let Some(line) = next_line()? {
        let export = serde_json::from_str(&line).context("no export");
        tell(export.and_then(|export| end.read_from(&export)))?;
    }
    Ok(())
}

struct NixlEnd {
    region: Arc<Region>,
    transport: Nixl,
}

impl NixlEnd {
    fn start(wish: NixlWish) -> anyhow::Result<Self> {
        let region = Region::shared(usize::try_from(2 * END_BYTES)?)?;
        region.fill(0, END_BYTES, HELD)?;
        let transport = Nixl::new(std::slice::from_ref(&region), &wish.setup())?;
        Ok(Self { region, transport })
    }

    /// Copies what the peer holds beside our own, and looks at it.
    fn read_from(&self, peer: &Export) -> anyhow::Result<()> {
        self.region.fill(END_BYTES, END_BYTES, 0)?;
        let link = self.transport.connect(peer, Instant::now() + REACH_MAX)?;
        let runs = vec![Run { src: 0, dst: END_BYTES, len: END_BYTES }];
        let runs = RunList { segments: vec![Segment::new(0, 0, runs)] };
        let (done, ended) = mpsc::channel();
        let deadline = Instant::now() + REACH_MAX;
        let request = TransferRequest { direction: Direction::Pull, runs, grant: None, deadline };
        link.submit(request, Box::new(move |outcome| drop(done.send(outcome))));
        ended.recv().context("the link dropped a completion")??;
        let read = self.region.to_vec(END_BYTES, END_BYTES)?;
        ensure!(read.iter().all(|byte| *byte == HELD), "it read other bytes than the peer holds");
        Ok(())
    }
}
