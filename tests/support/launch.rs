//! Runs `pdlink up` with a stand-in for vLLM, and watches it as a person or a system would.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Bound of every wait: far above what anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// `vllm` as the launcher sees it: answers `--version`, records how it was called, then becomes [`serve_as_stand_in`].
const STAND_IN: &str = r#"#!/bin/sh
if [ "$1" = "--version" ]; then echo "INFO: a line that is no version"; echo "${STAND_IN_VERSION:-0.33.0+stand.in}"; exit 0; fi
for word in "$@"; do
    if [ "$last" = "--port" ]; then port="$word"; fi
    last="$word"
done
export STAND_IN_PORT="$port"
printf '%s\n' "$@" > "$STAND_IN_RECORD/$port.argv"
env > "$STAND_IN_RECORD/$port.env"
echo "(EngineCore pid=7) INFO 11-22 21:10:28 [core.py:133] Initializing a V1 LLM engine (v0.33.0) with config: model='M'"
printf 'Loading safetensors checkpoint shards:   0%% Completed | 0/2\rLoading safetensors checkpoint shards: 100%% Completed | 2/2\n' >&2
if [ -n "$STAND_IN_FAILS" ]; then
    echo "(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906] Traceback (most recent call last):"
    echo "(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906] torch.OutOfMemoryError: CUDA out of memory."
    i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo "line $i"; done
    echo "Traceback (most recent call last):" >&2
    echo "RuntimeError: Engine core initialization failed. See root cause above." >&2
    exit 3
fi
if [ -n "$STAND_IN_CHILDREN" ]; then
    setsid sleep 600 & echo $! >> "$STAND_IN_RECORD/strays"
    (setsid sh -c 'trap "" TERM; sleep 600 & echo $! >> "$STAND_IN_RECORD/strays"; wait' &)
fi
if [ -n "$STAND_IN_STUBBORN" ]; then trap '' TERM; fi
echo "$$" > "$STAND_IN_RECORD/$port.pid"
if [ -n "$STAND_IN_SLOW" ]; then sleep 1; fi
echo "(EngineCore pid=7) INFO 11-22 21:10:29 [kv_cache_utils.py:2327] GPU KV cache size: 16,384 tokens"
if [ -n "$STAND_IN_SLOW" ]; then sleep 1; fi
exec "$STAND_IN_PROGRAM" --exact stand_in_for_vllm --nocapture --test-threads 1
"#;

/// A Python as the launcher asks it: answers with what STAND_IN_PACKAGES holds, or PYTHONPATH, as if that led elsewhere; and
/// runs the stand-in.
const PYTHON: &str = r#"#!/bin/sh
if [ "$1" = "-c" ]; then echo "a warning of some import"; echo "pdlink-asks ${PYTHONPATH:-$STAND_IN_PACKAGES}"; exit 0; fi
exec /bin/sh "$@"
"#;

