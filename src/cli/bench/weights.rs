//! `pdlink bench weights`.

use std::process::ExitCode;

use super::fleet::Fleet;
use super::{Output, threads};
use crate::bench::report::Level;
use crate::bench::table::parse_size;
use crate::bench::weights;
use crate::cli::{Sources, Usage};

#[derive(Debug, clap::Args)]
pub(super) struct WeightsArgs {
    /// Sizes of checkpoints
    #[arg(long, value_delimiter = ',', value_parser = parse_size, default_value = "16M,256M")]
    bytes: Vec<u64>,
    /// Tensors of each
    #[arg(long, default_value_t = 64)]
    tensors: usize,
    /// Updates of each size
    #[arg(long, default_value_t = 9)]
    pushes: usize,
    /// Clients that stream answers meanwhile
    #[arg(long, default_value_t = 2)]
    clients: usize,
    /// Threads of the plain copy beside it [default: the cores, 1 to 8]
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(args: WeightsArgs, sources: &Sources) -> anyhow::Result<ExitCode> {
    let fleet = Fleet::of(sources)?;
    if !fleet.is_reference() {
        return Err(Usage::new(
            "vLLM's workers do not take weights from pdlink yet: give a configuration of reference engines, or none",
        )
        .into());
    }
    let options = weights::Options {
        fleet: fleet.arguments.clone(),
        admin_token: fleet.config.proxy.admin_token.clone(),
        bytes: args.bytes,
        tensors: args.tensors.max(1),
        pushes: args.pushes.max(1),
        clients: args.clients,
        threads: threads(args.threads),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    args.output.tell(|tell| runtime.block_on(weights::run(&options, tell)).map(Level::Weights))
}
