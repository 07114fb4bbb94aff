//! The deployment that is asked: one that runs, or one that `pdlink up` starts for the occasion.

use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::Signal;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::bench::process;

/// How long a deployment that we started may take to end: drain, grace, and some more.
const END_MAX: Duration = Duration::from_secs(120);

/// A deployment that takes requests.
#[derive(Debug)]
pub(in crate::bench) struct Deployment {
    address: String,
    started: Option<Started>,
}

/// `pdlink up`, a child of ours.
#[derive(Debug)]
struct Started {
    child: Child,
    // Reads on what it prints, so that its pipe never fills.
    _reader: JoinSet<()>,
}

impl Deployment {
    pub(in crate::bench) fn running(url: &str) -> anyhow::Result<Self> {
        Ok(Self { address: address_of(url)?, started: None })
    }

    /// Starts `pdlink up` and waits until it takes requests; its errors come on our stderr.
    pub(in crate::bench) async fn start(
        arguments: &[OsString],
        within: Duration,
        tell: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("up")
            .args(arguments)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start `pdlink up`")?;
        let mut lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        let ready = timeout(within, until_ready(&mut lines, tell)).await;
        let url = ready.with_context(|| format!("the deployment was not ready within {} s", within.as_secs()))??;
        let mut reader = JoinSet::new();
        reader.spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Ok(Self { address: address_of(&url)?, started: Some(Started { child, _reader: reader }) })
    }

    /// `host:port` of its proxy.
    pub(in crate::bench) fn address(&self) -> &str {
        &self.address
    }

    /// Ends what was started; a deployment that ran before runs on.
    pub(in crate::bench) async fn end(self) -> anyhow::Result<()> {
        let Some(mut started) = self.started else { return Ok(()) };
        if let Some(pid) = started.child.id().and_then(|pid| i32::try_from(pid).ok()) {
            process::signal(pid, Signal::TERM);
        }
        let ended = timeout(END_MAX, started.child.wait()).await;
        let status = ended.context("the deployment did not end after SIGTERM")??;
        if !status.success() {
            bail!("`pdlink up` ended with {status}");
        }
        Ok(())
    }
}

/// The base URL of the ready event. What happens before is told as it comes.
async fn until_ready(lines: &mut Lines<BufReader<ChildStdout>>, tell: &mut dyn FnMut(&str)) -> anyhow::Result<String> {
    while let Some(line) = lines.next_line().await? {
        let Ok(event) = serde_json::from_str::<Value>(&line) else { continue };
        let seconds = |name: &str| event[name].as_f64().unwrap_or_default() / 1000.0;
        match event["event"].as_str() {
            Some("worker_ready") => {
                let worker = event["worker"].as_str().unwrap_or_default();
                tell(&format!("  {worker} ready after {:.1} s\n", seconds("took_ms")));
            }
            Some("ready") => {
                let url = event["base_url"].as_str().context("the ready event has no base_url")?;
                tell(&format!("  deployment ready after {:.1} s: {url}\n", seconds("took_ms")));
                return Ok(url.to_owned());
            }
            _ => {}
        }
    }
    bail!("`pdlink up` ended before it was ready")
}

/// `host:port` of `http://host:port/v1`, or of `host:port` alone.
pub fn address_of(url: &str) -> anyhow::Result<String> {
    let bare = url.trim_end_matches('/').trim_end_matches("/v1");
    let address = bare.strip_prefix("http://").unwrap_or(bare);
    let port =
        address.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>().ok())?);
    if address.contains('/') || port.is_none() {
        bail!("`{url}` is no address to measure; write http://HOST:PORT (TLS is not spoken here)");
    }
    Ok(address.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_from_urls() {
        for (url, want) in [
            ("http://127.0.0.1:8000/v1", Some("127.0.0.1:8000")),
            ("http://[::1]:8000/", Some("[::1]:8000")),
            ("node-7:80", Some("node-7:80")),
            ("https://host:443", None),
            ("http://host", None),
            ("http://host:80/elsewhere", None),
            (":80", None),
        ] {
            assert_eq!(address_of(url).ok().as_deref(), want, "case: {url}");
        }
    }
}
