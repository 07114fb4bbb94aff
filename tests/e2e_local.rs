//! The whole of it, as a newcomer runs it: one file, prefill and decode workers, the proxy, real processes.

#[path = "support/launch.rs"]
mod launch;
#[path = "support/nixl.rs"]
mod nixl_library;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use launch::{PATIENCE, Up};
use reqwest::{Client, Response};
use rustix::process::Signal;
use serde_json::{Value, json};

/// A `pdlink` process of ours, which does not outlive the test.
struct Pdlink {
    process: Up,
    _logs: tempfile::TempDir,
}

impl Pdlink {
    fn start(args: &[&str]) -> Self {
        let logs = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
        command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).env_remove("PDLINK_SECRET_FILE");
        command.args(["--launcher.log_dir", logs.path().to_str().unwrap()]).stdin(Stdio::null());
        Self { process: Up::start(&mut command), _logs: logs }
    }

    /// `pdlink up` with a configuration of ours; the address of its front.
    fn up(config: &str) -> (Self, String) {
        Self::up_with(config, &[])
    }

    fn up_with(config: &str, overrides: &[&str]) -> (Self, String) {
        let mut up = Self::start(&[&["up", "@", config, "--json"], overrides].concat());
        let ready = up.process.event("ready");
        let address = ready["base_url"].as_str().unwrap().trim_end_matches("/v1").to_owned();
        (up, address)
    }

    /// SIGTERM, then whether it ended well.
    fn stop(self) -> bool {
        self.process.signal(Signal::TERM);
        self.process.ended().0.success()
    }
}

async fn post(address: &str, path: &str, body: String) -> Response {
    let request = Client::new().post(format!("{address}{path}")).header("content-type", "application/json");
    request.body(body).timeout(PATIENCE).send().await.unwrap()
}

async fn get(address: &str, path: &str) -> String {
    let answer = Client::new().get(format!("{address}{path}")).timeout(PATIENCE).send().await.unwrap();
    answer.text().await.unwrap()
}

/// The body of the README's `curl`.
fn body_of_the_readme() -> String {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    assert!(readme.contains("cargo run --release -- up @ configs/debug/local.toml"));
    readme.split("-d '").nth(1).and_then(|rest| rest.split('\'').next()).unwrap().to_owned()
}

/// The value of a sample whose name and labels are exactly these.
fn sample(metrics: &str, name: &str) -> u64 {
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in\n{metrics}")).parse().unwrap()
}

#[tokio::test]
async fn the_two_steps_of_the_readme_end_in_an_answer_whose_kv_crossed_the_link() {
    let (up, address) = Pdlink::up("configs/debug/local.toml");
    let answer = post(&address, "/v1/completions", body_of_the_readme()).await;
    assert_eq!(answer.status(), 200);
    let transfer_id = answer.headers()["x-pdlink-transfer-id"].to_str().unwrap().to_owned();
    let answer: Value = answer.json().await.unwrap();

    // The proof: both sides' records, and decode's own count of where its prompt came from.
    let transfer: Value =
        serde_json::from_str(&get(&address, &format!("/admin/transfers/{transfer_id}")).await).unwrap();
    let prompt_tokens = answer["usage"]["prompt_tokens"].as_u64().unwrap();
    for (record, side) in transfer["records"].as_array().unwrap().iter().zip(["prefill", "decode"]) {
        let record = &record["record"];
        assert_eq!(
            (&record["side"], &record["path"], &record["outcome"]),
            (&json!(side), &json!("shm"), &json!("done"))
        );
        assert_eq!(record["tokens"], prompt_tokens);
    }
    let workers: Value = serde_json::from_str(&get(&address, "/admin/workers").await).unwrap();
    let decode = workers["workers"].as_array().unwrap().iter().find(|worker| worker["role"] == "decode").unwrap();
    let metrics = get(decode["url"].as_str().unwrap(), "/metrics").await;
    assert_eq!(sample(&metrics, "pdlink_engine_prompt_tokens_total{source=\"loaded\"}"), prompt_tokens);
    assert_eq!(
        sample(&metrics, "pdlink_engine_prompt_tokens_total{source=\"computed\"}"),
        1,
        "the last prompt token only"
    );
    assert!(up.stop());
}

#[tokio::test]
async fn two_by_two_workers_answer_as_one_engine_does() {
    answers_as_one_engine_does("configs/debug/local_2p2d.toml", &[], "shm").await;
}

