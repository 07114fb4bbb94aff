//! `pdlink bench serve`: what clients of a deployment wait for, and how much of it is the hand-off.
//!
//! Streams completions of seeded prompts through a proxy (a running one, or one that is started from a configuration) and,
//! for comparison, through a server without PD. A row is one prompt length at one load. Once a row is over, the proxy is
//! asked for the record of each of its transfers, so that asking disturbs nothing that is measured.

mod deployment;
mod hand_off;
mod load;
mod prompts;
mod report;
mod stream;

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

pub(super) use deployment::Deployment;
pub use deployment::address_of;
pub use report::{HandOffs, Report, Row, Timeline};
pub(super) use stream::ask as ask_stream;

use super::client;
use crate::telemetry::names;
use hand_off::Source;
use load::Load;

/// Longest wait for anything within one request: a queue of long prompts on a slow machine.
const PATIENCE: Duration = Duration::from_secs(600);

/// Longest wait for the small questions around the load.
const ASK_PATIENCE: Duration = Duration::from_secs(20);

/// What is measured.
#[derive(Debug, Clone)]
pub struct Options {
    pub target: Target,
    /// Where the proxy's admin routes are; default: where requests go.
    pub admin_url: Option<String>,
    /// What they ask for.
    pub admin_token: Option<String>,
    /// A server without PD, for comparison.
    pub baseline: Option<String>,
    /// The `model` that requests name; default: the first that the server lists.
    pub model: Option<String>,
    /// Lengths of prompts.
    pub prompt_tokens: Vec<usize>,
    pub output_tokens: u32,
    pub loads: Vec<Pace>,
    /// Requests of each row.
    pub requests: usize,
    /// Requests before each row that do not count.
    pub warm_up: usize,
    pub seed: u64,
    /// Whether prompts are sent as text, rather than as token ids.
    pub as_text: bool,
}

/// The deployment.
#[derive(Debug, Clone)]
pub enum Target {
    /// It runs at this address.
    Url(String),
    /// `pdlink up` with these arguments starts it, within this time.
    Start { arguments: Vec<OsString>, within: Duration },
}

/// How requests come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// So many at once: each client sends its next request when it has its answer.
    AtOnce(usize),
    /// So many a second on average, at random moments, whether or not earlier ones are answered.
    PerSecond(f64),
}

impl std::fmt::Display for Pace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtOnce(clients) => write!(f, "{clients} at once"),
            Self::PerSecond(rate) => write!(f, "{rate}/s"),
        }
    }
}

/// Runs the scenario; `tell` gets what a person should read while it runs.
pub async fn run(options: &Options, tell: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let deployment = match &options.target {
        Target::Url(url) => Deployment::running(url)?,
        Target::Start { arguments, within } => Deployment::start(arguments, *within, tell).await?,
    };
    let measured = measure(options, deployment.address(), tell).await;
    let ended = deployment.end().await;
    let rows = measured?;
    ended?;
    let report = Report { rows };
    ensure!(report.rows.iter().any(|row| row.requests > 0), "not one request was answered");
    Ok(report)
}

/// The body of a streamed request with a prompt and an answer of these lengths.
pub(super) fn stream_body(model: &str, prompt_tokens: usize, output_tokens: u32) -> bytes::Bytes {
    prompts::draw(1, 1, prompt_tokens)[0].body(model, output_tokens, false)
}

/// One server that is asked.
struct Side {
    name: &'static str,
    address: String,
    model: String,
    /// Where the records of its transfers are, if it has any.
    records: Option<Source>,
}

async fn measure(options: &Options, address: &str, tell: &mut dyn FnMut(&str)) -> anyhow::Result<Vec<Row>> {
    let admin = options.admin_url.as_deref().map_or_else(|| Ok(address.to_owned()), deployment::address_of)?;
    let records = Source { address: admin, token: options.admin_token.clone() };
    let mut sides = vec![side("deployment", address, options, Some(records)).await?];
    if let Some(url) = &options.baseline {
        sides.push(side("baseline", &deployment::address_of(url)?, options, None).await?);
    }
    let mut rows = Vec::new();
    for tokens in &options.prompt_tokens {
        for pace in &options.loads {
            for side in &sides {
                let number = u64::try_from(rows.len()).unwrap_or(u64::MAX);
                let row = one_row(options, side, *tokens, *pace, number).await?;
                tell(&format!("  {}\n", row.in_words()));
                rows.push(row);
            }
        }
    }
    Ok(rows)
}

async fn one_row(options: &Options, side: &Side, tokens: usize, pace: Pace, number: u64) -> anyhow::Result<Row> {
    // Each row has prompts of its own: one that was asked before, of whichever server, may be cached.
    let prompts = prompts::draw(options.seed.wrapping_add(number), options.warm_up + options.requests, tokens);
    let load = |prompts: &[prompts::Prompt], pace| Load {
        address: side.address.clone(),
        bodies: prompts.iter().map(|prompt| prompt.body(&side.model, options.output_tokens, options.as_text)).collect(),
        pace,
        seed: options.seed,
        patience: PATIENCE,
    };
    let (warm, counted) = prompts.split_at(options.warm_up);
    let at_once = match pace {
        Pace::AtOnce(clients) => clients,
        Pace::PerSecond(_) => 1,
    };
    load::run(load(warm, Pace::AtOnce(at_once))).await?;
    let before = prefill_leg(side).await;
    let seen = load::run(load(counted, pace)).await?;
    let legs = before.zip(prefill_leg(side).await).map(|(before, after)| [after[0] - before[0], after[1] - before[1]]);
    let leg_ms = legs.filter(|[_, count]| *count > 0.0).map(|[seconds, count]| seconds * 1000.0 / count);
    let hand_offs = match &side.records {
        Some(source) => hand_off::of(source, &seen.answers, ASK_PATIENCE).await,
        None => hand_off::Found::default(),
    };
    Ok(Row::new(side.name, tokens, options.output_tokens, pace, &seen, &hand_offs, leg_ms))
}

/// Seconds that the proxy waited for prefill in all, and how often, if it tells.
async fn prefill_leg(side: &Side) -> Option<[f64; 2]> {
    let source = side.records.as_ref()?;
    let text = client::get_text(&source.address, "/metrics", ASK_PATIENCE).await.ok()?;
    let sum_of = |ending: &str| {
        let name = format!("{}{ending}", names::PROXY_PREFILL_SECONDS);
        let values = text.lines().filter_map(|line| line.strip_prefix(&name)?.split_whitespace().last()?.parse().ok());
        values.reduce(|sum: f64, value: f64| sum + value)
    };
    Some([sum_of("_sum")?, sum_of("_count")?])
}

async fn side(name: &'static str, address: &str, options: &Options, records: Option<Source>) -> anyhow::Result<Side> {
    let model = match &options.model {
        Some(model) => model.clone(),
        None => first_model(address).await.with_context(|| format!("the {name} at {address} names no model"))?,
    };
    Ok(Side { name, address: address.to_owned(), model, records })
}

/// The first model that a server lists.
pub(super) async fn first_model(address: &str) -> anyhow::Result<String> {
    let text = client::get_text(address, "/v1/models", ASK_PATIENCE).await?;
    let models: Value = serde_json::from_str(&text)?;
    let id = models["data"][0]["id"].as_str().context("its list of models is empty; name one with --model")?;
    Ok(id.to_owned())
}
