//! `pdlink doctor --url` against deployments that run: one that is well, and ones with a worker that is not what it says.

#[path = "support/doctor.rs"]
mod doctor;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use doctor::{Diagnosis, command, diagnose};
use serde_json::{Value, json};

/// A worker over HTTP that answers like vLLM, as far as proxy and doctor look.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// Offers KV, and answers as a worker alone does.
    Prefill,
    /// Loads what it is offered, and says so.
    Decode,
    /// Answers well, and computes every prompt itself.
    DecodeThatPrefills,
    /// Loads, and answers something else.
    DecodeThatIsWrong,
    /// Loads, answers well, and never lets go of its blocks.
    DecodeThatHolds,
}

/// Serves for as long as the test's process lives.
fn worker(kind: Kind) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = format!("http://{}", listener.local_addr().expect("address"));
    let loaded = Arc::new(AtomicU64::new(0));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let loaded = loaded.clone();
            std::thread::spawn(move || serve(kind, stream, &loaded));
        }
    });
    address
}

fn serve(kind: Kind, stream: TcpStream, loaded: &AtomicU64) {
    let mut reader = BufReader::new(stream.try_clone().expect("clone"));
    loop {
        let (mut line, mut length) = (String::new(), 0);
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        loop {
            let mut header = String::new();
            if reader.read_line(&mut header).unwrap_or(0) == 0 || header == "\r\n" {
                break;
            }
            if let Some(value) = header.to_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
        }
        let mut body = vec![0; length];
        reader.read_exact(&mut body).expect("the body");
        let text = match path.as_str() {
            "/v1/models" => json!({ "object": "list", "data": [{ "id": "M", "object": "model" }] }).to_string(),
            "/metrics" => metrics(kind, loaded.load(Ordering::SeqCst)),
            "/v1/completions" => complete(kind, &serde_json::from_slice(&body).expect("JSON"), loaded),
            _ => "{}".to_owned(),
        };
        let head =
            format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", text.len());
        if (&stream).write_all(format!("{head}{text}").as_bytes()).is_err() {
            return;
        }
    }
}

fn metrics(kind: Kind, loaded: u64) -> String {
    let used = if kind == Kind::DecodeThatHolds && loaded > 0 { 0.25 } else { 0.0 };
    format!(
        "vllm:prompt_tokens_by_source_total{{source=\"external_kv_transfer\"}} {loaded}.0\n\
         vllm:num_requests_running{{engine=\"0\"}} 0.0\nvllm:kv_cache_usage_perc{{engine=\"0\"}} {used}\n"
    )
}

fn complete(kind: Kind, request: &Value, loaded: &AtomicU64) -> String {
    let prompt: Vec<u64> = serde_json::from_value(request["prompt"].clone()).expect("token ids");
    let count = request["max_tokens"].as_u64().expect("a number");
    let seed: u64 = prompt.iter().enumerate().map(|(at, id)| id * (at as u64 + 1)).sum();
    let wrong = u64::from(kind == Kind::DecodeThatIsWrong);
    let ids: Vec<u64> = (0..count).map(|at| (seed + wrong + at * 7) % 250).collect();
    if kind != Kind::Prefill
        && kind != Kind::DecodeThatPrefills
        && request["kv_transfer_params"]["do_remote_prefill"] == true
    {
        loaded.fetch_add(prompt.len() as u64, Ordering::SeqCst);
    }
    let mut answer = json!({
        "id": "c", "object": "text_completion", "model": "M",
        "choices": [{ "index": 0, "text": "x", "token_ids": ids, "finish_reason": "length" }],
        "usage": { "prompt_tokens": prompt.len(), "completion_tokens": count, "total_tokens": prompt.len() as u64 + count },
    });
    if kind == Kind::Prefill && request["kv_transfer_params"]["do_remote_decode"] == true {
        answer["kv_transfer_params"] = json!({
            "do_remote_prefill": true, "do_remote_decode": false, "remote_engine_id": "e", "remote_host": "127.0.0.1",
            "remote_port": 1, "remote_block_ids": [0], "tp_size": 1,
        });
    }
    answer.to_string()
}

