//! `pdlink bench weights`: new weights into reference engines that serve, beside a plain copy of the bytes.
//!
//! A synthetic checkpoint is pushed again and again, each time other bytes under the next version, while clients stream
//! answers. Every worker takes all of it through its own path, checks each tensor's digest, and changes over with the others.

mod checkpoint;
mod report;

use std::ffi::OsString;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

pub use report::{Report, Row};

use super::client;
use super::link::{self, Ceiling, SecretFile};
use super::serve::{Deployment, ask_stream, first_model, stream_body};
use super::stats::Samples;
use crate::config::{KvConfig, WeightsConfig};
use crate::memory::to_u64;
use crate::security::Secret;
use crate::weights::{Checkpoint, Paths, Sender, TensorBytes};

/// Longest wait for one update, and for the fleet to start.
const PATIENCE: Duration = Duration::from_secs(300);
/// Memory walked through by the plain copy, so that no cache holds it.
const SPAN_BYTES_MIN: u64 = 256 << 20;
/// What clients ask for, again and again.
const PROMPT_TOKENS: usize = 64;
const OUTPUT_TOKENS: u32 = 256;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Arguments of `pdlink up`: the configuration of a fleet of reference engines.
    pub fleet: Vec<OsString>,
    pub admin_token: Option<String>,
    /// Sizes of checkpoints.
    pub bytes: Vec<u64>,
    pub tensors: usize,
    /// Updates of each size.
    pub pushes: usize,
    /// Clients that stream answers meanwhile.
    pub clients: usize,
    /// Of the plain copy.
    pub threads: usize,
}

/// A folder of ours; gone when dropped.
struct Folder(PathBuf);

impl Drop for Folder {
    fn drop(&mut self) {
        // One that is gone already is as it should be.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the scenario; `tell` gets what a person should read while it runs.
pub async fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let file = SecretFile::new()?;
    let mut arguments = options.fleet.clone();
    arguments.extend([OsString::from("--security.secret_file"), file.path.clone().into_os_string()]);
    let deployment = Deployment::start(&arguments, PATIENCE, tell).await?;
    let measured = measure(options, deployment.address(), &Secret::read_file(&file.path)?).await;
    let ended = deployment.end().await;
    let rows = measured?;
    ended?;
    Ok(Report { threads: options.threads, rows })
}

async fn measure(options: &Options, address: &str, secret: &Secret) -> anyhow::Result<Vec<Row>> {
    let mut version = ask(options, address, Method::GET, "/admin/weights", &Value::Null).await?["version"]
        .as_u64()
        .context("the fleet names no version")?;
    let mut rows = Vec::new();
    for &bytes in &options.bytes {
        let folder = Folder(file_free_folder());
        let checkpoints = [0, 1].map(|seed| {
            let part = folder.0.join(seed.to_string());
            checkpoint::write(&part, bytes, options.tensors, seed)?;
            anyhow::Ok(Arc::new(Checkpoint::open(&part)?))
        });
        let [one, other] = checkpoints;
        let checkpoints = [one?, other?];
        rows.push(row(options, address, secret, &checkpoints, &mut version).await?);
    }
    Ok(rows)
}

fn file_free_folder() -> PathBuf {
    std::env::temp_dir().join(format!("pdlink-bench-weights-{}-{:08x}", std::process::id(), rand::random::<u32>()))
}

/// What one size has come to so far.
#[derive(Debug, Default)]
struct Tally {
    rate: Samples,
    staging: Samples,
    ceiling: Samples,
    paused: Samples,
    whole: Samples,
    gaps: Samples,
    lost: usize,
}

async fn row(
    options: &Options,
    address: &str,
    secret: &Secret,
    checkpoints: &[Arc<Checkpoint>; 2],
    version: &mut u64,
) -> anyhow::Result<Row> {
    let bytes = checkpoints[0].manifest().stream_bytes();
    let workers = ask(options, address, Method::GET, "/admin/weights", &Value::Null).await?["workers"]
        .as_array()
        .map_or(0, Vec::len);
    ensure!(workers > 0, "the fleet has no workers");
    let copy = PlainCopy::new(options.threads, bytes)?;
    let mut tally = Tally::default();
    // The first only warms up: both checkpoints are in memory from then on.
    for push in 0..=options.pushes.max(1) {
        *version += 1;
        let checkpoint = Arc::clone(&checkpoints[push % 2]);
        let clients = Clients::start(address, options.clients).await?;
        let started = Instant::now();
        let done = update(options, address, secret, checkpoint, *version).await?;
        let whole = started.elapsed();
        let (gap, lost) = clients.end().await?;
        let ceiling = copy.run(workers)?;
        if push == 0 {
            continue;
        }
        let staging = done["staging_s"].as_f64().context("the proxy does not say how long staging took")?;
        let moved = bytes as f64 * workers as f64;
        tally.rate.push(moved / staging.max(1e-9) / 1e9);
        tally.staging.push(staging * 1e3);
        tally.ceiling.push(moved / ceiling / 1e9);
        tally.paused.push(done["paused_s"].as_f64().context("the proxy does not say how long it paused")? * 1e3);
        tally.whole.push(whole.as_secs_f64() * 1e3);
        tally.gaps.extend(gap.map(|gap| gap.as_secs_f64() * 1e3));
        tally.lost += lost;
    }
    tally.row(options, bytes, workers)
}

impl Tally {
    fn row(&self, options: &Options, bytes: u64, workers: usize) -> anyhow::Result<Row> {
        let spread = |samples: &Samples| samples.spread().context("no push was measured");
        let (rate, ceiling) = (spread(&self.rate)?, spread(&self.ceiling)?);
        Ok(Row {
            bytes,
            tensors: options.tensors,
            workers,
            clients: options.clients,
            gigabytes_per_second: rate,
            staging_ms: spread(&self.staging)?,
            ceiling_gigabytes_per_second: ceiling,
            share_of_ceiling: rate.median / ceiling.median,
            paused_ms: spread(&self.paused)?,
            whole_ms: spread(&self.whole)?,
            longest_gap_ms: self.gaps.spread(),
            lost: self.lost,
        })
    }
}

/// As many bytes in memory as a checkpoint has, copied by threads that do nothing else.
struct PlainCopy {
    ceiling: Ceiling,
    span: u64,
    bytes: u64,
}

impl PlainCopy {
    fn new(threads: usize, bytes: u64) -> anyhow::Result<Self> {
        let span = SPAN_BYTES_MIN.max(bytes);
        Ok(Self { ceiling: Ceiling::memcpy(threads, link::memory(span, None)?)?, span, bytes })
    }

