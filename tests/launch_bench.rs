//! `pdlink bench serve` against real processes: a fleet of reference engines that it starts, one that runs, a plain server.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

fn pdlink(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
    command
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("PDLINK_SECRET_FILE")
        .env_remove("PDLINK_ADMIN_TOKEN")
        .stdin(Stdio::null());
    command
}

/// Runs the scenario, small, and reads its report.
fn bench(folder: &Path, args: &[&str]) -> (Output, Value) {
    let file = folder.join("report.json");
    let small = ["--prompt-tokens", "20,100", "--requests", "6", "--warm-up", "1", "--output-tokens", "8"];
    let json = ["--json", file.to_str().expect("UTF-8")];
    let output = pdlink(&["bench", "serve"]).args(small).args(json).args(args).output().expect("run pdlink");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
    let report = serde_json::from_str(&std::fs::read_to_string(&file).expect("a report")).expect("JSON");
    (output, report)
}

fn rows(report: &Value) -> &[Value] {
    report["levels"][0]["rows"].as_array().expect("rows")
}

#[test]
fn a_deployment_is_started_measured_and_ended_with_the_hand_offs_part() {
    let folder = tempfile::tempdir().expect("folder");
    let logs = folder.path().join("logs");
    let log_dir = ["--launcher.log_dir", logs.to_str().expect("UTF-8")];
    let args = [&["@", "configs/debug/local.toml", "--concurrency", "1,3"][..], &log_dir].concat();
    let (output, report) = bench(folder.path(), &args);
    assert_eq!(rows(&report).len(), 4, "two lengths at two loads: {report:#}");
    for row in rows(&report) {
        assert_eq!((&row["server"], &row["requests"], &row["errors"]), (&"deployment".into(), &6.into(), &0.into()));
        assert_eq!(row["prompt_tokens"].as_f64(), row["prompt_tokens_seen"].as_f64(), "token ids are exact: {row:#}");
        let hand_off = &row["hand_off"];
        assert_eq!(row["hand_offs_missed"], 0, "{row:#}");
        assert_eq!((&hand_off["transfers"], &hand_off["paths"]["shm"]), (&6.into(), &6.into()), "{row:#}");
        let quantile = |of: &Value, name: &str| of[name].as_f64().expect("a number");
        for times in [&row["ttft_ms"], &row["itl_ms"]] {
            assert!(
                quantile(times, "median") <= quantile(times, "p90") && quantile(times, "p90") <= quantile(times, "p99")
            );
        }
        assert!(quantile(&hand_off["share_of_ttft"], "median") > 0.0, "{row:#}");
        assert!(hand_off["bytes_mean"].as_f64() > Some(0.0) && row["tokens_per_second"].as_f64() > Some(0.0));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("deployment ready after") && text.contains("of TTFT p50"), "{text}");
}

/// A server of ours; ended when dropped.
struct Engine {
    child: Child,
    url: String,
}

impl Engine {
    fn start() -> Self {
        // Port 0: whatever is free, as its ready line says.
        let mut child = pdlink(&["engine", "--role", "both", "--port", "0"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the engine");
        let lines = BufReader::new(child.stdout.take().expect("stdout")).lines();
        let ready = lines.map_while(Result::ok).find(|line| line.starts_with("ready: ")).expect("it serves");
        let url = ready.split(' ').nth(1).expect("an address").to_owned();
        Self { child, url }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn servers_that_run_are_measured_side_by_side() {
    let folder = tempfile::tempdir().expect("folder");
    let (one, other) = (Engine::start(), Engine::start());
    let args = ["--url", &one.url, "--baseline-url", &other.url, "--rate", "200", "--text"];
    let (output, report) = bench(folder.path(), &args);
    let servers: Vec<&str> = rows(&report).iter().filter_map(|row| row["server"].as_str()).collect();
    assert_eq!(servers, ["deployment", "baseline", "deployment", "baseline"]);
    for row in rows(&report) {
        assert_eq!((&row["requests"], &row["load"], &row["hand_off"]), (&6.into(), &"200/s".into(), &Value::Null));
        assert!(row["prompt_tokens_seen"].as_f64() >= Some(20.0), "{row:#}");
    }
    assert!(String::from_utf8_lossy(&output.stdout).contains("no records of hand-offs"));
}

#[test]
fn records_behind_a_token_or_on_another_port_are_found_or_the_flag_is_named() {
    let folder = tempfile::tempdir().expect("folder");
    let logs = folder.path().join("logs");
    let admin = free_address();
    let log_dir = ["--launcher.log_dir", logs.to_str().expect("UTF-8")];
    let apart = ["--proxy.admin_listen", &admin, "--proxy.admin_token", "sesame"];
    let small = ["@", "configs/debug/local.toml", "--concurrency", "1"];
    // Of a deployment that is started here the settings are known.
    let (_, report) = bench(folder.path(), &[&small[..], &log_dir, &apart].concat());
    assert!(rows(&report).iter().all(|row| row["hand_off"]["transfers"] == 6), "{report:#}");

    let mut up = pdlink(&[&["up", "--json"][..], &small[..2], &log_dir, &apart].concat())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("start a fleet");
    let lines = BufReader::new(up.stdout.take().expect("stdout")).lines().map_while(Result::ok);
    let mut events = lines.filter_map(|line| serde_json::from_str::<Value>(&line).ok());
    let ready = events.find(|event| event["event"] == "ready").expect("it serves");
    let up = Engine { child: up, url: ready["base_url"].as_str().expect("an address").to_owned() };
    let admin = format!("http://{admin}");
    let told = |more: &[&str]| {
        let (output, report) = bench(folder.path(), &[&["--url", &up.url, "--concurrency", "1"], more].concat());
        let found = rows(&report)[0]["hand_off"]["transfers"].as_u64();
        (found, String::from_utf8_lossy(&output.stdout).into_owned())
    };
    for (more, want) in [
        (&[][..], "(`proxy.admin_listen`) by --admin-url"),
        (&["--admin-url", &admin], "give the token of `proxy.admin_token` by --admin-token"),
        (&["--admin-url", &admin, "--admin-token", "please"], "the token is not that of `proxy.admin_token`"),
    ] {
        let (found, said) = told(more);
        assert!(found.is_none() && said.contains(want), "{want} in: {said}");
    }
    let (found, said) = told(&["--admin-url", &admin, "--admin-token", "sesame"]);
    assert!(found == Some(6) && !said.contains("could not be read"), "{said}");
    // As `up` itself is ended: its workers go with it.
    let _ = Command::new("kill").args(["-TERM", &up.child.id().to_string()]).status();
    let mut up = up;
    let _ = up.child.wait();
}

fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").to_string()
}

#[test]
fn what_makes_no_sense_is_refused() {
    for (args, want) in [
        (&["bench", "serve"][..], "nothing to measure"),
        (&["bench", "serve", "--url", "http://127.0.0.1:1", "@", "configs/debug/local.toml"], "give one of the two"),
        (&["bench", "serve", "--url", "http://127.0.0.1:1", "--rate", "0"], "--rate must be above 0"),
    ] {
        let output = pdlink(args).output().expect("run pdlink");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(want), "{want} in: {said}");
    }
    let nobody = pdlink(&["bench", "serve", "--url", "http://127.0.0.1:1"]).output().expect("run pdlink");
    let said = String::from_utf8_lossy(&nobody.stderr);
    assert!(nobody.status.code() == Some(1) && said.contains("127.0.0.1:1"), "{said}");
}