/// The body of the test that the stand-in runs as its program.
pub(crate) fn serve_as_stand_in() {
    let Some(port) = std::env::var("STAND_IN_PORT").ok().and_then(|port| port.parse::<u16>().ok()) else { return };
    let listener = TcpListener::bind(("127.0.0.1", port)).expect("the port that was held for us");
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut line = String::new();
        let _ = BufReader::new(&stream).read_line(&mut line);
        let path = line.split(' ').nth(1).unwrap_or("");
        let (status, body) = match path {
            "/health" if std::env::var_os("STAND_IN_HANGS").is_some() => ("503 Service Unavailable", String::new()),
            "/health" => ("200 OK", String::new()),
            "/v1/models" => ("200 OK", r#"{"object":"list","data":[{"id":"M","object":"model"}]}"#.to_owned()),
            _ => ("404 Not Found", "{}".to_owned()),
        };
        let length = body.len();
        let _ = write!(stream, "HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
    }
}

/// A folder for one test: configuration, logs, temporary files, what the stand-in recorded.
pub(crate) struct Place {
    folder: TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["bin", "record", "tmp"] {
            std::fs::create_dir(folder.path().join(name)).expect("a folder in it");
        }
        let program = folder.path().join("bin/vllm");
        std::fs::write(&program, STAND_IN).expect("write the stand-in");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("make it executable");
        Self { folder }
    }

    /// Makes the stand-in a script of a Python, which says what STAND_IN_PACKAGES holds.
    pub(crate) fn with_python(self) -> Self {
        let python = self.path("bin/python3");
        let script = STAND_IN.replacen("#!/bin/sh", &format!("#!{}", python.display()), 1);
        for (path, text) in [(&python, PYTHON), (&self.path("bin/vllm"), &script)] {
            std::fs::write(path, text).expect("write a program");
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("make it executable");
        }
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn config(&self, text: &str) -> PathBuf {
        let path = self.path("run.toml");
        std::fs::write(&path, text).expect("write the configuration");
        path
    }

    /// One prefill and one decode worker of the stand-in, with KV left to the class that vLLM ships.
    pub(crate) fn stand_in_config(&self, more: &str) -> PathBuf {
        self.config(&format!(
            "{more}\n[inference]\nmodel = {{ name = \"M\" }}\n\
             [launcher]\ngrace_s = 5\nrestart_backoff_s = 0.05\nlog_dir = {:?}\n",
            self.path("logs")
        ))
    }

    /// What the stand-in recorded under this name, once it is there and complete.
    pub(crate) fn record(&self, name: &str) -> String {
        let path = self.path("record").join(name);
        let text = wait_for(|| std::fs::read_to_string(&path).ok().filter(|text| text.ends_with('\n')));
        text.unwrap_or_else(|| panic!("the stand-in recorded no {name}"))
    }

    /// The private folders of runs that use this place for temporary files.
    pub(crate) fn run_dirs(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(self.path("tmp")).expect("the folder is there");
        let runs = entries.flatten().map(|entry| entry.path());
        runs.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pdlink-"))).collect()
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(args)
            .current_dir(self.folder.path())
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("TMPDIR", self.path("tmp"))
            .env("STAND_IN_RECORD", self.path("record"))
            .env("STAND_IN_PROGRAM", std::env::current_exe().expect("this program"))
            .env_remove("PDLINK_SECRET_FILE")
            .env_remove("PYTHONPATH")
            .stdin(Stdio::null());
        command
    }

    /// Starts `pdlink up` and does not wait for it.
    pub(crate) fn up(&self, config: &Path, args: &[&str], env: &[(&str, &str)]) -> Up {
        let config = config.to_string_lossy();
        let mut command = self.command(&[&["up", "@", &config], args].concat());
        Up::start(command.envs(env.iter().copied()))
    }
}

/// A running `pdlink up`.
pub(crate) struct Up {
    child: Child,
    lines: Receiver<String>,
    pub(crate) seen: Vec<String>,
    /// Bound of each wait for a line.
    pub(crate) patience: Duration,
}

impl Up {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("start pdlink");
        let (sender, lines) = channel();
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().expect("stdout")), Box::new(child.stderr.take().expect("stderr"))];
        for stream in streams {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let lines = BufReader::new(stream).lines().map_while(Result::ok);
                lines.for_each(|line| drop(sender.send(line)));
            });
        }
        Self { child, lines, seen: Vec::new(), patience: PATIENCE }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The first line from now on that holds `text`.
    pub(crate) fn line_with(&mut self, text: &str) -> String {
        let deadline = Instant::now() + self.patience;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no line with {text:?} in time:\n{}", self.seen.join("\n")),
                Err(RecvTimeoutError::Disconnected) => panic!("ended without {text:?}:\n{}", self.seen.join("\n")),
            }
        }
    }

    /// The `http://…/v1` of the ready line.
    pub(crate) fn base_url(&mut self) -> String {
        let line = self.line_with("ready: http");
        line.split(' ').nth(1).expect("an address").to_owned()
    }

    /// HTTP ports of the workers, in the order of the plan, which is shown first.
    pub(crate) fn ports(&mut self) -> Vec<String> {
        if !self.seen.iter().any(|line| line.contains(" proxy ")) {
            self.line_with(" proxy ");
        }
        let rows = self.seen.iter().filter(|line| line.contains("_0 ") && line.contains("http://127.0.0.1:"));
        rows.filter_map(|row| row.split("http://127.0.0.1:").nth(1)?.split_whitespace().next().map(str::to_owned))
            .collect()
    }

    pub(crate) fn event(&mut self, name: &str) -> Value {
        let line = self.line_with(&format!("\"event\":\"{name}\""));
        serde_json::from_str(&line).expect("a JSON line")
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("signal our own child");
    }

    /// Waits for the end; the status and everything that was said.
    pub(crate) fn ended(mut self) -> (ExitStatus, String) {
        self.end()
    }

    /// The same of one that stays where it is.
    pub(crate) fn end(&mut self) -> (ExitStatus, String) {
        let status = wait_for(|| self.child.try_wait().expect("wait for our own child"));
        let status = status.unwrap_or_else(|| panic!("pdlink did not end:\n{}", self.seen.join("\n")));
        // Guards hold no end of these pipes, so they end with the launcher.
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            self.seen.push(line);
        }
        (status, self.seen.join("\n"))
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks again and again, within a bound.
pub(crate) fn wait_for<T>(mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A process, told from a later one with the same number by its start time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    started: String,
}