    /// Seconds for one copy after the other, as many as there are workers.
    fn run(&self, workers: usize) -> anyhow::Result<f64> {
        let at = |worker: usize| to_u64(worker) * self.bytes % (self.span - self.bytes + 1);
        (0..workers).map(|worker| self.ceiling.run(at(worker), self.bytes)).sum()
    }
}

/// One update, sent by this process.
async fn update(
    options: &Options,
    address: &str,
    secret: &Secret,
    checkpoint: Arc<Checkpoint>,
    version: u64,
) -> anyhow::Result<Value> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    let paths = Paths {
        weights: WeightsConfig::default(),
        kv: KvConfig::default(),
        secret: secret.clone(),
        bind: Ipv4Addr::LOCALHOST.into(),
        advertise_host: Ipv4Addr::LOCALHOST.to_string(),
        gpu: None,
        streams: false,
        casts: Arc::default(),
        casts_host: false,
        wrap_path: None,
    };
    let sender = Sender::start(version, checkpoint as Arc<dyn TensorBytes>, &paths, listener)?;
    let order = json!({"peer": sender.address(), "version": version});
    ask(options, address, Method::POST, "/admin/weights/update", &order).await
}

async fn ask(options: &Options, address: &str, method: Method, path: &str, body: &Value) -> anyhow::Result<Value> {
    let body = if method == Method::GET { Bytes::new() } else { Bytes::from(body.to_string()) };
    let answer = client::send_as(address, method, path, body, options.admin_token.as_deref(), PATIENCE).await;
    let answer = answer.with_context(|| format!("cannot ask {address}{path}"))?;
    let status = answer.status;
    let text = answer.text(PATIENCE).await?;
    if status != StatusCode::OK {
        bail!("{address}{path} answered {status}: {text}");
    }
    Ok(serde_json::from_str(&text)?)
}

/// Clients that ask again as soon as they have an answer.
struct Clients {
    tasks: JoinSet<anyhow::Result<(Option<Duration>, usize)>>,
    leave: tokio::sync::watch::Sender<bool>,
}

impl Clients {
    async fn start(address: &str, count: usize) -> anyhow::Result<Self> {
        let (leave, left) = tokio::sync::watch::channel(false);
        let mut tasks = JoinSet::new();
        if count > 0 {
            let body = stream_body(&first_model(address).await?, PROMPT_TOKENS, OUTPUT_TOKENS);
            for _ in 0..count {
                let (address, body, left) = (address.to_owned(), body.clone(), left.clone());
                tasks.spawn(async move {
                    let (mut longest, mut lost) = (None, 0);
                    while !*left.borrow() {
                        match ask_stream(&address, body.clone(), PATIENCE).await {
                            Ok(answer) => longest = longest.max(answer.longest_gap()),
                            Err(_) => lost += 1,
                        }
                    }
                    Ok((longest, lost))
                });
            }
        }
        Ok(Self { tasks, leave })
    }

    /// Lets them finish their answers. The longest silence that any of them met, and the answers that they lost.
    async fn end(mut self) -> anyhow::Result<(Option<Duration>, usize)> {
        let _ = self.leave.send(true);
        let (mut longest, mut lost) = (None, 0);
        while let Some(client) = self.tasks.join_next().await {
            let (gap, errors) = client??;
            longest = longest.max(gap);
            lost += errors;
        }
        Ok((longest, lost))
    }
}
