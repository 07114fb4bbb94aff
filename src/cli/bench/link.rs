//! `pdlink bench link`.

use std::process::ExitCode;

use clap::ValueEnum;

use super::hosts::Hosts;
use super::{AT_ONCE_MAX, Output, PathName, pair, threads};
use crate::bench::link::{self, Case, Way};
use crate::bench::report::Level;
use crate::bench::table::parse_size;
use crate::cli::Sources;

#[derive(Debug, clap::Args)]
pub(super) struct LinkArgs {
    /// Path to measure; several may be given [default: shm and tcp, between hosts tcp]
    #[arg(long, value_enum)]
    path: Vec<PathName>,
    /// Sizes of whole transfers
    #[arg(long, value_delimiter = ',', value_parser = parse_size, default_value = "1M,16M,64M,256M")]
    bytes: Vec<u64>,
    /// Sizes of the scattered runs that they consist of; a smaller transfer is one run
    #[arg(long, value_delimiter = ',', value_parser = parse_size, default_value = "4K,16K,64K,1M")]
    run_bytes: Vec<u64>,
    /// Threads that copy (shm), or sockets (tcp) [default: the cores, 1 to 8]
    #[arg(long)]
    threads: Option<usize>,
    /// Time per line of the table; lines that are slower have it from the others
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Which way bytes go: pull, push, both at the same time; several may be given
    #[arg(long, value_enum, value_delimiter = ',', default_value = "pull")]
    way: Vec<WayName>,
    /// Push into the other process's memory: short for `--way push`
    #[arg(long, conflicts_with = "way")]
    push: bool,
    /// Transfers under way at once: one row each
    #[arg(long, value_delimiter = ',', default_value = "1")]
    at_once: Vec<u32>,
    /// GPU of this process and of the other, or one number for both: cuda-ipc [default: 0], nccl [default:
    /// 0,1], and nixl for GPU memory
    #[arg(long, value_delimiter = ',')]
    gpus: Vec<i32>,
    #[command(flatten)]
    hosts: Hosts,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WayName {
    Pull,
    Push,
    Both,
}

pub(super) fn run(args: LinkArgs, sources: &Sources) -> anyhow::Result<ExitCode> {
    let Some(place) = args.hosts.place(sources)? else { return Ok(ExitCode::SUCCESS) };
    let default =
        || if place.other_host().is_some() { vec![PathName::Tcp] } else { vec![PathName::Shm, PathName::Tcp] };
    let named = if args.path.is_empty() { default() } else { args.path };
    let ways = if args.push { vec![WayName::Push] } else { args.way };
    let at_once: Vec<usize> = args.at_once.into_iter().map(|count| count.clamp(1, AT_ONCE_MAX) as usize).collect();
    let options = link::Options {
        paths: named.into_iter().map(PathName::path).collect(),
        cases: Case::all(&args.bytes, &args.run_bytes, &at_once),
        threads: threads(args.threads),
        seconds: args.seconds.clamp(0.0, 3600.0),
        ways: ways.into_iter().map(WayName::way).collect(),
        place,
        gpus: pair(&args.gpus),
    };
    args.output.tell(|_| link::run(&options).map(Level::Link))
}

impl WayName {
    fn way(self) -> Way {
        match self {
            Self::Pull => Way::Pull,
            Self::Push => Way::Push,
            Self::Both => Way::Both,
        }
    }
}
