//! The hand-off's part of each answer, from the records that decode's runtime keeps of its transfers.

use std::time::Duration;

use anyhow::{Context, bail};
use http::StatusCode;
use serde::Deserialize;
use tokio::task::JoinSet;

use super::stream::Answer;
use crate::bench::client;
use crate::config::Dispatch;
use crate::telemetry::{Side, TransferOutcome, TransferRecord};

/// Records asked for at once: workers answer them beside their work.
const ASKED_AT_ONCE: usize = 16;

/// What one transfer took, as decode saw it. Of one that was dispatched concurrently, what did not hide under prefill.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HandOff {
    /// The time to the first token of the answer behind it.
    pub(super) first: Duration,
    pub(super) path: &'static str,
    pub(super) dispatch: Dispatch,
    pub(super) bytes: u64,
    pub(super) wait: Duration,
    pub(super) copy: Duration,
    pub(super) validate: Duration,
    /// All three of the time to the first token.
    pub(super) share: f64,
}

#[derive(Debug, Deserialize)]
struct Page {
    records: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    record: TransferRecord,
}

/// The records of a row.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) hand_offs: Vec<HandOff>,
    /// Transfers that an answer named and that no record of decode's could be read of.
    pub(super) missed: usize,
    /// Why, for the first of them.
    pub(super) told: Option<String>,
}

/// Where the records are to be had.
#[derive(Debug, Clone)]
pub(super) struct Source {
    /// `host:port` of the proxy's admin routes.
    pub(super) address: String,
    pub(super) token: Option<String>,
}

/// Asks `source` for the transfers of these answers. An answer that names none (one worker served it alone,
/// or vLLM's own connector did) is left out.
pub(super) async fn of(source: &Source, answers: &[Answer], patience: Duration) -> Found {
    let mut waiting: Vec<(String, Duration)> =
        answers.iter().filter_map(|answer| Some((answer.transfer_id.clone()?, answer.first))).collect();
    let mut asking = JoinSet::new();
    let mut found = Found::default();
    loop {
        while asking.len() < ASKED_AT_ONCE
            && let Some((id, first)) = waiting.pop()
        {
            let source = source.clone();
            asking.spawn(async move {
                let page = source.page(&id, patience).await?;
                read(&page, first).context("no record of decode's that says it is done")
            });
        }
        match asking.join_next().await {
            None => return found,
            Some(Ok(Ok(hand_off))) => found.hand_offs.push(hand_off),
            Some(failed) => {
                found.missed += 1;
                let error = failed.map_or_else(
                    |error| error.to_string(),
                    |asked| asked.map_or_else(|error| format!("{error:#}"), |_| String::new()),
                );
                found.told.get_or_insert(error);
            }
        }
    }
}

impl Source {
    /// The page of one transfer, or why there is none and what would help.
    async fn page(&self, id: &str, patience: Duration) -> anyhow::Result<String> {
        let Self { address, token } = self;
        let asked = client::get(address, &format!("/admin/transfers/{id}"), token.as_deref(), patience).await;
        let answer = asked.with_context(|| format!("{ELSEWHERE}; asked was {address}"))?;
        let status = answer.status;
        let text = answer.text(patience).await?;
        let help = match status {
            StatusCode::OK => return Ok(text),
            StatusCode::UNAUTHORIZED if token.is_some() => {
                "the token is not that of `proxy.admin_token`: mend --admin-token (or PDLINK_ADMIN_TOKEN)"
            }
            StatusCode::UNAUTHORIZED => {
                "give the token of `proxy.admin_token` by --admin-token (or PDLINK_ADMIN_TOKEN)"
            }
            StatusCode::FORBIDDEN => {
                "the proxy has no `proxy.admin_token` and so shows records on its own host alone: measure there, or set a \
                 token and give it by --admin-token (or PDLINK_ADMIN_TOKEN)"
            }
            // A proxy that knows the route, and no such transfer, says so in a page.
            StatusCode::NOT_FOUND if serde_json::from_str::<Page>(&text).is_err() => ELSEWHERE,
            _ => "its records are gone or out of reach",
        };
        bail!("{help}; http://{address} answered {status}: {text}")
    }
}

const ELSEWHERE: &str = "give the address of the proxy's admin routes (`proxy.admin_listen`) by --admin-url";

/// Reads a page of records. Of several ranks, the request waited for the slowest.
fn read(page: &str, first: Duration) -> Option<HandOff> {
    let page: Page = serde_json::from_str(page).ok()?;
    // What moved under prefill held nobody up.
    let shown = |record: &TransferRecord| match record.dispatch {
        Dispatch::Sequential => (record.wait_us, record.copy_us),
        Dispatch::Concurrent => (0, record.exposed_us),
    };
    let whole = |record: &TransferRecord| shown(record).0 + shown(record).1 + record.validate_us;
    let records: Vec<TransferRecord> = page.records.into_iter().map(|entry| entry.record).collect();
    let of_decode = |record: &&TransferRecord| record.side == Side::Decode && record.outcome == TransferOutcome::Done;
    let slowest = records.iter().filter(of_decode).max_by_key(|record| whole(record))?;
    let bytes = records.iter().filter(of_decode).map(|record| record.bytes).sum();
    let first_us = u64::try_from(first.as_micros()).unwrap_or(u64::MAX).max(1);
    Some(HandOff {
        first,
        path: slowest.path.map_or("none", |path| path.name()),
        dispatch: slowest.dispatch,
        bytes,
        wait: Duration::from_micros(shown(slowest).0),
        copy: Duration::from_micros(shown(slowest).1),
        validate: Duration::from_micros(slowest.validate_us),
        share: whole(slowest) as f64 / first_us as f64,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_slowest_rank_of_decode_counts() {
        let record = |side: &str, copy_us: u64, outcome: serde_json::Value| {
            json!({ "worker": "w", "record": {
                "transfer_id": "00", "side": side, "engine_id": "e", "peer_engine_id": null, "rank": 0, "path": "shm", "bytes": 100,
                "runs": 1, "posts": 1, "blocks": 1, "tokens": 16, "wait_us": 10, "copy_us": copy_us, "validate_us": 30,
                "dispatch": "sequential", "exposed_us": 0, "digest_checked": false, "weight_version": 0, "ended_unix_us": 0, "outcome": outcome,
            }})
        };
        let page = |records: Vec<serde_json::Value>| json!({ "records": records, "errors": [] }).to_string();
        let done = || json!("done");
        let first = Duration::from_micros(1000);
        let text =
            page(vec![record("prefill", 900, done()), record("decode", 20, done()), record("decode", 60, done())]);
        let read_one = read(&text, first).expect("a hand-off");
        assert_eq!((read_one.copy, read_one.bytes, read_one.path), (Duration::from_micros(60), 200, "shm"));
        assert!((read_one.share - 0.1).abs() < 1e-9, "{}", read_one.share);
        assert_eq!(read(&page(vec![record("decode", 20, json!({ "failed": "x" }))]), first), None);
        assert_eq!(read("{}", first), None);
    }
}
