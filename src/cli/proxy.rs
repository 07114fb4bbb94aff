//! `pdlink proxy`: the front alone, before workers that something else started.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{Config, ConnectorImpl, KvConnector, LoadError, Origin, Override, Role};
use crate::proxy::{Connector, Drained, Mode, ProxyHandle, ProxySetup, REQUEST_IDS_LAST, WorkerAddress, serve};
use crate::security::{SECRET_FILE_ENV, Secret};
use crate::telemetry;

use super::listen::listen;
use super::{Sources, Usage, load_config, print};

/// PRIME-RL's own default for `--health-check-failure-threshold`.
const HEALTH_FAILURES_MAX: u32 = 2;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Host to listen on [default: `pd_disagg.host`, else `inference.server.host`, else 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Port to listen on; 0 takes a free one [default: `pd_disagg.proxy_port`]
    #[arg(long)]
    port: Option<u16>,
    /// URLs of the prefill workers; none means plain workers
    #[arg(long, value_name = "URL", num_args = 1.., value_delimiter = ',', alias = "prefill-urls")]
    prefill: Vec<String>,
    /// URLs of the decode workers
    #[arg(long, value_name = "URL", num_args = 1.., value_delimiter = ',', alias = "decode-urls", required = true)]
    decode: Vec<String>,
    /// KV addresses (host:port) of the prefill workers, in the same order [default: their hosts and `prefill_kv_port` + number]
    #[arg(long, value_name = "ADDR", num_args = 1.., value_delimiter = ',')]
    prefill_kv_addrs: Vec<String>,
    /// KV addresses (host:port) of the decode workers [default: their hosts and `decode_kv_port` + number]
    #[arg(long, value_name = "ADDR", num_args = 1.., value_delimiter = ',')]
    decode_kv_addrs: Vec<String>,
    /// Where the prefill workers' first ranks take orders about new weights (host:port) [default: their KV addresses, with pdlink's
    /// own connector]
    #[arg(long, value_name = "ADDR", num_args = 1.., value_delimiter = ',')]
    prefill_weights_addrs: Vec<String>,
    /// The same of the decode workers, or of plain workers
    #[arg(long, value_name = "ADDR", num_args = 1.., value_delimiter = ',')]
    decode_weights_addrs: Vec<String>,
    /// The connector that the workers run [default: `pd_disagg.kv_connector`]
    #[arg(long, value_name = "NAME")]
    connector: Option<ConnectorName>,
    /// Whose code stands behind that name; with KV addresses given and nothing said, vLLM's [default: `pd_disagg.connector_impl`]
    #[arg(long, value_name = "IMPL")]
    connector_impl: Option<ImplName>,
    /// File with the run's secret, for the workers' runtimes [default: `security.secret_file`, else $PDLINK_SECRET_FILE]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
    /// Bound on every wait for a worker, in seconds (PRIME-RL's flag) [default: the times of `[proxy]`]
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<String>,
    /// Pairs tried for one request (PRIME-RL's flag) [default: `proxy.attempts_max`]
    #[arg(long, value_name = "N")]
    max_generate_attempts: Option<String>,
    /// How often each worker's /health is asked, in seconds (PRIME-RL's flag) [default: `proxy.health_interval_s`]
    #[arg(long, value_name = "SECONDS")]
    health_check_interval: Option<String>,
    /// How long a health answer may take, in seconds (PRIME-RL's flag) [default: `proxy.health_timeout_s`]
    #[arg(long, value_name = "SECONDS")]
    health_check_timeout: Option<String>,
    /// Health questions that may fail in a row before a worker counts as down (PRIME-RL's flag)
    #[arg(long, value_name = "N", default_value_t = HEALTH_FAILURES_MAX, value_parser = clap::value_parser!(u32).range(1..))]
    health_check_failure_threshold: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ConnectorName {
    #[value(name = "P2pNcclConnector")]
    P2pNccl,
    #[value(name = "NixlConnector")]
    Nixl,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ImplName {
    Native,
    Vllm,
}

pub(super) fn run(args: Args, mut sources: Sources) -> anyhow::Result<ExitCode> {
    sources.overrides.extend(overrides(&args));
    let config = load_config(&sources).map_err(once_per_flag)?.config;
    telemetry::log::init(config.telemetry.log_format, &config.telemetry.log_level);
    let setup = setup(&args, &config)?;
    let parts = (setup.prefill.len(), setup.decode.len());
    let connector = args.connector.map_or(config.pd_disagg.kv_connector, Into::into);
    let dialect = dialect_words(setup.connector);
    let handle = serve(setup).map_err(|error| {
        if error.is_configuration() { Usage::new(error.to_string()).into() } else { anyhow::Error::new(error) }
    })?;
    let (prefill, decode) = parts;
    let address = handle.address();
    let workers = match prefill {
        0 => format!("{decode} plain"),
        _ => format!("{prefill} prefill, {decode} decode, {}, {dialect}", connector.name()),
    };
    print(&format!("ready: http://{address}/v1 ({workers})\n"))?;
    wait_for_end(handle, Duration::from_secs_f64(config.launcher.drain_s))?;
    Ok(ExitCode::SUCCESS)
}

impl From<ConnectorName> for KvConnector {
    fn from(name: ConnectorName) -> Self {
        match name {
            ConnectorName::P2pNccl => Self::P2pNcclConnector,
            ConnectorName::Nixl => Self::NixlConnector,
        }
    }
}

/// The setup that flags and configuration describe, its listeners open.
fn setup(args: &Args, config: &Config) -> anyhow::Result<ProxySetup> {
    let connector = dialect(args, config);
    let mode = if args.prefill.is_empty() { Mode::Plain } else { Mode::Disaggregated };
    let host = args.host.as_deref().unwrap_or_else(|| config.host());
    let listener = listen(host, args.port.unwrap_or_else(|| config.proxy_port()))?;
    let admin_listener = config.proxy.admin_listen.as_deref().map(listen_at).transpose()?;
    let secret = secret(args, config, &listener, connector)?;
    Ok(ProxySetup {
        weights: config.weights.clone(),
        prefill: workers(&args.prefill, (&args.prefill_kv_addrs, &args.prefill_weights_addrs), Role::Prefill, config)?,
        decode: workers(&args.decode, (&args.decode_kv_addrs, &args.decode_weights_addrs), Role::Decode, config)?,
        listener,
        admin_listener,
        config: config.proxy.clone(),
        telemetry: config.telemetry.clone(),
        connector,
        mode,
        secret,
        registry: Default::default(),
        health_failures_max: args.health_check_failure_threshold,
    })
}

/// How the legs name each other. KV addresses on the command line are how PRIME-RL's scripts drive vLLM's
/// P2pNcclConnector, so they mean that unless the implementation is named.
fn dialect(args: &Args, config: &Config) -> Connector {
    let name = args.connector.map_or(config.pd_disagg.kv_connector, Into::into);
    let given = !args.prefill_kv_addrs.is_empty() || !args.decode_kv_addrs.is_empty();
    let vllm = match args.connector_impl {
        Some(implementation) => implementation == ImplName::Vllm,
        None => given || config.pd_disagg.connector_impl == ConnectorImpl::Vllm,
    };
    match (vllm, name) {
        (false, _) => Connector::Native,
        (true, KvConnector::NixlConnector) => Connector::VllmNixl,
        (true, KvConnector::P2pNcclConnector) => Connector::P2pNccl,
    }
}

/// How the legs name each other, in the ready line.
fn dialect_words(connector: Connector) -> String {
    let (major, minor) = REQUEST_IDS_LAST;
    match connector {
        Connector::Native => "native".to_owned(),
        Connector::VllmNixl => "vllm".to_owned(),
        Connector::P2pNccl => format!("request ids, for vLLM up to {major}.{minor}"),
    }
}

/// The settings that PRIME-RL's flags stand for; the configuration's own ranges judge them.
fn overrides(args: &Args) -> Vec<Override> {
    let flags = [
        (
            "timeout",
            &args.timeout,
            &["request_timeout_s", "prefill_timeout_s", "first_byte_timeout_s", "idle_timeout_s"][..],
        ),
        ("max-generate-attempts", &args.max_generate_attempts, &["attempts_max"]),
        ("health-check-interval", &args.health_check_interval, &["health_interval_s"]),
        ("health-check-timeout", &args.health_check_timeout, &["health_timeout_s"]),
    ];
    let given = flags.into_iter().filter_map(|(flag, value, keys)| Some((flag, value.as_ref()?, keys)));
    given
        .flat_map(|(flag, value, keys)| {
            keys.iter().map(move |key| Override::of_flag(flag, format!("proxy.{key}"), value))
        })
        .collect()
}

/// What is wrong with a flag that stands for several settings is told once.
fn once_per_flag(error: anyhow::Error) -> anyhow::Error {
    match error.downcast::<LoadError>() {
        Ok(mut load) => {
            load.findings.dedup_by(|next, last| {
                matches!(last.origin, Some(Origin::CommandLine(_)))
                    && (&next.origin, &next.message) == (&last.origin, &last.message)
            });
            load.into()
        }
        Err(other) => other,
    }
}

/// Workers with their KV addresses: as given, else each worker's host and the role's KV port plus its number.
fn workers(
    urls: &[String],
    (kv_addrs, weights_addrs): (&[String], &[String]),
    role: Role,
    config: &Config,
) -> anyhow::Result<Vec<WorkerAddress>> {
    for (addrs, kind) in [(kv_addrs, "KV addresses"), (weights_addrs, "addresses for weights")] {
        if !addrs.is_empty() && addrs.len() != urls.len() {
            let message =
                format!("{} {} workers but {} {kind}; give one for each", urls.len(), role.name(), addrs.len());
            return Err(Usage::new(message).into());
        }
    }
    let base = config.pd_disagg.base_kv_port(role);
    let worker = |(number, url): (usize, &String)| {
        let host = url.strip_prefix("http://").and_then(|rest| rest.split('/').next()?.rsplit_once(':'));
        let port = u16::try_from(number).ok().and_then(|number| base.checked_add(number));
        let derived = host.zip(port).map(|((host, _), port)| format!("{host}:{port}"));
        let kv_addr = kv_addrs.get(number).cloned().or(derived);
        let weights_addr = weights_addrs.get(number).cloned();
        WorkerAddress { url: url.clone(), kv_addr, weights_addr, tp: config.tp(role), name: None, gpus: Vec::new() }
    };
    Ok(urls.iter().enumerate().map(worker).collect())
}

/// The run's secret. The well-known one is for loopback only; vLLM's own connectors need none.
fn secret(args: &Args, config: &Config, listener: &TcpListener, connector: Connector) -> anyhow::Result<Secret> {
    let named = args.secret_file.clone().or_else(|| config.security.secret_file.clone());
    let file = named.or_else(|| std::env::var_os(SECRET_FILE_ENV).map(PathBuf::from));
    if let Some(file) = file {
        return Ok(Secret::read_file(&file)?);
    }
    let secret = Secret::loopback();
    if connector == Connector::Native {
        secret.allowed_on(listener.local_addr()?.ip())?;
    }
    Ok(secret)
}

fn listen_at(address: &str) -> anyhow::Result<TcpListener> {
    let parsed = address.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse::<u16>().ok()?)));
    let (host, port) =
        parsed.ok_or_else(|| Usage::new(format!("`proxy.admin_listen` must be host:port, got `{address}`")))?;
    listen(host.trim_matches(['[', ']']), port)
}

