//! `pdlink bench` without a scenario: every level in one run.

use std::process::ExitCode;

use super::fleet::Fleet;
use super::{Output, pair, threads};
use crate::bench::all::{self, Name};
use crate::bench::{kv, proxy};
use crate::cli::Sources;

#[derive(Debug, clap::Args)]
pub(super) struct AllArgs {
    /// Measure these levels alone
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Name>,
    /// Few sizes and little time: a minute or so, for a look or a gate
    #[arg(long)]
    quick: bool,
    /// Whose KV is moved; several may be given
    #[arg(long, value_enum, value_delimiter = ',', default_value = "qwen3-8b")]
    shape: Vec<kv::Shape>,
    /// How blocks lie in memory
    #[arg(long, value_enum, default_value = "split-kv")]
    layout: kv::Layout,
    /// Lengths of prompts whose KV is moved
    #[arg(long, value_delimiter = ',', default_value = "16,256,2048")]
    tokens: Vec<u32>,
    /// Tokens in a block
    #[arg(long, default_value_t = 16)]
    block_size: u32,
    /// Tensor-parallel ranks of the prefill worker whose KV is moved
    #[arg(long, default_value_t = 1)]
    prefill_tp: u32,
    /// Tensor-parallel ranks of the decode worker that gets it
    #[arg(long, default_value_t = 1)]
    decode_tp: u32,
    /// Threads that copy, or sockets [default: the cores, 1 to 8]
    #[arg(long)]
    threads: Option<usize>,
    /// Time per line of the tables of raw, link and kv, whatever it comes to [default: 0.5, with --quick 0.1, or less where a
    /// level has so many lines that they would take it more than 20, 50 and 20 seconds]
    #[arg(long)]
    seconds: Option<f64>,
    /// GPU of this process and of the other, or one number for both [default: the first two]
    #[arg(long, value_delimiter = ',')]
    gpus: Vec<i32>,
    /// A server that answers without PD, to measure beside the fleet [default: a reference engine, where the fleet is of such]
    #[arg(long, value_name = "URL")]
    baseline_url: Option<String>,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(args: AllArgs, sources: &Sources) -> anyhow::Result<ExitCode> {
    let fleet = Fleet::of(sources)?;
    let options = all::Options {
        levels: if args.only.is_empty() { Name::ALL.to_vec() } else { args.only },
        quick: args.quick,
        shapes: args.shape,
        layout: args.layout,
        tokens: args.tokens,
        block_size: args.block_size,
        prefill_tp: args.prefill_tp,
        decode_tp: args.decode_tp,
        threads: threads(args.threads),
        seconds: args.seconds.map(|seconds| seconds.clamp(0.0, 3600.0)),
        gpus: pair(&args.gpus),
        fleet: fleet.arguments.clone(),
        is_reference: fleet.is_reference(),
        admin_url: fleet.config.proxy.admin_listen.clone(),
        admin_token: fleet.config.proxy.admin_token.clone(),
        baseline_url: args.baseline_url,
        within: fleet.within,
        proxy: proxy::Args::brief(args.quick),
    };
    args.output.tell_all(|report, tell| all::run(&options, report, tell))
}