/// A program of ours that runs until the test has ended.
struct Running {
    child: Child,
    _stdout: BufReader<ChildStdout>,
    url: String,
}

impl Running {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("start pdlink");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout"));
        let mut line = String::new();
        while !line.contains("http://") || !line.contains("ready") {
            line.clear();
            assert!(stdout.read_line(&mut line).expect("a line") > 0, "it ended before it was ready");
        }
        let url = line.split_whitespace().find_map(|word| word.strip_suffix("/v1")).expect("an address").to_owned();
        Self { child, _stdout: stdout, url }
    }

    /// A proxy before one prefill worker and this one.
    fn before(decode: Kind) -> Self {
        let (prefill, decode) = (worker(Kind::Prefill), worker(decode));
        let mut proxy = command(env!("CARGO_BIN_EXE_pdlink"));
        proxy.args(["proxy", "--host", "127.0.0.1", "--port", "0", "--prefill", &prefill, "--decode", &decode]);
        proxy.args(["--connector", "NixlConnector", "--connector-impl", "vllm"]);
        Self::start(proxy)
    }

    fn diagnosed(&self, more: &[&str]) -> Diagnosis {
        diagnose(&[&["--only", "deployment", "--url", &self.url], more].concat())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.child.wait();
    }
}

#[test]
fn a_deployment_that_is_well_is_found_well_with_its_path() {
    let logs = tempfile::tempdir().expect("folder");
    let mut up = command(env!("CARGO_BIN_EXE_pdlink"));
    let config = ["@", "configs/debug/local_2p2d.toml"];
    up.arg("up").args(config).args(["--launcher.log_dir", logs.path().to_str().expect("UTF-8")]);
    let found = Running::start(up).diagnosed(&config);
    found.assert("deployment", "workers", "ok", &["2 prefill and 2 decode"]);
    found.assert("deployment", "answers", "ok", &["6 greedy answers"]);
    found.assert("deployment", "kv-moved", "ok", &["604 at least", "records of 6 of 6"]);
    found.assert("deployment", "path", "ok", &["shm"]);
    found.assert("deployment", "blocks-free", "ok", &["4 workers"]);
    found.assert("deployment", "clocks", "ok", &["workers' clocks agree"]);
    assert_eq!(found.exit, 0);
}

#[test]
fn a_worker_that_silently_prefills_on_decode_is_found() {
    let well = Running::before(Kind::Decode).diagnosed(&[]);
    well.assert("deployment", "answers", "ok", &["6 greedy answers"]);
    well.assert("deployment", "kv-moved", "ok", &["decode loaded 610 prompt tokens"]);
    let silent = Running::before(Kind::DecodeThatPrefills).diagnosed(&[]);
    silent.assert("deployment", "answers", "ok", &["6 greedy answers"]);
    silent.assert(
        "deployment",
        "kv-moved",
        "fail",
        &["decode loaded 0 prompt tokens of 604", "computed the others itself"],
    );
}

#[test]
fn wrong_answers_and_blocks_that_stay_are_found() {
    let wrong = Running::before(Kind::DecodeThatIsWrong).diagnosed(&[]);
    wrong.assert("deployment", "answers", "fail", &["6 of 6 greedy answers differ", "kv.digest"]);
    let holds = Running::before(Kind::DecodeThatHolds).diagnosed(&[]);
    holds.assert("deployment", "blocks-free", "fail", &["0.25 share of KV blocks in use"]);
}

#[test]
fn a_deployment_that_does_not_answer_is_said_once() {
    let port = TcpListener::bind("127.0.0.1:0").expect("bind").local_addr().expect("address").port();
    let found = diagnose(&["--only", "deployment", "--url", &format!("http://127.0.0.1:{port}")]);
    found.assert("deployment", "workers", "fail", &["does not serve", "refused"]);
    found.assert("deployment", "kv-moved", "skipped", &["see workers"]);
    assert_eq!(found.named("fail").len(), 1);
}