/// Serves until SIGINT or SIGTERM, then drains; a second signal ends it at once.
fn wait_for_end(handle: ProxyHandle, grace: Duration) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let mut asked = async || {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        };
        asked().await;
        tracing::info!(inflight = handle.inflight(), "asked to end: finishing what is in flight");
        let drained = tokio::task::spawn_blocking(move || handle.shutdown(grace));
        tokio::select! {
            drained = drained => {
                if let Drained::Cut { requests } = drained? {
                    tracing::warn!(requests, grace_s = grace.as_secs_f64(), "requests did not end in time and were cut off");
                }
            }
            () = asked() => tracing::warn!("asked again: ending at once"),
        }
        anyhow::Ok(())
    })?;
    // A shutdown still under way must not hold the process.
    runtime.shutdown_background();
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &str) -> Args {
        Line::try_parse_from(std::iter::once("proxy").chain(line.split_whitespace())).expect("a valid line").args
    }

    #[test]
    fn prime_rls_launch_line_drives_vllms_connector() {
        let args = args(
            "--host 0.0.0.0 --port 8000 --prefill-urls http://a:1,http://b:1 --decode-urls http://c:1 \
             --prefill-kv-addrs a:5,b:5 --decode-kv-addrs c:6 --timeout 21600 --max-generate-attempts 2 \
             --health-check-interval 5 --health-check-timeout 5 --health-check-failure-threshold 2",
        );
        let config = Config::default();
        assert_eq!(dialect(&args, &config), Connector::P2pNccl);
        let prefill = workers(&args.prefill, (&args.prefill_kv_addrs, &[]), Role::Prefill, &config).expect("workers");
        assert_eq!(prefill[1].kv_addr.as_deref(), Some("b:5"));
        let settings = overrides(&args);
        assert_eq!(settings.len(), 7);
        assert!(settings.contains(&Override::of_flag("timeout", "proxy.prefill_timeout_s", "21600")));
    }

    #[test]
    fn our_own_line_is_native_and_derives_kv_addresses() {
        let args = args("--port 0 --prefill http://a:1 http://b:1/ --decode http://c:1");
        let config = Config::default();
        assert_eq!(dialect(&args, &config), Connector::Native);
        let prefill = workers(&args.prefill, (&[], &[]), Role::Prefill, &config).expect("workers");
        assert_eq!(prefill[1].kv_addr.as_deref(), Some("b:14580"));
        assert!(workers(&args.prefill, (&["x:1".to_owned()], &[]), Role::Prefill, &config).is_err());
    }

    #[test]
    fn the_ready_line_says_the_dialect_and_what_reads_it() {
        let words = dialect_words(Connector::P2pNccl);
        assert_eq!(words, format!("request ids, for vLLM up to {}", crate::topology::vllm::P2P_NCCL_LAST));
    }

    #[test]
    fn the_implementation_named_is_the_one_taken() {
        let native = args("--prefill http://a:1 --decode http://c:1 --prefill-kv-addrs a:5 --connector-impl native");
        assert_eq!(dialect(&native, &Config::default()), Connector::Native);
        let nixl = args("--prefill http://a:1 --decode http://c:1 --connector NixlConnector --connector-impl vllm");
        assert_eq!(dialect(&nixl, &Config::default()), Connector::VllmNixl);
    }
}
