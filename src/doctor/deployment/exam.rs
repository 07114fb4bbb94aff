//! Asks a deployment: prompts through the proxy and to one worker whole, counters before and after, records of each transfer.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{Method, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Target, pages};
use crate::bench::client;
use crate::bench::serve::address_of;
use crate::openai::headers::X_PDLINK_TRANSFER_ID;
use crate::telemetry::{Side, TransferOutcome, TransferRecord};

/// Around the block sizes in use: 16, 32, 64 and 128 tokens.
const PROMPT_TOKENS: [u64; 6] = [15, 16, 17, 33, 129, 400];
const ANSWER_TOKENS: u32 = 12;
/// Ids that every vocabulary has and that are special in none: one printable character each in byte-level ones.
const IDS: std::ops::RangeInclusive<u32> = 33..=126;
/// Longest for one prompt, and for the small questions around them.
const PROMPT_MAX: Duration = Duration::from_secs(10);
const ASK_MAX: Duration = Duration::from_secs(3);
/// How long blocks may stay in use after the last answer.
pub(super) const REST_MAX: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(super) const ADMIN_HELP: &str = "give the address of the proxy's admin routes by --admin-url (`proxy.admin_listen`), and \
                                     the token of `proxy.admin_token` by --admin-token or PDLINK_ADMIN_TOKEN";

/// Everything that was seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) proxy: String,
    pub(super) workers: Vec<Worker>,
    pub(super) workers_unknown: Option<String>,
    pub(super) turns: Vec<Turn>,
    /// Prompt tokens that decode workers have loaded meanwhile; `None` where they do not count them.
    pub(super) loaded: Option<u64>,
    /// Why records of transfers could not be had, for the first of them.
    pub(super) records_unknown: Option<String>,
    /// By worker, what it had not let go of in the end.
    pub(super) held: Vec<(String, String)>,
    pub(super) asked_at_rest: usize,
    /// Whether requests ran that were not ours.
    pub(super) others_ask: bool,
}

/// One worker, as the proxy describes it.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Worker {
    pub(super) url: String,
    pub(super) role: String,
    pub(super) state: String,
    /// Against the proxy's; of workers that have a runtime of ours.
    pub(super) clock: Option<Clock>,
}

/// How far a worker's clock is ahead, and how far off that may be.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
pub(super) struct Clock {
    pub(super) ahead_s: f64,
    pub(super) within_s: f64,
}

impl Worker {
    /// Whether the proxy gives it requests.
    pub(super) fn serves(&self) -> bool {
        ["up", "starting", "trial"].contains(&self.state.as_str())
    }
}

/// One prompt, and what became of it.
#[derive(Debug)]
pub(super) struct Turn {
    pub(super) prompt_tokens: u64,
    pub(super) through: Result<Through, String>,
    /// One worker's own answer; `None` where there is none to ask.
    pub(super) alone: Option<Result<Vec<Value>, String>>,
    pub(super) records: Vec<TransferRecord>,
}

/// An answer that came through the proxy.
#[derive(Debug)]
pub(super) struct Through {
    pub(super) tokens: Vec<Value>,
    transfer_id: Option<String>,
}

impl Seen {
    pub(super) fn answered(&self) -> impl Iterator<Item = &Turn> {
        self.turns.iter().filter(|turn| turn.through.is_ok())
    }

    /// For each prompt whose KV a decode worker has received with bytes, one record that says so.
    pub(super) fn recorded(&self) -> Vec<&TransferRecord> {
        let received = |record: &&TransferRecord| {
            record.side == Side::Decode && record.outcome == TransferOutcome::Done && record.bytes > 0
        };
        self.answered().filter_map(|turn| turn.records.iter().find(received)).collect()
    }
}

pub(super) async fn ask(target: &Target) -> anyhow::Result<Seen> {
    let mut seen = Seen { proxy: target.proxy.clone(), ..Seen::default() };
    let model = match &target.model {
        Some(model) => model.clone(),
        None => first_model(&target.proxy).await.context("asking for its models")?,
    };
    match workers(target).await {
        Ok(workers) => seen.workers = workers,
        Err(error) => seen.workers_unknown = Some(format!("{error:#}")),
    }
    let before = loaded(&seen.workers).await;
    for tokens in PROMPT_TOKENS {
        let turn = turn(target, &seen.workers, &model, tokens).await;
        seen.turns.push(turn);
    }
    seen.loaded = before.zip(loaded(&seen.workers).await).map(|(before, after)| after.saturating_sub(before));
    rest(&mut seen).await;
    // By now each was asked, also where all of it has only just come up.
    for (worker, later) in seen.workers.iter_mut().zip(workers(target).await.unwrap_or_default()) {
        worker.clock = later.clock;
    }
    for turn in &mut seen.turns {
        let id = turn.through.as_ref().ok().and_then(|through| through.transfer_id.clone());
        let records = match id {
            Some(id) => records(target, &id).await,
            None => Err(anyhow::anyhow!("an answer names no transfer: one worker served it alone")),
        };
        match records {
            Ok(records) => turn.records = records,
            Err(error) => drop(seen.records_unknown.get_or_insert_with(|| format!("{error:#}"))),
        }
    }
    Ok(seen)
}

