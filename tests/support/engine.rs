//! Reference engines inside the test's own process, each on a free loopback port.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::time::{Duration, Instant};

use pdlink::config::{KvConfig, KvSendType, ReferenceConfig, WeightsConfig};
use pdlink::engine::{Engine, EngineSetup};
use pdlink::kv::Role;
use pdlink::security::Secret;
use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use tokio::sync::oneshot;
use tokio::task::JoinSet;

pub(crate) const MODEL: &str = "pdlink-test";
/// No wait in a test is longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A small cache: quick to fill, quick to run out of.
pub(crate) fn small() -> ReferenceConfig {
    ReferenceConfig {
        layers: 2,
        kv_heads: 4,
        head_size: 8,
        block_size: 4,
        num_blocks: 256,
        ..ReferenceConfig::default()
    }
}

pub(crate) fn setup(role: Role, reference: ReferenceConfig) -> EngineSetup {
    EngineSetup {
        role,
        model: MODEL.to_owned(),
        tp: 1,
        reference,
        kv: KvConfig::default(),
        weights: WeightsConfig::default(),
        prefix_caching: true,
        weight_version: 0,
        kv_listener: std::net::TcpListener::bind("127.0.0.1:0").expect("a port"),
        advertise_host: "127.0.0.1".to_owned(),
        secret: Secret::loopback(),
        send_type: KvSendType::default(),
        wrap_path: None,
    }
}

/// One worker that serves until it is stopped.
pub(crate) struct Worker {
    pub url: String,
    pub client: Client,
    stop: Option<oneshot::Sender<()>>,
    served: JoinSet<bool>,
}

impl Worker {
    pub(crate) async fn start(setup: EngineSetup) -> Self {
        let engine = Engine::start(setup).expect("the engine starts");
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let (stop, stopped) = oneshot::channel::<()>();
        let mut served = JoinSet::new();
        served.spawn(async move {
            let signal = async move {
                let _ = stopped.await;
            };
            let drained = engine.serve(listener, signal, Duration::from_secs(5)).await.expect("it serves");
            tokio::task::spawn_blocking(move || engine.stop()).await.expect("it stops") && drained
        });
        let client = Client::builder().no_proxy().timeout(PATIENCE).build().expect("a client");
        Self { url, client, stop: Some(stop), served }
    }

    pub(crate) async fn monolithic(reference: ReferenceConfig) -> Self {
        Self::start(setup(Role::Both, reference)).await
    }

    /// Asks it to end; true if it did so with nothing left behind.
    pub(crate) async fn stop(mut self) -> bool {
        drop(self.stop.take());
        let served = tokio::time::timeout(PATIENCE, self.served.join_next()).await.expect("it ends in time");
        served.expect("it serves").expect("no panic")
    }

    /// Ends it as it stands: nobody is waited for.
    pub(crate) async fn kill(mut self) {
        self.served.shutdown().await;
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Response {
        self.client.post(format!("{}{path}", self.url)).json(body).send().await.expect("an answer")
    }

    pub(crate) async fn get(&self, path: &str) -> Response {
        self.client.get(format!("{}{path}", self.url)).send().await.expect("an answer")
    }

    /// Posts and expects 200.
    pub(crate) async fn ask(&self, path: &str, body: &Value) -> Value {
        let response = self.post(path, body).await;
        let status = response.status();
        let text = response.text().await.expect("a body");
        assert_eq!(status, StatusCode::OK, "{path} {body}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// The greedy answer to a prompt of tokens.
    pub(crate) async fn greedy(&self, prompt: &[u32], max_tokens: usize) -> String {
        let answer = self.ask("/v1/completions", &greedy(prompt, max_tokens)).await;
        answer["choices"][0]["text"].as_str().expect("text").to_owned()
    }

    /// The events of a stream, and whether it ended as it should.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.post(path, body).await;
        assert_eq!(response.status(), StatusCode::OK);
        assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
        let text = response.text().await.expect("a body");
        let mut events: Vec<&str> =
            text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").expect("an event")).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        events.into_iter().map(|event| serde_json::from_str(event).expect("JSON")).collect()
    }

    /// One metric without labels, or with them as they are printed.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let text = self.get("/metrics").await.text().await.expect("metrics");
        let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        let line = line.unwrap_or_else(|| panic!("no metric {name} in:\n{text}"));
        line.rsplit(' ').next().and_then(|value| value.parse().ok()).expect("a whole number")
    }

    /// Waits until a metric has a value.
    pub(crate) async fn until(&self, name: &str, want: u64) {
        let start = Instant::now();
        loop {
            let is = self.metric(name).await;
            if is == want {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{name} is {is}, want {want}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until no request is left and no block is used (KV-2).
    pub(crate) async fn until_at_rest(&self) {
        for name in ["requests_running", "requests_waiting", "requests_loading", "blocks_held"] {
            self.until(&format!("pdlink_engine_{name}"), 0).await;
        }
        let (all, free) = (self.metric("pdlink_engine_blocks").await, self.metric("pdlink_engine_blocks_free").await);
        assert_eq!(all, free, "blocks are used by nobody");
    }
}

/// A completion request of tokens that ends by length alone.
pub(crate) fn greedy(prompt: &[u32], max_tokens: usize) -> Value {
    json!({"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true})
}

/// `len` tokens that no other `salt` shares.
pub(crate) fn prompt(len: usize, salt: u32) -> Vec<u32> {
    (0..u32::try_from(len).expect("short")).map(|at| (at * 7 + salt * 13) % 256).collect()
}
