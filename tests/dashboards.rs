//! The dashboards in `configs/` ask for metrics that a run really has: held against a live fleet of reference engines.

#[path = "support/launch.rs"]
mod launch;

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use std::time::Duration;

use launch::{PATIENCE, Up};
use serde_json::{Value, json};

/// Words of PromQL in the queries of ours that are no metrics.
const WORDS: &[&str] = &["sum", "by", "rate", "histogram_quantile", "max", "min", "increase", "clamp_min"];

/// Every query of a dashboard.
fn queries(dashboard: &Value) -> Vec<String> {
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels.iter().filter_map(|panel| panel["targets"].as_array()).flatten();
    targets.map(|target| target["expr"].as_str().expect("a query").to_owned()).collect()
}

/// Metrics of a query, and the labels that it names of each. Our queries have one metric each, or several with the same labels.
fn names(query: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut metrics, mut labels) = (BTreeSet::new(), BTreeSet::new());
    let mut rest = query;
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    while let Some(at) = rest.find(|c: char| is_word(c) || c == '"' || c == '[' || c == '$') {
        let from = &rest[at..];
        if let Some(quoted) = from.strip_prefix('"') {
            rest = quoted.split_once('"').expect("a closed text").1;
        } else if from.starts_with('[') {
            rest = from.split_once(']').expect("a closed range").1;
        } else {
            let end = from.find(|c: char| !is_word(c) && c != '$').unwrap_or(from.len());
            let word = &from[..end];
            rest = &from[end..];
            if word.starts_with("pdlink_") {
                metrics.insert(word.to_owned());
            } else if !WORDS.contains(&word) && word.starts_with(|c: char| c.is_ascii_alphabetic()) {
                labels.insert(word.to_owned());
            }
        }
    }
    (metrics, labels)
}

/// The labels of every metric on some pages.
fn samples(pages: &[String]) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in pages.iter().flat_map(|page| page.lines()).filter(|line| !line.starts_with('#')) {
        let end = line.find(['{', ' ']).unwrap_or(line.len());
        let labels = found.entry(line[..end].to_owned()).or_default();
        if let Some((inside, _)) = line[end..].strip_prefix('{').and_then(|rest| rest.split_once('}')) {
            labels.extend(inside.split(',').filter_map(|pair| Some(pair.split_once('=')?.0.to_owned())));
        }
    }
    found
}

/// The fleet, its front, and the addresses of its workers.
fn up(logs: &std::path::Path) -> (Up, String, Vec<String>) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
    command
        .args(["up", "@", "configs/debug/local.toml", "--json", "--telemetry.watch_interval_s", "0.2"])
        .args(["--launcher.log_dir", logs.to_str().expect("UTF-8")])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("PDLINK_SECRET_FILE")
        .stdin(Stdio::null());
    let mut fleet = Up::start(&mut command);
    let plan = fleet.event("plan");
    let workers = plan["plan"]["workers"].as_array().expect("workers").iter();
    let workers = workers.map(|worker| worker["url"].as_str().expect("a URL").to_owned()).collect();
    let ready = fleet.event("ready");
    let base = ready["base_url"].as_str().expect("a URL").trim_end_matches("/v1").to_owned();
    (fleet, base, workers)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_query_names_metrics_and_labels_that_a_live_run_has() {
    let logs = tempfile::tempdir().expect("a folder");
    let (_fleet, base, workers) = up(logs.path());
    let client = reqwest::Client::builder().timeout(PATIENCE).build().expect("a client");
    for number in 0..3 {
        let prompt = format!("{number} {}", "a prompt of some length ".repeat(20));
        let body = json!({"model": "pdlink-reference", "prompt": prompt, "max_tokens": 4});
        let answer = client.post(format!("{base}/v1/completions")).json(&body).send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
    }
    let dashboards = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/grafana")).expect("a folder");
    let dashboards: Vec<Value> = dashboards
        .map(|file| std::fs::read_to_string(file.expect("a file").path()).expect("text"))
        .map(|text| serde_json::from_str(&text).expect("JSON"))
        .collect();
    assert!(!dashboards.is_empty());
    let wanted: Vec<String> = dashboards.iter().flat_map(queries).collect();
    assert!(wanted.len() > 20, "{} queries were read", wanted.len());
    let mut missing = Vec::new();
    // What the proxy knows of workers' queues comes with its next look at them.
    for _ in 0..100 {
        let mut pages = Vec::new();
        for address in workers.iter().chain([&base]) {
            let page = client.get(format!("{address}/metrics")).send().await.expect("a page");
            pages.push(page.text().await.expect("text"));
        }
        let found = samples(&pages);
        missing.clear();
        for query in &wanted {
            let (metrics, labels) = names(query);
            assert!(!metrics.is_empty(), "no metric was read in {query}");
            for metric in &metrics {
                match found.get(metric) {
                    None => missing.push(format!("{metric} is on no page: {query}")),
                    Some(has) if !labels.is_subset(has) => {
                        missing.push(format!("{metric} has {has:?}, not all of {labels:?}: {query}"));
                    }
                    Some(_) => {}
                }
            }
        }
        if missing.is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("{}", missing.join("\n"));
}

#[test]
fn queries_are_read() {
    let (metrics, labels) = names(
        "histogram_quantile(0.95, sum by (le, part) (rate(pdlink_a_bucket{side=\"x y\"}[$__rate_interval]))) / pdlink_b",
    );
    assert_eq!(metrics.into_iter().collect::<Vec<_>>(), ["pdlink_a_bucket", "pdlink_b"]);
    assert_eq!(labels.into_iter().collect::<Vec<_>>(), ["le", "part", "side"]);
}
