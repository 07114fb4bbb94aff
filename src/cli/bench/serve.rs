//! `pdlink bench serve`.

use std::process::ExitCode;
use std::time::Duration;

use crate::bench::report::Level;
use crate::bench::serve::{self, Options, Pace, Target};
use crate::cli::{Sources, Usage, load_config};
use crate::config::ProxyConfig;

#[derive(Debug, clap::Args)]
pub(super) struct ServeArgs {
    /// The proxy of a running deployment (default: one is started from `@ FILE`)
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Where the proxy's admin routes are, for the records of transfers [default: `proxy.admin_listen`, else where requests go]
    #[arg(long, value_name = "URL")]
    admin_url: Option<String>,
    /// The token that they ask for [default: `proxy.admin_token`]
    #[arg(long, value_name = "TOKEN", env = "PDLINK_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// Also measure this server, which answers without PD: a plain one, or one of the workers
    #[arg(long, value_name = "URL")]
    baseline_url: Option<String>,
    /// The model that requests name [default: the first that each server lists]
    #[arg(long)]
    model: Option<String>,
    /// Lengths of prompts, in tokens
    #[arg(long, value_delimiter = ',', default_value = "128,1024")]
    prompt_tokens: Vec<usize>,
    /// Tokens of each answer
    #[arg(long, default_value_t = 64)]
    output_tokens: u32,
    /// Clients at once, each asking again when it has its answer: one row each
    #[arg(long, value_delimiter = ',', default_value = "1,8", conflicts_with = "rate")]
    concurrency: Vec<usize>,
    /// Requests a second on average, at random moments, instead of clients at once: one row each
    #[arg(long, value_delimiter = ',')]
    rate: Vec<f64>,
    /// Requests per row
    #[arg(long, default_value_t = 64)]
    requests: usize,
    /// Requests before each row that do not count
    #[arg(long, default_value_t = 4)]
    warm_up: usize,
    /// Seed of prompts and moments
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Send prompts as text, rather than as token ids. How many tokens they have is then up to the tokenizer
    #[arg(long)]
    text: bool,
    #[command(flatten)]
    output: super::Output,
}

pub(super) fn run(args: ServeArgs, sources: &Sources) -> anyhow::Result<ExitCode> {
    let (target, own) = target(args.url, sources)?;
    let options = Options {
        target,
        admin_url: args.admin_url.or(own.admin_listen),
        admin_token: args.admin_token.or(own.admin_token),
        baseline: args.baseline_url,
        model: args.model,
        prompt_tokens: args.prompt_tokens,
        output_tokens: args.output_tokens.max(1),
        loads: if args.rate.is_empty() {
            args.concurrency.into_iter().map(|clients| Pace::AtOnce(clients.max(1))).collect()
        } else {
            args.rate.into_iter().map(Pace::PerSecond).collect()
        },
        requests: args.requests.max(1),
        warm_up: args.warm_up,
        seed: args.seed,
        as_text: args.text,
    };
    if options.loads.iter().any(|load| matches!(load, Pace::PerSecond(rate) if !rate.is_finite() || *rate <= 0.0)) {
        return Err(Usage::new("--rate must be above 0 requests a second").into());
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    args.output.tell(|tell| runtime.block_on(serve::run(&options, tell)).map(Level::Serve))
}

/// What is measured, and how its proxy is set up where we are to start it.
fn target(url: Option<String>, sources: &Sources) -> anyhow::Result<(Target, ProxyConfig)> {
    match (url, sources.files.is_empty() && sources.overrides.is_empty()) {
        (Some(url), true) => Ok((Target::Url(url), ProxyConfig::default())),
        (Some(_), false) => {
            Err(Usage::new("--url names a deployment that runs, and a configuration one to start: give one of the two")
                .into())
        }
        (None, true) => {
            Err(Usage::new("nothing to measure: give --url http://HOST:PORT, or a configuration to start (`@ FILE`)")
                .into())
        }
        (None, false) => {
            let config = load_config(sources)?.config;
            let within = Duration::try_from_secs_f64(config.launcher.ready_timeout_s).unwrap_or(Duration::MAX);
            // Looking at the environment and meeting the peers come on top of what each worker may take.
            let within = within.saturating_add(Duration::from_secs(180));
            Ok((Target::Start { arguments: sources.to_arguments(), within }, config.proxy))
        }
    }
}
