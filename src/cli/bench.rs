//! `pdlink bench`: one subcommand per scenario. A scenario is a module of [`crate::bench`], a variant here and a line in [`run`].

mod all;
mod documents;
mod fleet;
mod hosts;
mod kv;
mod link;
mod output;
mod raw;
mod serve;
mod soak;
mod weights;

use std::process::ExitCode;

use clap::{Subcommand, ValueEnum};

use self::output::Output;
use super::Sources;
use crate::bench::partner::Lines;
use crate::bench::proxy;
use crate::bench::report::Level;
use crate::config::Path;

#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Args {
    #[command(subcommand)]
    scenario: Option<Scenario>,
    #[command(flatten)]
    all: all::AllArgs,
}

#[derive(Debug, Subcommand)]
enum Scenario {
    /// Every level in one run, on what this machine has: what `pdlink bench` does without a word.
    #[command(after_help = super::SOURCES_HELP)]
    All(all::AllArgs),
    /// What the machine does without pdlink: memcpy, plain sockets, the driver's copy, ncclSend, NIXL.
    #[command(after_help = super::SOURCES_HELP)]
    Raw(raw::RawArgs),
    /// The other process of `raw`.
    #[command(name = "plain-peer", hide = true)]
    PlainPeer,
    #[command(name = "nccl-peer", hide = true)]
    NcclPeer,
    /// Bytes between two processes over each path, against what the machine can do.
    #[command(after_help = super::SOURCES_HELP)]
    Link(link::LinkArgs),
    /// The other process of `link`.
    #[command(name = "link-peer", hide = true)]
    LinkPeer,
    /// The KV of whole requests between two workers, against what the machine can do.
    #[command(after_help = super::SOURCES_HELP)]
    Kv(kv::KvArgs),
    /// The other process of `kv`.
    #[command(name = "kv-peer", hide = true)]
    KvPeer,
    /// What the proxy costs between mock workers: processor time, added latency, memory.
    Proxy(ProxyArgs),
    /// A deployment as its clients see it: time to the first token, between tokens, and the hand-off's part of it.
    #[command(after_help = super::SOURCES_HELP)]
    Serve(serve::ServeArgs),
    /// New weights into reference engines that serve: GB/s beside a plain copy of the bytes, and the pause.
    #[command(after_help = super::SOURCES_HELP)]
    Weights(weights::WeightsArgs),
    /// A fleet under streaming clients while its workers are killed: wrong answers, unclear endings, blocks left held.
    #[command(after_help = super::SOURCES_HELP)]
    Soak(soak::SoakArgs),
    /// What got slower or faster between two reports, beyond noise; ends with 1 where something got slower.
    Compare(documents::CompareArgs),
    /// A report as one page with plots.
    Render(documents::RenderArgs),
    /// The form of reports, as JSON Schema.
    Schema,
}

#[derive(Debug, clap::Args)]
struct ProxyArgs {
    #[command(flatten)]
    scenario: proxy::Args,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PathName {
    CudaIpc,
    /// Between two GPUs, with the library that the loader or the active Python environment has
    Nccl,
    /// Over UCX, with the library of the active Python environment
    Nixl,
    Shm,
    Tcp,
}

pub(super) fn run(args: Args, sources: Sources) -> anyhow::Result<ExitCode> {
    let peer = |serve: fn(Lines) -> anyhow::Result<()>| serve(Lines::of_this_process()).map(|()| ExitCode::SUCCESS);
    match args.scenario.unwrap_or(Scenario::All(args.all)) {
        Scenario::All(args) => all::run(args, &sources),
        Scenario::Raw(args) => raw::run(args, &sources),
        Scenario::PlainPeer => peer(crate::bench::raw::serve_plain),
        Scenario::NcclPeer => peer(crate::bench::raw::serve_nccl_peer),
        Scenario::Link(args) => link::run(args, &sources),
        Scenario::LinkPeer => peer(|lines| crate::bench::link::serve_peer(lines, None)),
        Scenario::Kv(args) => kv::run(args, &sources),
        Scenario::KvPeer => peer(|lines| crate::bench::kv::serve_peer(lines, None)),
        Scenario::Proxy(args) => run_proxy(&args),
        Scenario::Serve(args) => serve::run(args, &sources),
        Scenario::Weights(args) => weights::run(args, &sources),
        Scenario::Soak(args) => soak::run(&args, &sources),
        Scenario::Compare(args) => documents::run_compare(&args),
        Scenario::Render(args) => documents::run_render(&args),
        Scenario::Schema => documents::run_schema(),
    }
}

fn run_proxy(args: &ProxyArgs) -> anyhow::Result<ExitCode> {
    if args.scenario.is_a_part() {
        proxy::run_part(&args.scenario)?;
        return Ok(ExitCode::SUCCESS);
    }
    args.output.tell(|tell| proxy::run(&args.scenario, tell).map(Level::Proxy))
}

impl PathName {
    fn path(self) -> Path {
        match self {
            Self::Shm => Path::Shm,
            Self::Tcp => Path::Tcp,
            Self::CudaIpc => Path::CudaIpc,
            Self::Nccl => Path::Nccl,
            Self::Nixl => Path::Nixl,
        }
    }
}

/// Transfers, or requests, that are under way at once.
const AT_ONCE_MAX: u32 = 256;

/// One number for both, or one each.
fn pair(gpus: &[i32]) -> Option<[i32; 2]> {
    gpus.first().map(|first| [*first, gpus.get(1).copied().unwrap_or(*first)])
}

/// Threads to copy with.
fn threads(named: Option<usize>) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 8);
    named.unwrap_or_else(cores).max(1)
}
