//! Several hosts on one machine: two that prefill, two that decode, one with the proxy; cables that are pulled, hosts that die
//! and come back, packets that are late or lost. Real processes, real traffic, every answer held against one engine's.

#[path = "support/launch.rs"]
mod launch;
#[path = "support/netns.rs"]
mod netns;

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use launch::{Process, Up, all_end, descendants};
use netns::{Network, address, in_a_network_of_its_own};
use reqwest::Client;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::task::JoinSet;

/// Bound of every wait: far above what anything here takes on a busy machine, and far below the deadlines that would end a request
/// whose peer's death nobody noticed.
const PATIENCE: Duration = Duration::from_secs(90);

/// Deadlines that no request here may need: who is gone must be noticed, not waited for.
const LONG: &str = "[proxy]\nadmin_token = \"t\"\nprefill_timeout_s = 900\nfirst_byte_timeout_s = 900\nidle_timeout_s = 900\n\
    dead_after_s = 4\nattempts_max = 3\n[kv]\ntransfer_timeout_ms = 900000\nlease_ms = 901000\ndigest = \"every\"\n";

/// Nodes 1 and 2 prefill, 3 and 4 decode, 0 has the proxy.
fn config(hosts: &str) -> String {
    let node = |(rank, list): (usize, &str)| format!("[[hosts.nodes]]\naddress = \"{}\"\n{list}\n", address(rank));
    let lists = ["", "prefill_gpu_ids = [0]", "prefill_gpu_ids = [0]", "decode_gpu_ids = [0]", "decode_gpu_ids = [0]"];
    let nodes: String = lists.into_iter().enumerate().map(node).collect();
    format!(
        "[inference]\nengine = \"reference\"\n[pd_disagg]\nenabled = true\nhost = \"{}\"\n{LONG}[launcher]\n\
         restart_backoff_s = 0.1\ndrain_s = 20\ngrace_s = 5\n[hosts]\nkv_interface = \"10.78.0.0/24\"\nlost_after_s = 2\n{hosts}\n{nodes}",
        address(0)
    )
}

fn start(command: &mut Command) -> Up {
    let mut up = Up::start(command.stdin(Stdio::null()));
    up.patience = PATIENCE;
    up
}

/// Waits for the next event of this name that is about this worker.
fn event_of(node: &mut Up, name: &str, worker: &str) {
    while node.event(name)["worker"] != worker {}
}

/// Ends a node and everything it started, as a power cut does.
fn cut_power(node: &Up) {
    let mut all = descendants(node.pid());
    all.extend(Process::of(node.pid().as_raw_pid()));
    all.iter().for_each(|process| process.kill());
    all.retain(|process| process.is_alive());
    all_end(&all);
}

/// The run: five hosts, and a launcher on each.
struct Fleet {
    nodes: Vec<Up>,
    /// Overrides of every node.
    overrides: &'static [&'static str],
    network: Network,
    folder: tempfile::TempDir,
}

