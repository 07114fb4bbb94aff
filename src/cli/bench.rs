//! `pdlink bench`: one subcommand per scenario. A scenario is a module of [`crate::bench`], a variant here and a line in [`run`].

mod kv;
mod serve;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use serde::Serialize;

use super::{Sources, load_config, print};
use crate::bench::environment::Environment;
use crate::bench::table::parse_size;
use crate::bench::{link, proxy, soak};
use crate::config::{EngineKind, Path};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Debug, Subcommand)]
enum Scenario {
    /// Bytes between two processes over each path, against what the machine can do.
    Link(LinkArgs),
    /// The other process of `link`.
    #[command(name = "link-peer", hide = true)]
    LinkPeer,
    /// The KV of whole requests between two workers, against a parallel memcpy.
    Kv(kv::KvArgs),
    /// The other process of `kv`.
    #[command(name = "kv-peer", hide = true)]
    KvPeer,
    /// What the proxy costs between mock workers: processor time, added latency, memory.
    Proxy(proxy::Args),
    /// A deployment as its clients see it: time to the first token, between tokens, and the hand-off's part of it.
    #[command(after_help = super::SOURCES_HELP)]
    Serve(serve::ServeArgs),
    /// A fleet under streaming clients while its workers are killed: wrong answers, unclear endings, blocks left held.
    Soak(SoakArgs),
}

#[derive(Debug, clap::Args)]
struct LinkArgs {
    /// Path to measure; several may be given [default: shm and tcp]
    #[arg(long, value_enum)]
    path: Vec<PathName>,
    /// Sizes of whole transfers
    #[arg(long, value_delimiter = ',', value_parser = parse_size, default_value = "1M,16M,64M,256M")]
    bytes: Vec<u64>,
    /// Sizes of the scattered runs that they consist of
    #[arg(long, value_delimiter = ',', value_parser = parse_size, default_value = "4K,16K,64K,1M")]
    run_bytes: Vec<u64>,
    /// Threads that copy (shm), or sockets (tcp) [default: the cores, 1 to 8]
    #[arg(long)]
    threads: Option<usize>,
    /// Time per line of the table
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Push into the other process's memory, rather than pull from it
    #[arg(long)]
    push: bool,
    /// GPU of this process and of the other, or one number for both: cuda-ipc [default: 0], nccl [default:
    /// 0,1], and nixl for GPU memory
    #[arg(long, value_delimiter = ',')]
    gpus: Vec<i32>,
    /// Also write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct SoakArgs {
    /// Clients that stream at once
    #[arg(long, default_value_t = 64)]
    clients: usize,
    /// How long they ask
    #[arg(long, default_value_t = 300.0)]
    seconds: f64,
    /// Seconds between two kills of a worker; 0 kills none
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    kill_every: f64,
    /// Share of requests whose client leaves half-way
    #[arg(long, default_value_t = 0.1)]
    leave_share: f64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Also write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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
    match args.scenario {
        Scenario::Link(args) => run_link(args),
        Scenario::LinkPeer => link::serve_peer().map(|()| ExitCode::SUCCESS),
        Scenario::Kv(args) => kv::run(args),
        Scenario::KvPeer => crate::bench::kv::serve_peer().map(|()| ExitCode::SUCCESS),
        Scenario::Proxy(args) => proxy::run(&args),
        Scenario::Serve(args) => serve::run(args, &sources),
        Scenario::Soak(args) => run_soak(&args, &sources),
    }
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

/// One number for both, or one each.
fn pair(gpus: &[i32]) -> Option<[i32; 2]> {
    gpus.first().map(|first| [*first, gpus.get(1).copied().unwrap_or(*first)])
}

fn run_link(args: LinkArgs) -> anyhow::Result<ExitCode> {
    let named = if args.path.is_empty() { vec![PathName::Shm, PathName::Tcp] } else { args.path };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 8);
    let options = link::Options {
        paths: named.into_iter().map(PathName::path).collect(),
        bytes: args.bytes,
        run_bytes: args.run_bytes,
        threads: args.threads.unwrap_or_else(cores).max(1),
        seconds: args.seconds.clamp(0.0, 3600.0),
        push: args.push,
        gpus: pair(&args.gpus),
    };
    tell(args.json.as_deref(), |text| link::run(&options, text))
}

fn run_soak(args: &SoakArgs, sources: &Sources) -> anyhow::Result<ExitCode> {
    let kill_every = Duration::from_secs_f64(args.kill_every.clamp(0.0, 86_400.0));
    let config = load_config(sources)?.config;
    anyhow::ensure!(
        config.pd_disagg.enabled && config.inference.engine == EngineKind::Reference,
        "the soak needs a configuration of reference engines with PD on, as in configs/debug/local_2p2d.toml"
    );
    let options = soak::Options {
        fleet: sources.to_arguments(),
        model: config.model_name().to_owned(),
        kv_bytes_per_token: config.inference.reference.bytes_per_token(),
        clients: args.clients.max(1),
        seconds: args.seconds.clamp(1.0, 86_400.0),
        kill_every: (!kill_every.is_zero()).then_some(kill_every),
        leave_share: args.leave_share.clamp(0.0, 1.0),
        seed: args.seed,
    };
    print(&format!("{}\n", Environment::current()))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(soak::run(&options))?;
    print(&report.to_string())?;
    if let Some(file) = &args.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)?)?;
    }
    let broken = report.broken_promises();
    anyhow::ensure!(broken.is_empty(), "{}", broken.join("; "));
    Ok(ExitCode::SUCCESS)
}

/// Runs a scenario that says its lines as they come, and writes its report to a file where one was named.
fn tell<R: Serialize>(
    json: Option<&std::path::Path>,
    run: impl FnOnce(&mut dyn FnMut(&str)) -> anyhow::Result<R>,
) -> anyhow::Result<ExitCode> {
    let mut told = Ok(());
    let report = run(&mut |text| {
        if told.is_ok() {
            told = print(text);
        }
    })?;
    told?;
    if let Some(file) = json {
        std::fs::write(file, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(ExitCode::SUCCESS)
}