/// A fresh prompt, through the proxy and then to one prefill worker: it has no part in decode's counters.
async fn turn(target: &Target, workers: &[Worker], model: &str, prompt_tokens: u64) -> Turn {
    let prompt: Vec<u32> = (0..prompt_tokens).map(|_| rand::random_range(IDS)).collect();
    let body = json!({
        "model": model,
        "prompt": prompt,
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": true,
        "return_token_ids": true,
    });
    let body = Bytes::from(body.to_string());
    let through = complete(&target.proxy, body.clone()).await.map_err(|error| format!("{error:#}"));
    let alone = match workers.iter().find(|worker| worker.role == "prefill" && worker.serves()) {
        None => None,
        Some(worker) => Some(of_one(worker, body).await.map_err(|error| format!("{}: {error:#}", worker.url))),
    };
    Turn { prompt_tokens, through, alone, records: Vec::new() }
}

async fn of_one(worker: &Worker, body: Bytes) -> anyhow::Result<Vec<Value>> {
    Ok(complete(&address_of(&worker.url)?, body).await?.tokens)
}

async fn complete(address: &str, body: Bytes) -> anyhow::Result<Through> {
    let answer = client::send(address, Method::POST, "/v1/completions", Some(body), PROMPT_MAX).await?;
    let status = answer.status;
    let id = answer.headers.get(&X_PDLINK_TRANSFER_ID).and_then(|id| id.to_str().ok()).map(str::to_owned);
    let text = answer.text(PROMPT_MAX).await?;
    if status != StatusCode::OK {
        bail!("http://{address}/v1/completions answered {status}: {text}");
    }
    let answer: Value = serde_json::from_str(&text).context("its answer is no JSON")?;
    let choice = answer.pointer("/choices/0").context("its answer has no choice")?;
    let tokens = match choice.get("token_ids").and_then(Value::as_array) {
        Some(ids) => ids.clone(),
        // A server that does not tell ids is held to its text.
        None => vec![choice.get("text").cloned().context("its answer has no text")?],
    };
    Ok(Through { tokens, transfer_id: id })
}

async fn first_model(address: &str) -> anyhow::Result<String> {
    let models: Value = serde_json::from_str(&client::get_text(address, "/v1/models", ASK_MAX).await?)?;
    let id = models["data"][0]["id"].as_str().context("its list of models is empty; name one with --model")?;
    Ok(id.to_owned())
}

async fn admin(target: &Target, path: &str) -> anyhow::Result<(StatusCode, String)> {
    let answer = client::get(&target.admin, path, target.admin_token.as_deref(), ASK_MAX).await?;
    let status = answer.status;
    Ok((status, answer.text(ASK_MAX).await?))
}

async fn workers(target: &Target) -> anyhow::Result<Vec<Worker>> {
    #[derive(Deserialize)]
    struct Page {
        workers: Vec<Worker>,
    }
    let (status, text) = admin(target, "/admin/workers").await?;
    if status != StatusCode::OK {
        bail!("http://{}/admin/workers answered {status}: {text}", target.admin);
    }
    Ok(serde_json::from_str::<Page>(&text).context("its list of workers")?.workers)
}

async fn records(target: &Target, id: &str) -> anyhow::Result<Vec<TransferRecord>> {
    #[derive(Deserialize)]
    struct Page {
        records: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        record: TransferRecord,
    }
    let (status, text) = admin(target, &format!("/admin/transfers/{id}")).await?;
    match (status, serde_json::from_str::<Page>(&text)) {
        (_, Ok(page)) if !page.records.is_empty() || status == StatusCode::NOT_FOUND => {
            Ok(page.records.into_iter().map(|entry| entry.record).collect())
        }
        _ => bail!("http://{}/admin/transfers answered {status}: {text}", target.admin),
    }
}

async fn metrics(worker: &Worker) -> anyhow::Result<String> {
    client::get_text(&address_of(&worker.url)?, "/metrics", ASK_MAX).await
}

/// Prompt tokens that all decode workers have loaded so far; `None` where one of them does not say.
async fn loaded(workers: &[Worker]) -> Option<u64> {
    let mut all = None;
    for worker in workers.iter().filter(|worker| worker.role == "decode") {
        let own = pages::loaded(&metrics(worker).await.ok()?)?;
        *all.get_or_insert(0) += own;
    }
    all
}

/// Looks until every worker has let everything go, or it should have.
async fn rest(seen: &mut Seen) {
    let until = Instant::now() + REST_MAX;
    loop {
        (seen.held, seen.asked_at_rest, seen.others_ask) = (Vec::new(), 0, false);
        for worker in &seen.workers {
            let Ok(page) = metrics(worker).await else { continue };
            let (unrest, busy) = pages::unrest(&page);
            seen.asked_at_rest += 1;
            seen.others_ask |= busy;
            seen.held.extend(unrest.into_iter().map(|what| (worker.url.clone(), what)));
        }
        if seen.held.is_empty() || Instant::now() >= until {
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