impl Process {
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let (state, started) = state_and_start(pid)?;
        (!matches!(state.as_str(), "Z" | "X")).then_some(Self { pid, started })
    }

    pub(crate) fn is_alive(&self) -> bool {
        Self::of(self.pid).as_ref() == Some(self)
    }

    pub(crate) fn kill(&self) {
        if self.is_alive() {
            let _ = kill_process(Pid::from_raw(self.pid).expect("a process id"), Signal::KILL);
        }
    }

    pub(crate) fn command_line(&self) -> String {
        std::fs::read(format!("/proc/{}/cmdline", self.pid))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }
}

fn fields(pid: i32) -> Option<Vec<String>> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace().map(str::to_owned).collect())
}

fn state_and_start(pid: i32) -> Option<(String, String)> {
    let fields = fields(pid)?;
    Some((fields.first()?.clone(), fields.get(19)?.clone()))
}

/// Direct children that have ended and whose status nobody took.
pub(crate) fn zombies_of(parent: Pid) -> usize {
    let pids = std::fs::read_dir("/proc").expect("/proc").flatten();
    let fields = pids.filter_map(|entry| fields(entry.file_name().to_str()?.parse().ok()?));
    let parent = parent.as_raw_pid().to_string();
    fields.filter(|fields| fields[0] == "Z" && fields[1] == parent).count()
}

/// Every living descendant.
pub(crate) fn descendants(root: Pid) -> BTreeSet<Process> {
    let pids: Vec<i32> = std::fs::read_dir("/proc")
        .expect("/proc")
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    let parents: Vec<(i32, i32)> =
        pids.iter().filter_map(|pid| Some((*pid, fields(*pid)?.get(1)?.parse().ok()?))).collect();
    let mut found = BTreeSet::new();
    let mut next = vec![root.as_raw_pid()];
    while let Some(parent) = next.pop() {
        for (pid, _) in parents.iter().filter(|(_, own)| *own == parent) {
            next.push(*pid);
            found.extend(Process::of(*pid));
        }
    }
    found
}

/// Asserts that none of these is left, within a bound.
pub(crate) fn all_end(processes: &BTreeSet<Process>) {
    let left = || processes.iter().filter(|process| process.is_alive()).collect::<Vec<_>>();
    assert!(wait_for(|| left().is_empty().then_some(())).is_some(), "still alive: {:?}", left());
}

/// The status of one GET.
pub(crate) fn status(url: &str) -> Option<u16> {
    exchange(url, "GET", "")?.split(' ').nth(1)?.parse().ok()
}

/// The answer to one POST of JSON, head included; empty when there was none.
pub(crate) fn post(url: &str, body: &str) -> String {
    exchange(url, "POST", body).unwrap_or_default()
}

/// The body of the answer to one GET; empty when there was none.
pub(crate) fn get(url: &str) -> String {
    let answer = exchange(url, "GET", "").unwrap_or_default();
    answer.split_once("\r\n\r\n").map_or_else(String::new, |(_, body)| body.to_owned())
}

fn exchange(url: &str, method: &str, body: &str) -> Option<String> {
    let (address, path) = url.strip_prefix("http://")?.split_once('/')?;
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let length = body.len();
    let head = format!("{method} /{path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {length}");
    write!(stream, "{head}\r\ncontent-type: application/json\r\n\r\n{body}").ok()?;
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text);
    Some(text)
}
