//! `pdlink up` with real vLLM workers on the CPU: pdlink's own connector, and the NIXL classes that vLLM ships.
//!
//! `PDLINK_TEST_VLLM` names the `vllm` program of an environment that has vLLM for CPU, NIXL and pdlink's wheel, and
//! `PDLINK_TEST_MODEL` the folder of a small model.

#[path = "support/launch.rs"]
mod launch;

use std::time::Duration;

use launch::{Place, Up, all_end, descendants, get, post, wait_for};
use rustix::process::Signal;
use serde_json::{Value, json};

/// Three workers on two busy cores import PyTorch for minutes.
const START_MAX: Duration = Duration::from_secs(600);

/// Around every border of blocks of 32 tokens that short prompts have.
const LENGTHS: &[u32] = &[1, 2, 31, 32, 33, 63, 64, 65, 200, 500];

const OWN_NIXL: &[&str] = &["--pd_disagg.connector_impl", "vllm", "--pd_disagg.kv_connector", "NixlConnector"];

/// A deployment of the debug file for CPU, with what a test changes.
struct Deployment {
    up: Up,
    base_url: String,
    plan: Value,
    _place: Place,
}

impl Deployment {
    fn start(more: &[&str]) -> Self {
        let [vllm, model] = ["PDLINK_TEST_VLLM", "PDLINK_TEST_MODEL"]
            .map(|name| std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set")));
        let place = Place::new();
        let config = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/debug/vllm_cpu.toml");
        let logs = place.path("logs").to_string_lossy().into_owned();
        let own =
            ["--json", "--inference.model.name", &model, "--launcher.vllm_program", &vllm, "--launcher.log_dir", &logs];
        let mut up =
            place.up(&config, &[&own, more].concat(), &[("HF_HUB_OFFLINE", "1"), ("VLLM_NO_USAGE_STATS", "1")]);
        up.patience = START_MAX;
        let plan = up.event("plan")["plan"].clone();
        let ready = up.event("ready");
        let base_url = ready["base_url"].as_str().expect("an address").to_owned();
        Self { up, base_url, plan, _place: place }
    }

    /// Greedy answers to prompts of every length, as token ids.
    fn answers(&self) -> Vec<Value> {
        LENGTHS
            .iter()
            .map(|length| self.answer(*length).unwrap_or_else(|said| panic!("{length} tokens: {said}")))
            .collect()
    }

    fn answer(&self, length: u32) -> Result<Value, String> {
        // Every length begins otherwise, so that none finds another in a prefix cache.
        let prompt: Vec<u32> = (0..length).map(|at| 100 + (length * 7 + at * 13) % 800).collect();
        let body = json!({
            "model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": true, "return_token_ids": true,
        });
        let said = post(&format!("{}/completions", self.base_url), &body.to_string());
        let value: Option<Value> = said.split_once("\r\n\r\n").and_then(|(_, body)| serde_json::from_str(body).ok());
        let ids = value.map(|value| value["choices"][0]["token_ids"].clone());
        ids.filter(Value::is_array).ok_or(said)
    }

    /// Prompt tokens that decode took from elsewhere, and those that it computed itself, as vLLM counts them.
    fn decode_sources(&self) -> (f64, f64) {
        let metrics = get(&format!("{}/metrics", self.plan["workers"][1]["url"].as_str().expect("a URL")));
        let of = |source: &str| {
            let is_it = |line: &&str| {
                line.starts_with("vllm:prompt_tokens_by_source_total{")
                    && line.contains(&format!("source=\"{source}\""))
            };
            let value = metrics.lines().find(is_it).and_then(|line| line.rsplit(' ').next()?.parse().ok());
            value.unwrap_or_else(|| panic!("no count of {source} in\n{metrics}"))
        };
        (of("external_kv_transfer"), of("local_compute"))
    }

    /// Ends it; nothing that it started is left.
    fn end(self) {
        let processes = descendants(self.up.pid());
        self.up.signal(Signal::TERM);
        let (ended, said) = self.up.ended();
        assert!(ended.success(), "{said}");
        all_end(&processes);
    }
}

/// Answers through prefill and decode are those of one server, and decode computed no prompt itself.
fn answers_as_one_server_does(name: &str, more: &[&str], expected: &[Value]) -> Deployment {
    let deployment = Deployment::start(more);
    assert_eq!(deployment.answers(), expected, "{name}");
    let (loaded, computed) = deployment.decode_sources();
    let tokens = f64::from(LENGTHS.iter().sum::<u32>());
    let alone = f64::from(u32::try_from(LENGTHS.len()).expect("few"));
    // At most the last token of each prompt, which every server computes to write the first of its answer.
    assert!(computed <= alone && loaded >= tokens - alone, "{name}: {loaded} of {tokens} loaded, {computed} computed");
    deployment
}

/// PRIME-RL's calls bring another checkpoint, and the first one back.
fn takes_weights(deployment: &Deployment, expected: &[Value]) {
    let proxy = deployment.base_url.trim_end_matches("/v1");
    let other = format!("{}-other", std::env::var("PDLINK_TEST_MODEL").expect("the tests' model"));
    let said = post(&format!("{proxy}/update_weights"), &json!({ "weight_dir": other }).to_string());
    assert!(said.contains("200 OK") && said.contains("\"version\":1"), "{said}");
    let changed = deployment.answers();
    assert!(changed.iter().zip(expected).all(|(one, other)| one != other), "{changed:?}");
    let said = post(&format!("{proxy}/reload_weights"), "{}");
    assert!(said.contains("200 OK") && said.contains("\"version\":2"), "{said}");
    assert_eq!(deployment.answers(), expected, "after the way back");
}

#[test]
#[ignore = "needs vLLM for CPU: see the head of this file"]
fn real_workers_answer_as_one_server_does_by_every_connector() {
    let plain = Deployment::start(&["--pd_disagg.enabled", "false", "--weights.vllm_workers", "true"]);
    let expected = plain.answers();
    takes_weights(&plain, &expected);
    plain.end();

    let native = answers_as_one_server_does("native", &[], &expected);
    let hand_off = get(&format!("{}/metrics", native.base_url.trim_end_matches("/v1")));
    assert!(hand_off.contains("pdlink_proxy_requests"), "{hand_off}");
    takes_weights(&native, &expected);
    native.end();

    let takes = [OWN_NIXL, &["--weights.vllm_workers", "true"]].concat();
    let own = answers_as_one_server_does("vLLM's own, decode reads", &takes, &expected);
    takes_weights(&own, &expected);
    own.end();

    let push = [OWN_NIXL, &["--pd_disagg.kv_send_type", "PUT"]].concat();
    let mut push = answers_as_one_server_does("vLLM's own, prefill writes", &push, &expected);
    // `kill -9` of a server leaves its engine's process behind; its guard ends that too, before the server starts again.
    let server = |process: &launch::Process| {
        process.command_line().contains("\0serve\0") && !process.command_line().contains("guard")
    };
    let before = descendants(push.up.pid());
    before.iter().find(|process| server(process)).expect("a server").kill();
    push.up.event("restarts");
    push.up.event("worker_ready");
    let again = wait_for(|| push.answer(64).ok());
    assert_eq!(again.as_ref(), Some(&expected[6]), "after a restart");
    push.end();
}
