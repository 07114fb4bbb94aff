//! `pdlink weights`: sends a checkpoint to a fleet that serves, and says which version it has.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{Method, StatusCode};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::listen::listen;
use super::{Sources, Usage, load_config, print};
use crate::bench::client;
use crate::bench::serve::address_of;
use crate::bench::table::Table;
use crate::config::Config;
use crate::security::{SECRET_FILE_ENV, Secret};
use crate::telemetry;
use crate::weights::{Checkpoint, Paths, Progress, Sender, TensorBytes};

/// How long a question that is answered at once may take.
const ASK_MAX: Duration = Duration::from_secs(30);
/// How much longer than an update may take its answer is waited for.
const SLACK: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Send a checkpoint to every worker; it serves when all have it, or nothing has changed
    #[command(disable_version_flag = true)]
    Push(PushArgs),
    /// Show the fleet's version and every worker's part in an update
    Status(StatusArgs),
}

#[derive(Debug, clap::Args)]
struct Fleet {
    /// The proxy of the fleet: where its admin routes are
    #[arg(long, value_name = "URL")]
    to: String,
    /// The token that they ask for [default: `proxy.admin_token`]
    #[arg(long, value_name = "TOKEN", env = "PDLINK_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// Print for machines: one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct StatusArgs {
    #[command(flatten)]
    fleet: Fleet,
}

#[derive(Debug, clap::Args)]
struct PushArgs {
    #[command(flatten)]
    fleet: Fleet,
    /// Folder with a checkpoint in safetensors
    #[arg(long, value_name = "DIR")]
    checkpoint: PathBuf,
    /// The version it is to be [default: the next one]
    #[arg(long)]
    version: Option<u64>,
    /// Host that workers reach this command under
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// File with the run's secret [default: `security.secret_file`, else $PDLINK_SECRET_FILE; none is for loopback only]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
}

pub(super) fn run(args: Args, sources: Sources) -> anyhow::Result<ExitCode> {
    let config = load_config(&sources)?.config;
    telemetry::log::init(config.telemetry.log_format, &config.telemetry.log_level);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    match args.command {
        Command::Push(args) => runtime.block_on(push(&args, &config)),
        Command::Status(args) => runtime.block_on(status(&args.fleet, &config)),
    }
}

impl Fleet {
    /// Asks the proxy; an answer that is no success is an error in the proxy's own words.
    async fn ask(
        &self,
        config: &Config,
        method: Method,
        path: &str,
        body: &Value,
        patience: Duration,
    ) -> anyhow::Result<Value> {
        let address = address_of(&self.to).map_err(|error| Usage::new(error.to_string()))?;
        let token = self.admin_token.as_deref().or(config.proxy.admin_token.as_deref());
        let body = if method == Method::GET { Bytes::new() } else { Bytes::from(body.to_string()) };
        let answer = client::send_as(&address, method, path, body, token, patience).await;
        let answer = answer.with_context(|| format!("cannot ask {address}{path}"))?;
        let status = answer.status;
        let text = answer.text(ASK_MAX).await?;
        let value: Value = serde_json::from_str(&text).unwrap_or_else(|_| Value::String(text.clone()));
        if status != StatusCode::OK {
            let why = value["error"]["message"].as_str().unwrap_or(&text);
            bail!("{address}{path} answered {status}: {why}");
        }
        Ok(value)
    }
}

