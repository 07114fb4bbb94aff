//! New weights for a fleet of real processes, as a trainer sends them: all serve one version, answers are of one version.

#[path = "support/checkpoints.rs"]
mod checkpoints;
#[path = "support/launch.rs"]
mod launch;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use launch::{PATIENCE, Up};
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const PROMPTS: usize = 8;
const TOKENS: usize = 24;

/// `pdlink up` with the reference engine; it does not outlive the test.
struct Fleet {
    _up: Up,
    address: String,
    client: Client,
    folder: tempfile::TempDir,
}

impl Fleet {
    fn start(prefill: &str, settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let secret = folder.path().join("secret");
        pdlink::security::Secret::generate().unwrap().write_file(&secret).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
        let logs = folder.path().join("logs");
        command
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["up", "@", "configs/debug/local.toml", "--json", "--pd_disagg.prefill_gpu_ids", prefill])
            .args(["--pd_disagg.decode_gpu_ids", "[9]", "--proxy.health_interval_s", "0.2"])
            .args(["--inference.reference.decode_us_per_token", "1500", "--weights.bucket_bytes", "65536"])
            .args(["--security.secret_file", secret.to_str().unwrap(), "--launcher.log_dir", logs.to_str().unwrap()])
            .args(settings)
            .stdin(Stdio::null());
        let mut up = Up::start(&mut command);
        let ready = up.event("ready");
        let address = ready["base_url"].as_str().unwrap().trim_end_matches("/v1").to_owned();
        let client = Client::builder().no_proxy().timeout(PATIENCE).build().unwrap();
        Self { _up: up, address, client, folder }
    }

    /// A checkpoint of this seed, on disk.
    fn checkpoint(&self, seed: u64) -> PathBuf {
        let folder = self.folder.path().join(format!("checkpoint-{seed}"));
        checkpoints::write(&folder, &checkpoints::tensors(seed, 12, 100_000), 2);
        folder
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self.client.get(format!("{}{path}", self.address)).send().await.unwrap();
        answer.json().await.unwrap()
    }

    async fn post(&self, path: &str, body: Value) -> (StatusCode, Value) {
        let answer = self.client.post(format!("{}{path}", self.address)).json(&body).send().await.unwrap();
        (answer.status(), answer.json().await.unwrap())
    }

    /// `pdlink weights push`.
    async fn push(&self, checkpoint: &Path) -> Value {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
        command
            .args(["weights", "push", "--json", "--to", &self.address, "--checkpoint", checkpoint.to_str().unwrap()])
            .args(["--secret-file", self.folder.path().join("secret").to_str().unwrap()])
            .args(["--weights.bucket_bytes", "65536"]);
        let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    async fn folder(&self, checkpoint: &Path) -> Value {
        let (status, done) = self.post("/update_weights", json!({"weight_dir": checkpoint})).await;
        assert_eq!(status, 200, "{done}");
        done
    }

    /// A whole answer to prompt number `prompt`, with the version that made it.
    async fn ask(&self, prompt: usize) -> (u64, String) {
        answer(&self.client, &self.address, prompt, false).await.expect("an answer")
    }

    /// Every prompt's answer.
    async fn answers(&self) -> Vec<String> {
        let mut all = Vec::new();
        for prompt in 0..PROMPTS {
            all.push(self.ask(prompt).await.1);
        }
        all
    }

    async fn versions(&self) -> Vec<u64> {
        let status = self.get("/admin/weights").await;
        status["workers"].as_array().unwrap().iter().map(|worker| worker["version"].as_u64().unwrap_or(999)).collect()
    }
}

/// One answer, streamed or whole; `None` where there is none.
async fn answer(client: &Client, address: &str, prompt: usize, stream: bool) -> Option<(u64, String)> {
    let body = json!({
        "model": "pdlink-reference", "prompt": format!("This is prompt number {prompt}, and what follows is"),
        "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "stream": stream,
    });
    let answer = client.post(format!("{address}/v1/completions")).json(&body).send().await.unwrap();
    let (status, headers) = (answer.status(), answer.headers().clone());
    let text = answer.text().await.unwrap();
    // It has to begin again; or a worker was killed under it, which is nobody's answer.
    if text.contains("ask again") || status.is_server_error() {
        return None;
    }
    assert_eq!(status, 200, "{text}");
    let version = headers["x-pdlink-weight-version"].to_str().unwrap().parse().unwrap();
    let text = if stream {
        let events = text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap());
        let chunks =
            events.filter(|event| *event != "[DONE]").map(|event| serde_json::from_str::<Value>(event).unwrap());
        chunks.map(|chunk| chunk["choices"][0]["text"].as_str().unwrap_or_default().to_owned()).collect()
    } else {
        serde_json::from_str::<Value>(&text).unwrap()["choices"][0]["text"].as_str().unwrap().to_owned()
    };
    Some((version, text))
}

