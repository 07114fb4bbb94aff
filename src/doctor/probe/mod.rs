//! This program once more, for what may harm the process that asks: a library that is not ours, memory that may not be read.
//!
//! The order is one line of JSON on the other's standard input, answers are lines of its output behind a mark, because libraries
//! print there too. What it says on its error output is kept: libraries explain themselves there. It ends when its input
//! closes, and is killed when nobody wants it any more.

mod orders;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub(super) use orders::{NcclFound, NixlFound, NixlWish, Order};

/// Longest for what takes a moment.
pub(super) const SHORT: Duration = Duration::from_secs(4);

/// Name of the hidden subcommand that calls [`serve`].
pub const SUBCOMMAND: &str = "doctor-probe";

const MARK: &str = "pdlink-probe ";
/// What is kept of each line, and of lines, that a library prints.
const SAID_BYTES_MAX: usize = 16 << 10;
/// What of it is shown with an error.
const SHOWN_CHARS: usize = 300;

#[derive(Debug, Serialize, Deserialize)]
enum Said<T> {
    Answer(T),
    Failed(String),
}

/// The other process, seen from here. Ended when dropped.
pub(super) struct Probe {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    stderr: Arc<Mutex<String>>,
    stderr_ended: Receiver<()>,
}

/// Asks one question, with these variables in the environment over ours.
pub(super) fn ask<T: DeserializeOwned>(
    order: &Order,
    env: &[(String, String)],
    patience: Duration,
) -> anyhow::Result<T> {
    Probe::start(order, env)?.answer(patience)
}

impl Probe {
    pub(super) fn start(order: &Order, env: &[(String, String)]) -> anyhow::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        // Each worker gets its own; GPU ids of a configuration count among all.
        command.env_remove("CUDA_VISIBLE_DEVICES").env("CUDA_DEVICE_ORDER", "PCI_BUS_ID");
        let mut child = command
            .arg(SUBCOMMAND)
            .envs(env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting another process of pdlink")?;
        let stdin = child.stdin.take();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let stdout = stdout.context("no way to hear the other process")?;
        let stderr = stderr.context("no way to hear the other process")?;
        let (lines, (stderr, stderr_ended)) = (answers(stdout)?, text(stderr)?);
        let mut probe = Self { child, stdin, lines, stderr, stderr_ended };
        probe.send(order)?;
        Ok(probe)
    }

    /// Tells it something on a line of its own.
    pub(super) fn send(&mut self, what: &impl Serialize) -> anyhow::Result<()> {
        let stdin = self.stdin.as_mut().context("no way to tell the other process anything")?;
        // One that has ended is found out when its answer is waited for.
        let _ = writeln!(stdin, "{}", serde_json::to_string(what)?);
        Ok(())
    }

    /// Its next answer.
    pub(super) fn answer<T: DeserializeOwned>(&mut self, patience: Duration) -> anyhow::Result<T> {
        match self.lines.recv_timeout(patience) {
            Ok(line) => match serde_json::from_str(&line).context("the other process said something else")? {
                Said::Answer(answer) => Ok(answer),
                Said::Failed(why) => Err(anyhow!(why)),
            },
            Err(RecvTimeoutError::Timeout) => {
                bail!("no answer within {:.0} s{}", patience.as_secs_f64(), self.shown())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait()?;
                // What it said last is still on its way.
                let _ = self.stderr_ended.recv_timeout(SHORT);
                bail!("the process that tried it ended: {}{}", how(status), self.shown())
            }
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it and its libraries have said so far on their error output.
    pub(super) fn said(&self) -> String {
        self.stderr.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn shown(&self) -> String {
        let said = self.said();
        let last: Vec<&str> = said.lines().filter(|line| !line.trim().is_empty()).collect();
        let Some(last) = last.last() else { return String::new() };
        format!("; it said: {}", last.chars().take(SHOWN_CHARS).collect::<String>())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // Closing its input ends it; the kill is for one that hangs.
        drop(self.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn how(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    status.signal().map_or_else(|| status.to_string(), |signal| format!("killed by signal {signal}"))
}

/// Marked lines of its output, without the mark. Ends with the process.
fn answers(stdout: ChildStdout) -> anyhow::Result<Receiver<String>> {
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new().name("probe-out".to_owned()).spawn(move || {
        let lines = BufReader::new(stdout).lines().map_while(Result::ok);
        for answer in lines.filter_map(|line| line.strip_prefix(MARK).map(str::to_owned)) {
            if tell.send(answer).is_err() {
                return;
            }
        }
    })?;
    Ok(told)
}

type Text = (Arc<Mutex<String>>, Receiver<()>);

/// What it says on its error output, as far as it fits, and its end.
fn text(mut stderr: ChildStderr) -> anyhow::Result<Text> {
    let text = Arc::new(Mutex::new(String::new()));
    let (kept, (tell, told)) = (text.clone(), mpsc::channel());
    std::thread::Builder::new().name("probe-err".to_owned()).spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(len @ 1..) = stderr.read(&mut piece) {
            let mut text = kept.lock().unwrap_or_else(PoisonError::into_inner);
            if text.len() < SAID_BYTES_MAX {
                text.push_str(&String::from_utf8_lossy(&piece[..len]));
            }
        }
        drop(tell);
    })?;
    Ok((text, told))
}

/// The other process: reads its order, and tells what came of it.
pub fn serve() -> anyhow::Result<()> {
    let line = next_line()?.unwrap_or_default();
    orders::obey(serde_json::from_str(&line).context("this command is started by `pdlink doctor`")?)
}

/// What it is told next; `None`: to end.
fn next_line() -> anyhow::Result<Option<String>> {
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line)?;
    Ok((read > 0).then_some(line))
}

fn tell<T: Serialize>(answer: anyhow::Result<T>) -> anyhow::Result<()> {
    let said = match answer {
        Ok(answer) => Said::Answer(answer),
        Err(error) => Said::Failed(format!("{error:#}")),
    };
    // On a line of its own, whatever a library has left unfinished.
    println!("\n{MARK}{}", serde_json::to_string(&said)?);
    Ok(std::io::stdout().flush()?)
}

fn until_told_to_end() -> anyhow::Result<()> {
    std::io::stdin().lock().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// A process that keeps a byte for others to read.
pub(super) struct Held {
    pub(super) pid: u32,
    pub(super) address: u64,
    _probe: Probe,
}

impl Held {
    pub(super) fn start() -> anyhow::Result<Self> {
        let mut probe = Probe::start(&Order::HoldMemory, &[])?;
        let address = probe.answer(SHORT)?;
        Ok(Self { pid: probe.pid(), address, _probe: probe })
    }
}
