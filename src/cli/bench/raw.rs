//! `pdlink bench raw`.

use std::process::ExitCode;

use clap::ValueEnum;

use super::hosts::Hosts;
use super::{Output, pair, threads};
use crate::bench::raw::{self, Means};
use crate::bench::report::Level;
use crate::bench::table::parse_size;
use crate::cli::Sources;

#[derive(Debug, clap::Args)]
pub(super) struct RawArgs {
    /// Who moves the bytes; several may be given [default: memcpy and sockets, between hosts sockets]
    #[arg(long, value_enum, value_delimiter = ',')]
    means: Vec<MeansName>,
    /// Sizes
    #[arg(long, value_delimiter = ',', value_parser = parse_size, default_value = "4K,64K,1M,16M,256M")]
    bytes: Vec<u64>,
    /// Most threads, or sockets [default: the cores, 1 to 8]
    #[arg(long)]
    threads: Option<usize>,
    /// Time per line of the table; lines that are slower have it from the others
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// GPU of this process and of the other
    #[arg(long, value_delimiter = ',', default_value = "0,1")]
    gpus: Vec<i32>,
    #[command(flatten)]
    hosts: Hosts,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum MeansName {
    /// Threads that copy memory
    Memcpy,
    /// Plain sockets with read and write loops
    Sockets,
    /// The driver's copy between GPUs
    GpuCopy,
    /// `ncclSend` of one buffer
    NcclSend,
    /// One single run by NIXL
    Nixl,
}

pub(super) fn run(args: RawArgs, sources: &Sources) -> anyhow::Result<ExitCode> {
    let Some(place) = args.hosts.place(sources)? else { return Ok(ExitCode::SUCCESS) };
    let elsewhere = place.other_host().is_some();
    let means = match (args.means.is_empty(), elsewhere) {
        (false, _) => args.means.into_iter().map(MeansName::means).collect(),
        (true, true) => vec![Means::Sockets],
        (true, false) => vec![Means::Memcpy, Means::Sockets],
    };
    let mut bytes = args.bytes;
    bytes.sort_unstable();
    let options = raw::Options {
        means,
        bytes_aside: bytes.clone(),
        bytes,
        threads: threads(args.threads),
        seconds: args.seconds.clamp(0.0, 3600.0),
        gpus: pair(&args.gpus).unwrap_or([0, 1]),
        place,
    };
    args.output.tell(|_| raw::run(&options).map(Level::Raw))
}

impl MeansName {
    fn means(self) -> Means {
        match self {
            Self::Memcpy => Means::Memcpy,
            Self::Sockets => Means::Sockets,
            Self::GpuCopy => Means::GpuCopy,
            Self::NcclSend => Means::NcclSend,
            Self::Nixl => Means::Nixl,
        }
    }
}