/// Clients that ask without a pause until they are told to stop, and what they got.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    lost: Arc<AtomicUsize>,
    clients: JoinSet<Vec<(usize, u64, String)>>,
}

impl Load {
    fn start(fleet: &Fleet, clients: usize, stream: bool) -> Self {
        let (stop, answered, lost) = (Arc::new(AtomicBool::new(false)), Arc::default(), Arc::default());
        let mut running = JoinSet::new();
        for number in 0..clients {
            let (stop, client, address) = (Arc::clone(&stop), fleet.client.clone(), fleet.address.clone());
            let (answered, lost): (Arc<AtomicUsize>, Arc<AtomicUsize>) = (Arc::clone(&answered), Arc::clone(&lost));
            running.spawn(async move {
                let mut got = Vec::new();
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let prompt = (number + turn) % PROMPTS;
                    match answer(&client, &address, prompt, stream).await {
                        Some((version, text)) => got.push((prompt, version, text)),
                        None => {
                            lost.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    answered.fetch_add(1, Ordering::Relaxed);
                }
                got
            });
        }
        Self { stop, answered, lost, clients: running }
    }

    /// Waits until each client has had an answer or two more.
    async fn goes_on(&self) {
        let (begun, want) = (Instant::now(), self.answered.load(Ordering::Relaxed) + 2 * self.clients.len());
        while self.answered.load(Ordering::Relaxed) < want {
            assert!(begun.elapsed() < PATIENCE, "the clients get no answers");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stop(self) -> Vec<(usize, u64, String)> {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.join_all().await.into_iter().flatten().collect()
    }
}

/// A over B and back while 32 clients stream: what each version answers is known, and nothing else is ever answered.
async fn no_answer_mixes(prefill: &str, in_flight: &str, stream: bool) {
    let fleet = Fleet::start(prefill, &["--weights.in_flight", in_flight]);
    let base = fleet.answers().await;
    let (a, b) = (fleet.checkpoint(1), fleet.checkpoint(2));
    let first = fleet.push(&a).await;
    assert_eq!((&first["version"], &first["behind"]), (&json!(1), &json!([])));
    let of_a = fleet.answers().await;
    let load = Load::start(&fleet, 32, stream);
    load.goes_on().await;
    let second = fleet.push(&b).await;
    assert_eq!(second["version"], 2);
    let of_b = fleet.answers().await;
    load.goes_on().await;
    let third = fleet.folder(&a).await;
    assert_eq!((&third["version"], &third["digest"]), (&json!(3), &first["digest"]), "WT-5: pushed or read, the same");
    assert_eq!(fleet.answers().await, of_a, "the same weights answer the same, whatever their version");
    load.goes_on().await;
    assert_eq!(load.lost.load(Ordering::Relaxed), 0, "no request was lost to the two updates");
    let got = load.stop().await;
    let (answer, versions): (_, BTreeSet<u64>) =
        (|version: u64| if version == 2 { &of_b } else { &of_a }, got.iter().map(|(_, version, _)| *version).collect());
    assert_eq!(versions, BTreeSet::from([1, 2, 3]));
    for (prompt, version, text) in &got {
        assert_eq!(text, &answer(*version)[*prompt], "prompt {prompt} by version {version}, {} answers", got.len());
    }
    let all: BTreeSet<&String> = base.iter().chain(&of_a).chain(&of_b).collect();
    assert_eq!(all.len(), 3 * PROMPTS, "the three can be told apart");
    let versions = fleet.versions().await;
    assert!(versions.iter().all(|version| *version == 3), "WT-1: {versions:?}");
    let (status, done) = fleet.post("/reload_weights", json!({})).await;
    assert_eq!((status, &done["version"]), (StatusCode::OK, &json!(4)));
    assert_eq!(fleet.answers().await, base);
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_1_streams_are_finished_by_the_version_they_began_with_1p1d() {
    no_answer_mixes("[0]", "finish", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_1_answers_begin_again_with_the_new_version_2p1d() {
    no_answer_mixes("[0,1]", "restart", false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_4_what_cannot_be_is_refused_by_name_and_the_old_version_serves_on() {
    let fleet = Fleet::start("[0]", &[]);
    let a = fleet.checkpoint(1);
    fleet.push(&a).await;
    let of_a = fleet.answers().await;
    let refused = async |body: Value, status: u16, parts: &[&str]| {
        let (got, answer) = fleet.post("/admin/weights/update", body).await;
        let message = answer["error"]["message"].as_str().unwrap_or_default();
        assert!(got == status && parts.iter().all(|part| message.contains(part)), "{got} {answer}");
        assert_eq!((fleet.versions().await, fleet.ask(0).await), (vec![1, 1], (1, of_a[0].clone())));
    };
    refused(json!({"folder": a, "version": 1}), 409, &["version 1 is not newer than version 1"]).await;
    refused(json!({"folder": "/nowhere"}), 502, &["while staging", "on worker http://", "cannot read /nowhere"]).await;
    refused(json!({"peer": "127.0.0.1:1"}), 502, &["while staging", "cannot connect to 127.0.0.1:1"]).await;
    let broken = fleet.checkpoint(7);
    let file = std::fs::read_dir(&broken).unwrap().map(|entry| entry.unwrap().path());
    let file = file.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "safetensors")).unwrap();
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(5000).unwrap();
    refused(json!({"folder": broken}), 502, &["while staging", "describes", "the file has 5000"]).await;
    refused(json!({}), 400, &["name one source"]).await;
    let status = fleet.get("/admin/weights").await;
    assert!(status["last_failure"].as_str().unwrap().contains("describes"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_1_a_worker_that_was_restarted_catches_up_before_it_serves() {
    let fleet = Fleet::start("[0,1]", &["--launcher.restart", "on-failure", "--launcher.restart_backoff_s", "0.1"]);
    let a = fleet.checkpoint(1);
    fleet.push(&a).await;
    let of_a = fleet.answers().await;
    let load = Load::start(&fleet, 8, false);
    let workers = fleet.get("/admin/workers").await;
    let prefill = workers["workers"][0]["url"].as_str().unwrap().rsplit(':').next().unwrap().to_owned();
    let pid = listener_of(&prefill);
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "{}", fleet.get("/admin/weights").await);
        let now = fleet.get("/admin/workers").await;
        let (first, decode) = (&now["workers"][0], &now["workers"][2]);
        assert_eq!(decode["kept_out"], false, "only the one that was restarted is kept out");
        if listener_is_other(&prefill, pid) && first["kept_out"] == false && first["state"] == "up" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(fleet.versions().await, [1, 1, 1]);
    let before = fleet.get("/admin/workers").await["workers"][0]["served"].as_u64().unwrap();
    while fleet.get("/admin/workers").await["workers"][0]["served"].as_u64().unwrap() == before {
        assert!(begun.elapsed() < PATIENCE, "it serves again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for (prompt, version, text) in load.stop().await {
        assert_eq!((version, &text), (1, &of_a[prompt]));
    }
}

/// The process that listens on a port of ours: `pdlink engine … --port PORT`.
fn engines(port: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let is_engine = words.get(1) == Some(&&b"engine"[..]);
        if is_engine && words.windows(2).any(|pair| pair[0] == b"--port" && pair[1] == port.as_bytes()) {
            found.push(pid);
        }
    }
    found
}

fn listener_of(port: &str) -> i32 {
    engines(port).first().copied().expect("a worker on that port")
}

fn listener_is_other(port: &str, than: i32) -> bool {
    engines(port).iter().any(|pid| *pid != than)
}

/// PRIME-RL's orchestrator, as far as it talks to inference.
struct Orchestrator<'a>(&'a Fleet);

impl Orchestrator<'_> {
    /// Its own habit: ten tries on 502, 503, 504 and transport errors; anything else ends the run.
    async fn admin(&self, path: &str, body: &Value) -> Value {
        for _ in 0..10 {
            let sent = self.0.client.post(format!("{}{path}", self.0.address)).json(body).send().await;
            match sent {
                Ok(answer) if [502, 503, 504].contains(&answer.status().as_u16()) => {}
                Ok(answer) => {
                    assert!(answer.status().is_success(), "{path} {body}: {}", answer.text().await.unwrap());
                    return answer.json().await.unwrap();
                }
                Err(_) => {}
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{path} {body} was tried ten times")
    }

    /// What the trainer leaves for a step: the checkpoint, and when it is whole, the marker.
    async fn update(&self, step: u64, seed: u64) -> Value {
        let folder = self.0.folder.path().join(format!("broadcasts/step_{step}"));
        checkpoints::write(&folder, &checkpoints::tensors(seed, 12, 20_000), 2);
        std::fs::write(folder.join("STABLE"), "").unwrap();
        self.admin("/update_weights", &json!({"weight_dir": folder})).await
    }

    async fn rollout(&self, model: &str) -> (u64, String) {
        let messages = json!([{"role": "user", "content": "Reverse the text: abc"}]);
        let body = json!({"model": model, "messages": messages, "max_tokens": 16, "temperature": 0});
        let path = format!("{}/v1/chat/completions", self.0.address);
        let answer = self.0.client.post(path).json(&body).send().await.unwrap();
        let version = answer.headers()["x-pdlink-weight-version"].to_str().unwrap().parse().unwrap();
        let answer: Value = answer.json().await.unwrap();
        assert_eq!(answer["model"], model);
        (version, answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prime_rls_calls_in_its_order_drive_the_fleet_unchanged() {
    let fleet = Fleet::start("[0]", &[]);
    let orchestrator = Orchestrator(&fleet);
    assert_eq!(fleet.get("/health").await["status"], "ok");
    let models = fleet.get("/v1/models").await;
    let model = models["data"][0]["id"].as_str().unwrap().to_owned();
    let meeting =
        json!({"host": "127.0.0.1", "port": 29501, "server_rank": 0, "num_inference_server": 1, "timeout": 30});
    assert_eq!(orchestrator.admin("/init_broadcaster", &meeting).await["status"], "ok");
    let base = orchestrator.rollout(&model).await;
    assert_eq!(base.0, 0);

    let mut answers = BTreeSet::from([base.1.clone()]);
    for step in [1, 2, 5] {
        let done = orchestrator.update(step, step).await;
        assert_eq!((&done["status"], &done["version"]), (&json!("ok"), &json!(step)), "a step is its version");
        let (version, text) = orchestrator.rollout(&model).await;
        assert_eq!(version, step);
        assert!(answers.insert(text), "each step's weights answer differently");
    }
    // The file system is slow: the folder is seen a while after the marker was. Its tries carry it over.
    let late = fleet.folder.path().join("broadcasts/step_6");
    let body = json!({"weight_dir": late});
    let seen = async {
        tokio::time::sleep(Duration::from_millis(250)).await;
        let hidden = fleet.folder.path().join("hidden");
        checkpoints::write(&hidden, &checkpoints::tensors(6, 12, 20_000), 2);
        std::fs::rename(&hidden, &late).unwrap();
    };
    let (done, ()) = tokio::join!(orchestrator.admin("/update_weights", &body), seen);
    assert_eq!(done["version"], 6);
    // Back to an earlier step: the same weights, as a version of their own.
    let again = orchestrator.update(2, 2).await;
    assert_eq!(again["version"], 7);

    assert_eq!(orchestrator.admin("/reload_weights", &json!({})).await["status"], "ok");
    assert_eq!(orchestrator.rollout(&model).await, (8, base.1.clone()));

    let adapter = fleet.checkpoint(40);
    let lora = json!({"lora_name": "r8-step-1", "lora_path": adapter});
    assert_eq!(orchestrator.admin("/load_lora_adapter", &lora).await["status"], "ok");
    let adapted = orchestrator.rollout("r8-step-1").await;
    assert!(adapted.0 == 8 && !answers.contains(&adapted.1), "{adapted:?}");
    assert!(answers.contains(&orchestrator.rollout(&model).await.1), "the model itself answers as before");
    let names = fleet.get("/v1/models").await;
    assert_eq!(names["data"].as_array().unwrap().len(), 2, "{names}");
}

#[tokio::test(flavor = "multi_thread")]
async fn wt_4_a_sender_that_is_killed_while_it_sends_changes_nothing() {
    let fleet = Fleet::start("[0]", &[]);
    fleet.push(&fleet.checkpoint(1)).await;
    let of_a = fleet.answers().await;
    let load = Load::start(&fleet, 8, true);
    let large = fleet.folder.path().join("large");
    checkpoints::write(&large, &checkpoints::tensors(2, 8, 4_000_000), 1);
    let mut sender = Command::new(env!("CARGO_BIN_EXE_pdlink"))
        .args(["weights", "push", "--json", "--to", &fleet.address, "--checkpoint", large.to_str().unwrap()])
        .args([
            "--secret-file",
            fleet.folder.path().join("secret").to_str().unwrap(),
            "--weights.bucket_bytes",
            "16384",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    loop {
        let status = fleet.get("/admin/weights").await;
        let staging = |worker: &Value| worker["phase"] == "staging" && worker["staged_bytes"].as_u64() > Some(0);
        if status["workers"].as_array().unwrap().iter().all(staging) {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{status}");
    }
    sender.kill().unwrap();
    sender.wait().unwrap();
    loop {
        let status = fleet.get("/admin/weights").await;
        if let (Value::Null, Some(failure)) = (&status["under_way"], status["last_failure"].as_str()) {
            let is_named = ["lost", "has ended"].iter().any(|how| failure.contains(how));
            assert!(failure.contains("while staging, on worker http://") && is_named, "{failure}");
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{status}");
    }
    assert_eq!(fleet.versions().await, [1, 1]);
    assert_eq!(fleet.answers().await, of_a);
    assert_eq!(load.lost.load(Ordering::Relaxed), 0);
    let got = load.stop().await;
    assert!(!got.is_empty());
    for (prompt, version, text) in got {
        assert_eq!((version, &text), (1, &of_a[prompt]), "no answer was lost or changed");
    }
    let done = fleet.push(&large).await;
    assert_eq!((&done["version"], &done["behind"]), (&json!(2), &json!([])));
}