#[tokio::test]
async fn workers_answer_with_both_legs_at_once_as_one_engine_does() {
    let concurrent = ["--proxy.dispatch", "concurrent", "--kv.part_bytes_min", "1"];
    for config in ["configs/debug/local.toml", "configs/debug/local_2p2d.toml"] {
        answers_as_one_engine_does(config, &concurrent, "shm").await;
    }
}

#[tokio::test]
#[ignore = "needs NIXL's wheel"]
async fn workers_answer_over_nixl_as_one_engine_does() {
    let environment = nixl_library::environment();
    let nixl = ["--kv.paths", "[\"nixl\"]", "--kv.nixl.environment", environment.to_str().unwrap()];
    for config in ["configs/debug/local.toml", "configs/debug/local_2p2d.toml"] {
        answers_as_one_engine_does(config, &nixl, "nixl").await;
    }
}

/// Holds a fleet's answers against a single engine's, and the path that brought the KV against `path`.
async fn answers_as_one_engine_does(config: &str, overrides: &[&str], path_taken: &str) {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let single =
        Pdlink::start(&["engine", "--role", "both", "--port", &port.to_string(), "--model", "pdlink-reference"]);
    let single_address = format!("http://127.0.0.1:{port}");
    let (up, address) = Pdlink::up_with(config, overrides);
    let mut patience = 0;
    while Client::new().get(format!("{single_address}/health")).send().await.is_err() {
        patience += 1;
        assert!(patience < 600, "the single engine did not come up");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let choices = |answer: &Value| answer["choices"].clone();
    let mut moved = 0;
    for length in [1, 15, 16, 17, 31, 32, 33, 100, 500] {
        let prompt: String =
            (0..length).map(|at| char::from(b'a' + u8::try_from((at * 7 + length) % 26).unwrap())).collect();
        let completion = json!({"model": "pdlink-reference", "prompt": prompt, "max_tokens": 12, "temperature": 0});
        let chat = json!({
            "model": "pdlink-reference", "messages": [{"role": "user", "content": prompt}], "max_completion_tokens": 12,
        });
        for (path, body) in [("/v1/completions", completion), ("/v1/chat/completions", chat)] {
            let ours = post(&address, path, body.to_string()).await;
            let transfer_id = ours.headers()["x-pdlink-transfer-id"].to_str().unwrap().to_owned();
            let ours: Value = ours.json().await.unwrap();
            let single: Value = post(&single_address, path, body.to_string()).await.json().await.unwrap();
            assert_eq!(choices(&ours), choices(&single), "{path}, prompt of {length} bytes");
            let told = get(&address, &format!("/admin/transfers/{transfer_id}")).await;
            let transfer: Value = serde_json::from_str(&told).unwrap();
            let record = &transfer["records"][1]["record"];
            if record["bytes"] != 0 {
                assert_eq!(record["path"], path_taken, "{told}");
                moved += 1;
            }
        }
    }
    assert!(moved >= 14, "KV crossed the link for {moved} of 18 answers");
    assert!(up.stop() && single.stop());
}

#[test]
fn kv_9_and_px_2_hold_while_workers_are_killed_and_clients_leave() {
    // The long form: `pdlink bench soak @ configs/debug/local_2p2d.toml`.
    let logs = tempfile::tempdir().unwrap();
    let counts = logs.path().join("soak.json");
    let soak = Command::new(env!("CARGO_BIN_EXE_pdlink"))
        .args([
            "bench",
            "soak",
            "@",
            "configs/debug/local_2p2d.toml",
            "--launcher.log_dir",
            logs.path().to_str().unwrap(),
        ])
        .args(["--clients", "16", "--seconds", "15", "--kill-every", "4", "--leave-share", "0.2"])
        .args(["--json", counts.to_str().unwrap()])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&soak.stdout).into_owned() + &String::from_utf8_lossy(&soak.stderr);
    assert!(soak.status.success(), "{said}");
    let counts: Value = serde_json::from_str(&std::fs::read_to_string(counts).unwrap()).unwrap();
    let level = &counts["levels"][0];
    let count = |path: &str| level.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: {counts}"));
    // Cached prompts and fresh ones were both answered, and the KV of fresh ones moved whole: hundreds of KiB each.
    let (right, fresh) = (count("/right"), count("/fresh_right"));
    assert!(0 < fresh && fresh < right, "{counts}");
    let (transfers, moved) = (count("/workers/transfers"), count("/workers/moved_bytes"));
    assert!(transfers > fresh / 2 && moved > fresh * (512 << 10), "{counts}");
    assert!(count("/workers/own_end_bytes") > 0, "{counts}");
}
