//! A fleet under streaming clients while its workers are killed: no wrong answer, no unclear ending, nothing held.
//!
//! Starts one single engine for the right answers and one `pdlink up`; clients stream random questions, some leave half-way,
//! and every few seconds a worker gets `SIGKILL`. At the end all workers must be back and hold no block.
//!
//! Half of the questions come again and again, so that prefix caches leave little of them to move. The others are fresh: their
//! KV moves whole. The workers' metrics say how much has moved, and too little breaks a promise as a wrong answer does.

mod fleet;
mod report;
mod requests;
mod watch;

use std::ffi::OsString;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::process::Signal;
use tokio::task::JoinSet;

pub use report::Report;

use crate::bench::{client, process};
use crate::telemetry::names;
use fleet::Started;
use requests::{Client, Question};
use watch::Watch;

/// What to soak, and how hard.
#[derive(Debug, Clone)]
pub struct Options {
    /// Arguments of `pdlink up`: the configuration of a fleet of reference engines.
    pub fleet: Vec<OsString>,
    /// The `model` that requests name.
    pub model: String,
    pub clients: usize,
    pub seconds: f64,
    /// Time between two kills; `None` kills nothing.
    pub kill_every: Option<Duration>,
    /// Share of requests whose client leaves half-way.
    pub leave_share: f64,
    /// Bytes of KV per token of a prompt, over all tensor-parallel ranks: what a fresh prompt must move at least.
    pub kv_bytes_per_token: u64,
    pub seed: u64,
}

/// Distinct questions per client; each has its answer from the single engine before the soak starts.
const QUESTIONS_PER_CLIENT: usize = 4;
/// Share of requests whose prompt no worker has seen.
const FRESH_SHARE: f64 = 0.5;
/// Longest wait for anything within one request.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long workers may take to come back and blocks to be free once the clients are gone.
const SETTLE_MAX: Duration = Duration::from_secs(20);

/// Runs the soak and counts. Broken promises are in the report; an error means that it could not be run.
pub async fn run(options: &Options) -> anyhow::Result<Report> {
    let single = Started::single_engine(&options.model).await?;
    let questions = questions_with_answers(options, &single.addr).await?;
    let fleet = Started::fleet(&options.fleet).await?;
    let launcher = fleet.pid()?;
    let mut report =
        Report { clients: options.clients, kv_bytes_per_token: options.kv_bytes_per_token, ..Report::default() };
    let mut watch = Watch::new(launcher, fleet.addr.clone(), Duration::from_secs_f64(options.seconds));

    let started = Instant::now();
    let end = started + Duration::from_secs_f64(options.seconds);
    let early = started + Duration::from_secs_f64(options.seconds / 5.0);
    let mut next_kill = options.kill_every.map(|every| started + every);
    let mut rng = StdRng::seed_from_u64(options.seed);
    let mut clients = JoinSet::new();
    while Instant::now() < end || !clients.is_empty() {
        let now = Instant::now();
        while now < end && clients.len() < options.clients {
            let leave_after = rng.random_bool(options.leave_share).then(|| rng.random_range(0..8));
            let (addr, model) = (fleet.addr.clone(), options.model.clone());
            let client = Client { addr, model, leave_after, patience: PATIENCE };
            if rng.random_bool(FRESH_SHARE) {
                clients.spawn(client.ask_fresh(requests::draw_fresh(&mut rng), single.addr.clone()));
            } else {
                clients.spawn(client.ask(Arc::clone(&questions[rng.random_range(0..questions.len())])));
            }
        }
        if next_kill.is_some_and(|at| now >= at && now < end) {
            report.kills += u64::from(kill_one(launcher, &mut rng));
            next_kill = options.kill_every.map(|every| now + every);
        }
        if report.resident_early_bytes == 0 && now >= early {
            report.resident_early_bytes = process::resident_bytes(launcher).context("the launcher is gone")?;
        }
        tokio::select! {
            Some(asked) = clients.join_next() => report.count(asked??),
            () = watch.look() => {}
            () = tokio::time::sleep(Duration::from_millis(50)) => {}
        }
    }
    report.seconds = started.elapsed().as_secs_f64();
    settle(&fleet.addr, &mut report).await?;
    report.workers = watch.finish().await;
    report.resident_end_bytes = process::resident_bytes(launcher).context("the launcher is gone")?;
    single.stop().await?;
    if !fleet.stop().await? {
        bail!("`pdlink up` did not end with status 0");
    }
    Ok(report)
}

async fn questions_with_answers(options: &Options, single: &str) -> anyhow::Result<Vec<Arc<Question>>> {
    let mut questions = requests::draw(options.seed, options.clients * QUESTIONS_PER_CLIENT);
    for question in &mut questions {
        question.answer = question.ask_plainly(single, &options.model, PATIENCE).await?;
    }
    Ok(questions.into_iter().map(Arc::new).collect())
}

fn kill_one(launcher: i32, rng: &mut StdRng) -> bool {
    let workers = fleet::workers(launcher);
    !workers.is_empty() && process::signal(workers[rng.random_range(0..workers.len())], Signal::KILL)
}

/// Waits until every worker serves again and none holds a block, then notes what is still held.
async fn settle(addr: &str, report: &mut Report) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        let healthy = client::get_text(addr, "/health?all=true", PATIENCE).await;
        let held = held_blocks(addr).await;
        if let (Ok(_), Ok(held)) = (&healthy, &held) {
            report.held_blocks = *held;
            if *held == 0 {
                return Ok(());
            }
        }
        if started.elapsed() > SETTLE_MAX {
            healthy.context("not every worker came back")?;
            held.context("a worker does not say what it holds")?;
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Blocks held for transfers over all workers, as their metrics say.
async fn held_blocks(addr: &str) -> anyhow::Result<u64> {
    let mut held = 0;
    for url in fleet::worker_addresses(addr, PATIENCE).await? {
        let metrics = client::get_text(&url, "/metrics", PATIENCE).await?;
        let gauge = metrics.lines().find_map(|line| line.strip_prefix(names::ENGINE_BLOCKS_HELD)?.strip_prefix(' '));
        held += gauge.context("a worker does not count its held blocks")?.trim().parse::<u64>()?;
    }
    Ok(held)
}
