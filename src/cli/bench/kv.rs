//! `pdlink bench kv`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::ValueEnum;

use crate::bench::kv;
use crate::cli::bench::PathName;
use crate::config::KvSendType;

#[derive(Debug, clap::Args)]
pub(super) struct KvArgs {
    /// Path to measure; several may be given [default: shm]
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
    /// Time per line of the table
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Also write the report to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
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

pub(super) fn run(args: KvArgs) -> anyhow::Result<ExitCode> {
    let paths = if args.path.is_empty() { vec![PathName::Shm] } else { args.path };
    let send_types =
        if args.send_type.is_empty() { vec![SendTypeName::Get, SendTypeName::PutAsync] } else { args.send_type };
    let cores = || std::thread::available_parallelism().map_or(1, usize::from).clamp(1, 8);
    let options = kv::Options {
        paths: paths.into_iter().map(PathName::path).collect(),
        shape: args.shape,
        layout: args.layout,
        tokens: args.tokens,
        block_size: args.block_size,
        send_types: send_types.into_iter().map(SendTypeName::send_type).collect(),
        threads: args.threads.unwrap_or_else(cores).max(1),
        digest: args.digest,
        gpus: super::pair(&args.gpus),
        seconds: args.seconds.clamp(0.0, 3600.0),
    };
    super::tell(args.json.as_deref(), |text| kv::run(&options, text))
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
