//! `pdlink bench soak`.

use std::process::ExitCode;
use std::time::Duration;

use super::Output;
use crate::bench::report::Level;
use crate::bench::soak;
use crate::cli::{Sources, load_config};
use crate::config::EngineKind;

#[derive(Debug, clap::Args)]
pub(super) struct SoakArgs {
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
    #[command(flatten)]
    output: Output,
}

pub(super) fn run(args: &SoakArgs, sources: &Sources) -> anyhow::Result<ExitCode> {
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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut broken = Vec::new();
    let code = args.output.tell(|_| {
        let report = runtime.block_on(soak::run(&options))?;
        broken = report.broken_promises();
        Ok(Level::Soak(report))
    })?;
    anyhow::ensure!(broken.is_empty(), "{}", broken.join("; "));
    Ok(code)
}
