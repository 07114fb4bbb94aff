//! `pdlink bench kv`.

use std::process::ExitCode;

use clap::ValueEnum;

use super::hosts::Hosts;
use super::{AT_ONCE_MAX, Output, PathName, pair, threads};
use crate::bench::kv::{self, Case};
use crate::bench::report::Level;
use crate::cli::Sources;
use crate::config::KvSendType;

#[derive(Debug, clap::Args)]
pub(super) struct KvArgs {
    /// Path to measure; several may be given [default: shm, between hosts tcp]
    #[arg(long, value_enum)]
    path: Vec<PathName>,
    /// Whose KV is moved
    #[arg(long, value_enum, default_value = "qwen3-8b")]
    shape: kv::Shape,
    /// How blocks lie in memory
    #[arg(long, value_enum, default_value = "split-kv")]
    layout: kv::Layout,
    /// Lengths of prompts
    #[arg(long, value_delimiter = ',', default_value = "16,256,2048")]
    tokens: Vec<u32>,
    /// Requests whose KV is handed over at once, each into blocks of its own: one row each
    #[arg(long, value_delimiter = ',', default_value = "1")]
    at_once: Vec<u32>,
    /// Tokens in a block
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// Who moves the bytes: GET, PUT or PUT_ASYNC; several may be given [default: GET and PUT_ASYNC]
    #[arg(long, value_enum, ignore_case = true)]
    send_type: Vec<SendTypeName>,
    /// Threads that copy (shm), or sockets (tcp), on each side [default: the cores, 1 to 8]
    #[arg(long)]
    threads: Option<usize>,
    /// Digest every transfer
    #[arg(long)]
    digest: bool,
    /// GPU of the decode worker and of the prefill worker, or one number for both: cuda-ipc [default: 0], and nixl for KV in GPU
    /// memory
    #[arg(long, value_delimiter = ',')]
    gpus: Vec<i32>,
    /// Time per line of the table; lines that are slower have it from the others
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Tensor-parallel ranks of the prefill worker
    #[arg(long, default_value_t = 1)]
    prefill_tp: u32,
    /// Tensor-parallel ranks of the decode worker
    #[arg(long, default_value_t = 1)]
    decode_tp: u32,
    #[command(flatten)]
    hosts: Hosts,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SendTypeName {
    #[value(name = "GET")]
    Get,
    #[value(name = "PUT")]
    Put,
    #[value(name = "PUT_ASYNC")]
    PutAsync,
}

pub(super) fn run(args: KvArgs, sources: &Sources) -> anyhow::Result<ExitCode> {
    let Some(place) = args.hosts.place(sources)? else { return Ok(ExitCode::SUCCESS) };
    let default = if place.other_host().is_some() { PathName::Tcp } else { PathName::Shm };
    let paths = if args.path.is_empty() { vec![default] } else { args.path };
    let send_types =
        if args.send_type.is_empty() { vec![SendTypeName::Get, SendTypeName::PutAsync] } else { args.send_type };
    let at_once: Vec<u32> = args.at_once.into_iter().map(|count| count.clamp(1, AT_ONCE_MAX)).collect();
    let options = kv::Options {
        paths: paths.into_iter().map(PathName::path).collect(),
        shape: args.shape,
        layout: args.layout,
        cases: Case::all(&args.tokens, &at_once),
        block_size: args.block_size,
        send_types: send_types.into_iter().map(SendTypeName::send_type).collect(),
        threads: threads(args.threads),
        digest: args.digest,
        gpus: pair(&args.gpus),
        prefill_tp: args.prefill_tp,
        decode_tp: args.decode_tp,
        place,
        seconds: args.seconds.clamp(0.0, 3600.0),
    };
    args.output.tell(|_| kv::run(&options).map(Level::Kv))
}

impl SendTypeName {
    fn send_type(self) -> KvSendType {
        match self {
            Self::Get => KvSendType::Get,
            Self::Put => KvSendType::Put,
            Self::PutAsync => KvSendType::PutAsync,
        }
    }
}