async fn status(fleet: &Fleet, config: &Config) -> anyhow::Result<ExitCode> {
    let status = fleet.ask(config, Method::GET, "/admin/weights", &Value::Null, ASK_MAX).await?;
    if fleet.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&status)?))?;
    } else {
        print(&in_words(&status))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn in_words(status: &Value) -> String {
    let word = |value: &Value| match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let mut table = Table::new(&["worker", "role", "phase", "note", "version", "staged", "of"], 4);
    for worker in status["workers"].as_array().into_iter().flatten() {
        let failure = worker["failure"]["why"].as_str();
        let note = worker["error"].as_str().or(failure).unwrap_or_default();
        let kept_out = if worker["kept_out"] == true { "kept out; " } else { "" };
        let cells = ["worker", "role", "phase"].iter().map(|name| word(&worker[*name]));
        let numbers = ["version", "staged_bytes", "total_bytes"].iter().map(|name| word(&worker[*name]));
        table.row(cells.chain([format!("{kept_out}{note}")]).chain(numbers).collect());
    }
    let (version, source, digest) = (word(&status["version"]), word(&status["source"]), word(&status["digest"]));
    let mut text = format!("version {version} from {source}, digest {digest}\n");
    if let Some(failure) = status["last_failure"].as_str() {
        text += &format!("the last update came to nothing: {failure}\n");
    }
    text + &table.to_string()
}

async fn push(args: &PushArgs, config: &Config) -> anyhow::Result<ExitCode> {
    let checkpoint = Arc::new(Checkpoint::open(&args.checkpoint)?);
    let status = args.fleet.ask(config, Method::GET, "/admin/weights", &Value::Null, ASK_MAX).await?;
    let version = args.version.unwrap_or_else(|| status["version"].as_u64().unwrap_or(0) + 1);
    let listener = listen(&args.host, 0)?;
    let paths = Paths {
        weights: config.weights.clone(),
        kv: config.kv.clone(),
        secret: secret(args, config)?,
        bind: listener.local_addr()?.ip(),
        advertise_host: args.host.clone(),
        gpu: None,
        streams: false,
        casts: Arc::default(),
        casts_host: false,
        wrap_path: None,
    };
    let sender = Sender::start(version, Arc::clone(&checkpoint) as Arc<dyn TensorBytes>, &paths, listener)?;
    let mut tasks = JoinSet::new();
    if !args.fleet.json {
        tasks.spawn(show(sender.progress()));
    }
    let order = json!({"peer": sender.address(), "version": version});
    let patience = patience(&status, config);
    let done = args.fleet.ask(config, Method::POST, "/admin/weights/update", &order, patience).await?;
    if args.fleet.json {
        print(&format!("{done}\n"))?;
    } else {
        print(&sent(&done, checkpoint.manifest().tensors().len()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// As long as an update may take by the proxy's own `[weights]`, which need not be those given here.
fn patience(status: &Value, config: &Config) -> Duration {
    let update_max_s = status["update_max_s"].as_f64().unwrap_or_else(|| config.weights.update_max_s());
    Duration::try_from_secs_f64(update_max_s).unwrap_or(Duration::MAX / 4) + SLACK
}

fn secret(args: &PushArgs, config: &Config) -> anyhow::Result<Secret> {
    let named = args.secret_file.clone().or_else(|| config.security.secret_file.clone());
    match named.or_else(|| std::env::var_os(SECRET_FILE_ENV).map(PathBuf::from)) {
        Some(file) => Ok(Secret::read_file(&file)?),
        None => Ok(Secret::loopback()),
    }
}

fn sent(done: &Value, tensors: usize) -> String {
    let (bytes, staging_s) = (done["bytes"].as_f64().unwrap_or(0.0), done["staging_s"].as_f64().unwrap_or(0.0));
    let paused_ms = done["paused_s"].as_f64().unwrap_or(0.0) * 1e3;
    let mut text = format!(
        "version {} serves: {tensors} tensors, {:.1} MB in {staging_s:.2} s ({:.2} GB/s), paused for {paused_ms:.0} ms, digest {}\n",
        done["version"],
        bytes / 1e6,
        bytes / 1e9 / staging_s.max(1e-9),
        done["digest"].as_str().unwrap_or("-"),
    );
    for worker in done["behind"].as_array().into_iter().flatten() {
        text += &format!("not on {}: {}; it catches up before it serves\n", worker["worker"], worker["why"]);
    }
    for worker in done["left_out"].as_array().into_iter().flatten() {
        text += &format!("not on {worker}, which was down; it catches up before it serves\n");
    }
    text
}

/// A bar on a terminal, nothing elsewhere: the line at the end says it all.
async fn show(mut progress: watch::Receiver<Progress>) {
    let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {binary_bytes_per_sec} {wide_msg}");
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr())
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    loop {
        let now = progress.borrow_and_update().clone();
        bar.set_length(now.total_bytes);
        bar.set_position(now.sent_bytes);
        bar.set_message(match (now.receivers, now.sent_bytes == now.total_bytes) {
            (None, _) => "waiting for workers".to_owned(),
            (Some(receivers), true) => format!("{receivers} workers have it"),
            (Some(receivers), false) => format!("{} of {receivers} workers", now.joined),
        });
        if progress.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_waited_for_longer_than_the_proxy_lets_an_update_take() {
        let (mut config, silent) = (Config::default(), json!({}));
        assert_eq!(patience(&silent, &config), Duration::from_secs(600 + 5 + 30 + 60 + 120) + SLACK);
        config.weights.hold_timeout_s = 200.0;
        assert_eq!(patience(&silent, &config), Duration::from_secs(895) + SLACK);
        assert_eq!(patience(&json!({"update_max_s": 70.5}), &config), Duration::from_millis(70_500) + SLACK);
    }

    #[test]
    fn the_status_names_each_worker_and_what_went_wrong() {
        let status = json!({
            "version": 3, "digest": "ab", "source": "/w", "last_failure": "the update failed while staging",
            "workers": [
                {"worker": "http://a:1", "role": "prefill", "phase": "serving", "version": 3, "staged_bytes": 5,
                 "total_bytes": 5, "failure": null, "kept_out": false},
                {"worker": "http://b:1", "role": "decode", "error": "cannot connect", "kept_out": true},
            ],
        });
        let text = in_words(&status);
        for part in [
            "version 3 from /w, digest ab",
            "came to nothing: the update failed",
            "http://a:1",
            "kept out; cannot connect",
        ] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
    }
}
