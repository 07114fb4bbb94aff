//! The processes under soak: one single engine that knows the right answers, and one `pdlink up`.

use std::ffi::OsString;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::bench::{client, process};

const START_MAX: Duration = Duration::from_secs(30);
const STOP_MAX: Duration = Duration::from_secs(20);

/// A child of ours, ended with its whole tree when dropped.
#[derive(Debug)]
pub(super) struct Started {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// `host:port` of its HTTP server.
    pub(super) addr: String,
}

impl Started {
    fn spawn(arguments: &[OsString]) -> anyhow::Result<(Child, Lines<BufReader<ChildStdout>>)> {
        let program = std::env::current_exe()?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start pdlink with {arguments:?}"))?;
        let lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        Ok((child, lines))
    }

    /// Starts the single engine on a free port.
    pub(super) async fn single_engine(model: &str) -> anyhow::Result<Self> {
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let arguments = ["engine", "--role", "both", "--port", &port.to_string(), "--model", model];
        let (child, lines) = Self::spawn(&arguments.map(OsString::from))?;
        let addr = format!("127.0.0.1:{port}");
        let started = Instant::now();
        while client::get_text(&addr, "/health", Duration::from_secs(1)).await.is_err() {
            if started.elapsed() > START_MAX {
                bail!("the single engine was not ready within {START_MAX:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Self { child, lines, addr })
    }

    /// Starts `pdlink up` with a configuration, and waits for its ready event.
    pub(super) async fn fleet(sources: &[OsString]) -> anyhow::Result<Self> {
        let mut arguments = vec![OsString::from("up")];
        arguments.extend_from_slice(sources);
        arguments.extend(["--json", "--launcher.restart", "on-failure"].map(OsString::from));
        let (child, mut lines) = Self::spawn(&arguments)?;
        let ready = timeout(START_MAX, ready_event(&mut lines)).await.context("the fleet was not ready in time")??;
        let url = ready["base_url"].as_str().context("the ready event has no base_url")?;
        let addr = url.trim_start_matches("http://").trim_end_matches("/v1").to_owned();
        Ok(Self { child, lines, addr })
    }

    pub(super) fn pid(&self) -> anyhow::Result<i32> {
        Ok(i32::try_from(self.child.id().context("it has ended")?)?)
    }

    /// Reads on what it prints, so that its pipe never fills.
    pub(super) async fn drain_output(&mut self) {
        while let Ok(Some(_)) = self.lines.next_line().await {}
    }

    /// Asks it to end and waits; true if it ended with status 0.
    pub(super) async fn stop(mut self) -> anyhow::Result<bool> {
        process::signal(self.pid()?, Signal::TERM);
        let ended = timeout(STOP_MAX, async {
            self.drain_output().await;
            self.child.wait().await
        });
        Ok(ended.await.context("it did not end after SIGTERM")??.success())
    }
}

async fn ready_event(lines: &mut Lines<BufReader<ChildStdout>>) -> anyhow::Result<Value> {
    while let Some(line) = lines.next_line().await? {
        match serde_json::from_str::<Value>(&line) {
            Ok(event) if event["event"] == "ready" => return Ok(event),
            _ => {}
        }
    }
    bail!("`pdlink up` ended before it was ready; run it by hand to see why")
}

/// `host:port` of every worker behind the proxy, in its order.
pub(super) async fn worker_addresses(proxy: &str, patience: Duration) -> anyhow::Result<Vec<String>> {
    let workers: Value = serde_json::from_str(&client::get_text(proxy, "/admin/workers", patience).await?)?;
    let workers = workers["workers"].as_array().context("/admin/workers has no list")?;
    let address = |worker: &Value| Some(worker["url"].as_str()?.trim_start_matches("http://").to_owned());
    workers.iter().map(|worker| address(worker).context("a worker has no url")).collect()
}

/// Pids of the reference engines below the launcher; their guards are not among them.
pub(super) fn workers(launcher: i32) -> Vec<i32> {
    let is_worker = |command: &[String]| command.get(1).is_some_and(|word| word == "engine");
    process::descendants(launcher)
        .into_iter()
        .filter(|process| is_worker(&process.command))
        .map(|process| process.pid)
        .collect()
}