impl Fleet {
    /// The hosts, with nothing on them yet.
    fn of(hosts: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("run.toml"), config(hosts)).unwrap();
        let fleet = Self { nodes: Vec::new(), overrides: &[], network: Network::of(5), folder };
        fleet.secret("secret", '7');
        fleet
    }

    fn secret(&self, name: &str, digit: char) -> PathBuf {
        let path = self.folder.path().join(name);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
        file.write_all(digit.to_string().repeat(64).as_bytes()).unwrap();
        path
    }

    /// All launchers, ready.
    fn up(hosts: &str) -> (Self, Value) {
        Self::up_with(hosts, &[])
    }

    fn up_with(hosts: &str, overrides: &'static [&'static str]) -> (Self, Value) {
        let mut fleet = Self { overrides, ..Self::of(hosts) };
        fleet.nodes = (0..5).map(|rank| fleet.start(rank)).collect();
        let ready = fleet.nodes[0].event("ready");
        (fleet, ready)
    }

    fn command(&self, rank: usize) -> Command {
        let mut command = self.network.hosts[rank].command(env!("CARGO_BIN_EXE_pdlink").as_ref());
        let path = |name: &str| self.folder.path().join(name).to_string_lossy().into_owned();
        command
            .args(["up", "@", &path("run.toml"), "--node", &rank.to_string(), "--json"])
            .args(["--launcher.log_dir", &path(&format!("logs{rank}"))])
            .args(self.overrides)
            .current_dir(self.folder.path())
            .env("PDLINK_SECRET_FILE", path("secret"));
        command
    }

    fn start(&self, rank: usize) -> Up {
        start(&mut self.command(rank))
    }

    /// What the proxy knows of its workers, by URL.
    async fn workers(&self) -> Vec<Value> {
        let url = format!("http://{}:8000/admin/workers", address(0));
        let answer = Client::new().get(url).bearer_auth("t").timeout(PATIENCE).send().await.unwrap();
        answer.json::<Value>().await.unwrap()["workers"].as_array().unwrap().clone()
    }

    async fn metrics(&self) -> String {
        let url = format!("http://{}:8000/metrics", address(0));
        Client::new().get(url).timeout(PATIENCE).send().await.unwrap().text().await.unwrap()
    }

    async fn served(&self, rank: usize) -> u64 {
        let workers = self.workers().await;
        let own =
            workers.iter().find(|worker| worker["url"].as_str().unwrap().contains(&format!("{}:", address(rank))));
        own.unwrap()["served"].as_u64().unwrap()
    }

    /// Waits until the worker of this host answers requests, from now on.
    async fn takes_part(&self, rank: usize) {
        let before = self.served(rank).await;
        let deadline = Instant::now() + PATIENCE;
        while self.served(rank).await <= before {
            assert!(Instant::now() < deadline, "host {rank} gets no requests");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Clients that ask all the time, and hold each answer against one engine's.
struct Load {
    stop: Arc<AtomicBool>,
    right: Arc<AtomicUsize>,
    clients: JoinSet<Vec<String>>,
    _oracle: Up,
}

const CLIENTS: usize = 6;

impl Load {
    async fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
        command.args(["engine", "--role", "both", "--port", &port.to_string(), "--model", "pdlink-reference"]);
        let mut oracle = start(command.env_remove("PDLINK_SECRET_FILE"));
        oracle.line_with("ready: http");
        let (stop, right) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let (stop, right) = (Arc::clone(&stop), Arc::clone(&right));
            let urls = [format!("http://{}:8000", address(0)), format!("http://127.0.0.1:{port}")];
            clients.spawn(async move {
                let mut faults = Vec::new();
                let http = Client::new();
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    match compare(&http, &urls, client, number).await {
                        Ok(()) => _ = right.fetch_add(1, Ordering::Relaxed),
                        Err(fault) => faults.push(fault),
                    }
                }
                faults
            });
        }
        Self { stop, right, clients, _oracle: oracle }
    }

    /// Waits for so many more right answers.
    async fn goes_on(&self, answers: usize) {
        let (from, deadline) = (self.right.load(Ordering::Relaxed), Instant::now() + PATIENCE);
        while self.right.load(Ordering::Relaxed) < from + answers {
            assert!(Instant::now() < deadline, "the clients got {} answers", self.right.load(Ordering::Relaxed) - from);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Every answer must have been right.
    async fn end(mut self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let mut faults = Vec::new();
        while let Some(client) = self.clients.join_next().await {
            faults.extend(client.unwrap());
        }
        let right = self.right.load(Ordering::Relaxed);
        assert!(faults.is_empty(), "{} of {} failed:\n{}", faults.len(), faults.len() + right, faults.join("\n"));
        right
    }
}

/// One prompt that nobody has asked before, of some blocks.
async fn compare(http: &Client, urls: &[String; 2], client: usize, number: usize) -> Result<(), String> {
    let prompt = format!("client {client} asks {number}: {}", "and so on ".repeat(10 + (client * 7 + number) % 60));
    let body = json!({ "model": "pdlink-reference", "prompt": prompt, "max_tokens": 8, "temperature": 0 }).to_string();
    let mut choices = Vec::new();
    for url in urls {
        let request = http.post(format!("{url}/v1/completions")).header("content-type", "application/json");
        let began = Instant::now();
        let answer = request.body(body.clone()).timeout(PATIENCE).send().await;
        let said = match answer {
            Ok(answer) => (answer.status().as_u16(), answer.text().await.unwrap_or_else(|error| error.to_string())),
            Err(error) => (0, format!("{error:?}")),
        };
        let parsed: Value = serde_json::from_str(&said.1).unwrap_or_default();
        if said.0 != 200 || !parsed["choices"].is_array() {
            return Err(format!("{url} after {:?}: {} {}", began.elapsed(), said.0, said.1));
        }
        choices.push(parsed["choices"].clone());
    }
    if choices[0] == choices[1] { Ok(()) } else { Err(format!("wrong: {} for {}", choices[0], choices[1])) }
}

fn inside(name: &str, body: impl AsyncFnOnce()) {
    in_a_network_of_its_own(name, || {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(body());
    });
}

#[test]
fn five_hosts_serve_by_the_network_of_kv_and_end_together() {
    inside("five_hosts_serve_by_the_network_of_kv_and_end_together", async || {
        let (mut fleet, ready) = Fleet::up("");
        // Nothing is shared between hosts, whatever the kernel would allow.
        assert_eq!((&ready["prefill"], &ready["decode"], &ready["paths"]), (&json!(2), &json!(2), &json!(["tcp"])));
        let load = Load::start().await;
        load.goes_on(40).await;
        for rank in 1..5 {
            fleet.takes_part(rank).await;
        }
        println!("{} right answers", load.end().await);
        let page = fleet.metrics().await;
        for worker in ["prefill_0", "prefill_1", "decode_0", "decode_1"] {
            for line in ["worker_starts_total", "worker_ready"] {
                let line = format!("pdlink_launcher_{line}{{worker=\"{worker}\"}} 1");
                assert!(page.contains(&line), "no {line} in {page}");
            }
        }
        for (worker, rank) in fleet.workers().await.iter().zip(1..) {
            let kv = worker["kv_addr"].as_str().unwrap();
            assert!(kv.starts_with(&format!("10.78.0.{}:", rank + 1)), "{kv}");
        }
        fleet.nodes[0].signal(Signal::TERM);
        for (rank, node) in fleet.nodes.iter_mut().enumerate() {
            let (status, said) = node.end();
            assert!(status.success(), "node {rank}: {said}");
            assert!(rank == 0 || said.contains("node 0 was asked to end"), "node {rank}: {said}");
        }
    });
}

#[test]
fn every_node_shows_the_plan_of_all() {
    inside("every_node_shows_the_plan_of_all", async || {
        let fleet = Fleet::of("");
        let output = fleet.command(3).arg("--dry-run").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        let plan: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
        let places: Vec<String> =
            plan["workers"].as_array().unwrap().iter().map(|w| w["url"].as_str().unwrap().to_owned()).collect();
        let want = [(1, 8100), (2, 8101), (3, 8200), (4, 8201)];
        assert_eq!(places, want.map(|(rank, port)| format!("http://{}:{port}", address(rank))));
        assert_eq!(plan["nodes"][3]["kv_address"], "10.78.0.4", "its own choice by kv_interface");
        assert_eq!(plan["workers"][2]["node"], 3);
    });
}

#[test]
// KV-8, PX-2.
fn kv_8_px_2_a_pulled_cable_and_a_dead_host_cost_no_answer_and_both_come_back() {
    inside("kv_8_px_2_a_pulled_cable_and_a_dead_host_cost_no_answer_and_both_come_back", async || {
        let (mut fleet, _) = Fleet::up("node0_timeout_s = 600\n");
        let load = Load::start().await;
        load.goes_on(20).await;

        for (rank, worker) in [(1, "prefill_0"), (3, "decode_0")] {
            // No word from it any more: neither to node 0, nor to its peers, nor to the proxy.
            fleet.network.hosts[rank].unplug();
            assert_eq!(fleet.nodes[0].event("node_lost")["node"], rank);
            fleet.nodes[rank].event("node0_away");
            load.goes_on(40).await;
            fleet.network.hosts[rank].plug_in();
            event_of(&mut fleet.nodes[0], "worker_ready", worker);
            fleet.nodes[rank].event("node0_back");
            fleet.takes_part(rank).await;
        }
        for (rank, worker) in [(2, "prefill_1"), (4, "decode_1")] {
            // The power fails: its processes go without a word to anybody.
            fleet.network.hosts[rank].unplug();
            cut_power(&fleet.nodes[rank]);
            assert_eq!(fleet.nodes[0].event("node_lost")["node"], rank);
            load.goes_on(40).await;
            fleet.network.hosts[rank].plug_in();
            fleet.nodes[rank] = fleet.start(rank);
            assert_eq!(fleet.nodes[0].event("node_joined")["node"], rank);
            event_of(&mut fleet.nodes[0], "worker_ready", worker);
            fleet.takes_part(rank).await;
        }
        // KV alone has no way to a host that answers everything else.
        fleet.network.hosts[2].cable("k", "down");
        load.goes_on(40).await;
        fleet.network.hosts[2].cable("k", "up");
        fleet.takes_part(2).await;
        for rank in [1, 4] {
            // Its processes are killed, and the kernel says so to everybody.
            cut_power(&fleet.nodes[rank]);
            assert_eq!(fleet.nodes[0].event("node_lost")["node"], rank);
            load.goes_on(20).await;
            fleet.nodes[rank] = fleet.start(rank);
            fleet.takes_part(rank).await;
        }
        println!("{} right answers", load.end().await);
    });
}

#[test]
fn late_and_lost_packets_cost_no_answer() {
    inside("late_and_lost_packets_cost_no_answer", async || {
        // Both legs at once, so that KV is pushed in parts while packets are late.
        let (fleet, _) = Fleet::up_with("", &["--proxy.dispatch", "concurrent"]);
        let load = Load::start().await;
        load.goes_on(20).await;
        let _spoiled = [fleet.network.hosts[1].spoil(20, 3), fleet.network.hosts[4].spoil(20, 3)];
        load.goes_on(60).await;
        for rank in [1, 4] {
            fleet.takes_part(rank).await;
        }
        println!("{} right answers", load.end().await);
    });
}

#[test]
fn a_node_leaves_in_order_and_what_does_not_belong_is_refused() {
    inside("a_node_leaves_in_order_and_what_does_not_belong_is_refused", async || {
        let (mut fleet, _) = Fleet::up("");
        let load = Load::start().await;
        load.goes_on(20).await;
        // Maintenance: no request is lost by it, and the host comes back.
        fleet.nodes[3].signal(Signal::TERM);
        let (status, said) = fleet.nodes[3].end();
        assert!(status.success() && !said.contains("still in flight"), "{said}");
        fleet.nodes[0].event("node_left");
        load.goes_on(20).await;
        fleet.nodes[3] = fleet.start(3);
        fleet.takes_part(3).await;
        println!("{} right answers", load.end().await);

        let refused = |command: &mut Command, want: &str| {
            let (status, said) = start(command).ended();
            assert!(!status.success() && said.contains(want), "{want}: {said}");
        };
        refused(
            fleet.command(1).args(["--model.name", "other"]),
            "another configuration: model other, where node 0 has",
        );
        refused(
            fleet.command(1).args(["--hosts.join_timeout_s", "3"]),
            "node 1 is here, at 10.77.0.2; each node is started once",
        );
        let wrong = fleet.secret("wrong", '8');
        let lone =
            fleet.command(1).args(["--hosts.join_timeout_s", "3"]).env("PDLINK_SECRET_FILE", wrong).output().unwrap();
        let said = String::from_utf8_lossy(&lone.stderr);
        assert!(said.contains("does not hold this run's secret") && said.contains("10.77.0.1:14570"), "{said}");
        let none = fleet.command(1).env_remove("PDLINK_SECRET_FILE").output().unwrap();
        assert!(String::from_utf8_lossy(&none.stderr).contains("security.secret_file"));
    });
}

#[test]
fn without_node_0_the_others_keep_their_workers_for_its_return_and_end_when_it_stays_away() {
    inside("without_node_0_the_others_keep_their_workers_for_its_return_and_end_when_it_stays_away", async || {
        let (mut fleet, _) = Fleet::up("node0_timeout_s = 15\n");
        let before: Vec<_> = (1..5).map(|rank| descendants(fleet.nodes[rank].pid())).collect();
        cut_power(&fleet.nodes[0]);
        fleet.nodes[1].event("node0_away");
        fleet.nodes[0] = fleet.start(0);
        fleet.nodes[0].event("ready");
        let after: Vec<_> = (1..5).map(|rank| descendants(fleet.nodes[rank].pid())).collect();
        assert_eq!(before, after, "the same processes serve on");
        let load = Load::start().await;
        load.goes_on(20).await;
        println!("{} right answers", load.end().await);

        cut_power(&fleet.nodes[0]);
        for rank in 1..5 {
            let (status, said) = fleet.nodes[rank].end();
            assert!(!status.success() && said.contains("node 0 (10.77.0.1:14570) has been away for 15 s"), "{said}");
        }
        after.iter().for_each(all_end);
        // And one that nobody joins says whom it misses.
        let alone = start(fleet.command(0).args(["--hosts.join_timeout_s", "1"]));
        let (status, said) = alone.ended();
        assert!(!status.success() && said.contains("node 1 (10.77.0.2), node 2 (10.77.0.3)"), "{said}");
        assert!(said.contains("from there 10.77.0.1:14570 must be reachable"), "{said}");
    });
}
