//! `pdlink engine`: one reference worker in the foreground.

use std::net::{IpAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::{Config, KvConfig, Override};
use crate::engine::{Engine, EngineSetup};
use crate::kv::Role;
use crate::security::Secret;
use crate::telemetry;

use super::listen::listen;
use super::{Sources, load_config, print};

/// Share of `launcher.grace_s` that a worker which was asked to end may take to answer what it has begun. The rest is for
/// ending it: at the whole the guard kills.
const DRAIN_SHARE: f64 = 0.8;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What the worker does with KV: hand it over, take it over, or neither
    #[arg(long, value_enum, default_value = "both")]
    role: RoleName,
    /// Port of the OpenAI server; 0 takes a free one
    #[arg(long)]
    port: u16,
    /// Host that the listeners bind to [default: `inference.server.host`, else 127.0.0.1]
    #[arg(long)]
    host: Option<String>,
    /// Host that the KV link binds to, if it has a network of its own [default: the same]
    #[arg(long)]
    kv_host: Option<String>,
    /// Port of the KV link; 0 takes a free one, which the ready line names
    #[arg(long, default_value_t = 0)]
    kv_port: u16,
    /// File with the run's secret, mode 0600 [default: the environment's PDLINK_SECRET_FILE; none is for loopback only]
    #[arg(long)]
    secret_file: Option<PathBuf>,
    /// The model's name, as clients must give it [default: `inference.model.name`]
    #[arg(long)]
    model: Option<String>,
    /// Tensor-parallel ranks, each with memory of its own [default: `inference.parallel.tp`]
    #[arg(long)]
    tp: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RoleName {
    Prefill,
    Decode,
    Both,
}

impl From<RoleName> for Role {
    fn from(name: RoleName) -> Self {
        match name {
            RoleName::Prefill => Self::Prefill,
            RoleName::Decode => Self::Decode,
            RoleName::Both => Self::Both,
        }
    }
}

pub(super) fn run(args: Args, mut sources: Sources) -> anyhow::Result<ExitCode> {
    // This command is the reference engine, whatever the file's workers run.
    sources.overrides.push(Override::new("inference.engine", "reference"));
    let config = load_config(&sources)?.config;
    telemetry::log::init(config.telemetry.log_format, &config.telemetry.log_level);
    let host = args.host.as_deref().unwrap_or_else(|| config.host()).to_owned();
    let http = listen(&host, args.port)?;
    let kv_host = args.kv_host.as_deref().unwrap_or(&host);
    let kv = listen(kv_host, args.kv_port)?;
    let engine = Engine::start(setup(&args, &config, kv_host, kv)?)?;
    tracing::info!("{}", engine.memory());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let grace = Duration::try_from_secs_f64(config.launcher.grace_s * DRAIN_SHARE)?;
    let drained = runtime.block_on(serve(&engine, http, &args, grace))?;
    let alive = engine.stop();
    if !alive {
        anyhow::bail!("the engine's scheduler died; its last words are above");
    }
    if !drained {
        tracing::warn!("requests or held blocks were left after {} s and were ended", grace.as_secs_f64());
    }
    Ok(ExitCode::SUCCESS)
}

fn setup(args: &Args, config: &Config, host: &str, kv_listener: TcpListener) -> anyhow::Result<EngineSetup> {
    let mut reference = config.inference.reference.clone();
    if let Some(max_model_len) = config.inference.model.max_model_len {
        reference.max_model_len = max_model_len as usize;
    }
    let secret = match args.secret_file.as_ref().or(config.security.secret_file.as_ref()) {
        Some(path) => Secret::read_file(path)?,
        None => Secret::loopback(),
    };
    Ok(EngineSetup {
        role: args.role.into(),
        model: args.model.clone().unwrap_or_else(|| config.model_name().to_owned()),
        tp: args.tp.unwrap_or(config.inference.parallel.tp),
        reference,
        kv: KvConfig { paths: Some(config.kv_paths(true)), ..config.kv.clone() },
        weights: config.weights.clone(),
        prefix_caching: config.inference.enable_prefix_caching.unwrap_or(true),
        weight_version: 0,
        advertise_host: advertised(host, &kv_listener)?,
        kv_listener,
        secret,
        send_type: config.pd_disagg.send_type(),
        wrap_path: None,
    })
}

async fn serve(engine: &Engine, http: TcpListener, args: &Args, grace: Duration) -> anyhow::Result<bool> {
    let address = http.local_addr()?;
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let listener = tokio::net::TcpListener::from_std(http)?;
    let role = Role::from(args.role).name();
    print(&format!("ready: http://{address}/v1 ({role}, KV {})\n", engine.kv_address()))?;
    let (stopped, mut again) = tokio::sync::oneshot::channel();
    let stop = async move {
        asked(&mut interrupt, &mut terminate).await;
        tracing::info!("asked to end: finishing what was begun");
        let _ = stopped.send((interrupt, terminate));
    };
    // Asked twice, it ends at once.
    let hurry = async {
        match (&mut again).await {
            Ok((mut interrupt, mut terminate)) => asked(&mut interrupt, &mut terminate).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        drained = engine.serve(listener, stop, grace) => Ok(drained?),
        () = hurry => Ok(false),
    }
}

async fn asked(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// What peers are told to connect to: the host as it was given, unless that means every address of this machine. Then the
/// one that the way out of it has, or loopback where there is no way out.
fn advertised(host: &str, listener: &TcpListener) -> std::io::Result<String> {
    let bound = listener.local_addr()?.ip();
    if !bound.is_unspecified() {
        return Ok(host.to_owned());
    }
    // Documentation addresses: connecting a datagram socket sends nothing, it only asks the kernel for the route.
    let (any, outside) = match bound {
        IpAddr::V4(_) => ("0.0.0.0:0", "192.0.2.1:9"),
        IpAddr::V6(_) => ("[::]:0", "[2001:db8::1]:9"),
    };
    let socket = UdpSocket::bind(any)?;
    let routed = socket.connect(outside).and_then(|()| socket.local_addr());
    Ok(routed.map_or_else(|_| "127.0.0.1".to_owned(), |address| address.ip().to_string()))
}
