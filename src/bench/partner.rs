//! The other end of a scenario, spoken to in lines of JSON: a child of this process, or `--listen` on another host, which
//! proves first that it knows the run's secret, as we do.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, ToSocketAddrs};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::security::{NONCE_BYTES, Nonce, PROOF_BYTES, Proof, Secret, nonce, prove, proves};

/// Longest wait for a host to answer at all, and for each step of the introduction.
const INTRODUCTION_MAX: Duration = Duration::from_secs(10);
/// Longest wait for an answer: a GiB of memory is filled before the first one.
const ANSWER_MAX: Duration = Duration::from_secs(120);
/// Longest line that is read: the export of any path fits many times.
const LINE_BYTES_MAX: u64 = 16 << 20;

const CALLER: &str = "pdlink bench: caller";
const LISTENER: &str = "pdlink bench: listener";

/// Where the other end is to be had.
#[derive(Debug, Clone)]
pub enum Place {
    /// A child of this process.
    Here,
    /// `pdlink bench … --listen` at this address.
    There { address: String, secret: Secret },
}

impl Place {
    /// The other host, where the other end is on one.
    pub fn other_host(&self) -> Option<String> {
        match self {
            Self::Here => None,
            Self::There { address, .. } => Some(address.clone()),
        }
    }
}

/// What the other end is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Part {
    Link,
    Kv,
    /// Plain sockets.
    Plain,
    /// One end of `ncclSend`.
    Nccl,
}

impl Part {
    /// Name of the hidden subcommand of `pdlink bench` that is this part.
    fn subcommand(self) -> &'static str {
        match self {
            Self::Link => "link-peer",
            Self::Kv => "kv-peer",
            Self::Plain => "plain-peer",
            Self::Nccl => "nccl-peer",
        }
    }
}

/// Lines to and from the other end.
pub struct Lines {
    input: Box<dyn BufRead + Send>,
    output: Box<dyn Write + Send>,
    /// Under which address this end is reached by the other.
    pub(super) host: IpAddr,
}

impl Lines {
    /// Those of a process that was started as a part.
    pub fn of_this_process() -> Self {
        let (input, output) = (Box::new(BufReader::new(std::io::stdin())), Box::new(std::io::stdout()));
        Self { input, output, host: Ipv4Addr::LOCALHOST.into() }
    }

    fn of_stream(stream: TcpStream) -> anyhow::Result<Self> {
        stream.set_nodelay(true)?;
        let host = stream.local_addr()?.ip();
        Ok(Self { input: Box::new(BufReader::new(stream.try_clone()?)), output: Box::new(stream), host })
    }

    pub(super) fn tell(&mut self, what: &impl Serialize) -> anyhow::Result<()> {
        writeln!(self.output, "{}", serde_json::to_string(what)?)?;
        Ok(self.output.flush()?)
    }

    /// The next line; `None` once the other end has closed.
    pub(super) fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        let mut line = String::new();
        self.input.by_ref().take(LINE_BYTES_MAX).read_line(&mut line)?;
        if line.is_empty() {
            return Ok(None);
        }
        Ok(Some(serde_json::from_str(&line).context("the other end said something else than was asked")?))
    }
}

/// What the other end says: what was asked for, or why not.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said<T> {
    Ok(T),
    Failed(String),
}

/// The other end, seen from the one that measures. A child is ended when this is dropped, a listener hears that we left.
pub(super) struct Partner {
    lines: Lines,
    child: Option<Child>,
}

impl Partner {
    pub(super) fn find(place: &Place, part: Part) -> anyhow::Result<Self> {
        match place {
            Place::Here => Self::start(part),
            Place::There { address, secret } => Self::call(address, secret, part),
        }
    }

    fn start(part: Part) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["bench", part.subcommand()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the other process")?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let Some((input, output)) = pipes else { bail!("the other process has no pipes") };
        let lines = Lines {
            input: Box::new(BufReader::new(output)),
            output: Box::new(input),
            host: Ipv4Addr::LOCALHOST.into(),
        };
        Ok(Self { lines, child: Some(child) })
    }

    fn call(address: &str, secret: &Secret, part: Part) -> anyhow::Result<Self> {
        let found = address.to_socket_addrs().with_context(|| format!("`{address}` is no HOST:PORT"))?.next();
        let found = found.with_context(|| format!("`{address}` names no host"))?;
        secret.allowed_on(found.ip())?;
        let mut stream = TcpStream::connect_timeout(&found, INTRODUCTION_MAX)
            .with_context(|| format!("nobody answers at {address}: is `pdlink bench link --listen` running there?"))?;
        stream.set_read_timeout(Some(INTRODUCTION_MAX))?;
        introduce(&mut stream, secret).with_context(|| format!("the listener at {address}"))?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        let mut lines = Lines::of_stream(stream)?;
        lines.tell(&part)?;
        Ok(Self { lines, child: None })
    }

    /// Under which address this end is reached by the other.
    pub(super) fn host(&self) -> IpAddr {
        self.lines.host
    }

    /// Says one line and hears the answer to it.
    pub(super) fn ask<T: DeserializeOwned>(&mut self, what: &impl Serialize) -> anyhow::Result<T> {
        self.tell(what)?;
        self.hear()
    }

    /// Says one line. Its answer is to be heard later.
    pub(super) fn tell(&mut self, what: &impl Serialize) -> anyhow::Result<()> {
        self.lines.tell(what).context("telling the other end")
    }

    pub(super) fn hear<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        match self.lines.next()? {
            Some(Said::Ok(answer)) => Ok(answer),
            Some(Said::Failed(why)) => bail!("the other end: {why}"),
            None => bail!("the other end has gone"),
        }
    }
}

impl Drop for Partner {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Answers one line, in either way.
pub(super) fn answer<T: Serialize>(lines: &mut Lines, outcome: &anyhow::Result<T>) -> anyhow::Result<()> {
    match outcome {
        Ok(answer) => lines.tell(&Said::Ok(answer)),
        Err(error) => lines.tell(&Said::<T>::Failed(format!("{error:#}"))),
    }
}

/// Serves one caller after the other, as many as `callers` says: two at once would measure each other. `tell` hears of each.
pub fn listen(
    address: &str,
    secret: &Secret,
    callers: Option<usize>,
    tell: &mut dyn FnMut(&str),
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    let own = listener.local_addr()?;
    secret.allowed_on(own.ip())?;
    tell(&format!("listening on {own}: run `pdlink bench link --connect {own}` on the other host\n"));
    let mut served = 0;
    while callers.is_none_or(|callers| served < callers) {
        let (stream, from) = listener.accept()?;
        match serve_caller(stream, secret) {
            Ok(part) => {
                served += 1;
                tell(&format!("served {from}: {}\n", part.subcommand().trim_end_matches("-peer")));
            }
            Err(error) => tell(&format!("refused {from}: {error:#}\n")),
        }
    }
    Ok(())
}

fn serve_caller(mut stream: TcpStream, secret: &Secret) -> anyhow::Result<Part> {
    stream.set_read_timeout(Some(INTRODUCTION_MAX))?;
    be_introduced(&mut stream, secret)?;
    // A caller that measures is silent for as long as it likes; one whose host dies is noticed by the system.
    stream.set_read_timeout(None)?;
    socket2::SockRef::from(&stream)
        .set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(INTRODUCTION_MAX).with_interval(INTRODUCTION_MAX))?;
    let mut lines = Lines::of_stream(stream)?;
    let part: Part = lines.next()?.context("the caller left before it said what to be")?;
    match part {
        Part::Link => super::link::serve_peer(lines, Some(secret))?,
        Part::Kv => super::kv::serve_peer(lines, Some(secret))?,
        Part::Plain => super::raw::serve_plain(lines)?,
        Part::Nccl => super::raw::serve_nccl_peer(lines)?,
    }
    Ok(part)
}

/// Proves to a listener that we know the secret, once it has proved the same.
fn introduce(stream: &mut (impl Read + Write), secret: &Secret) -> anyhow::Result<()> {
    let ours = nonce()?;
    stream.write_all(&ours)?;
    let (mut theirs, mut proof): (Nonce, Proof) = ([0; NONCE_BYTES], [0; PROOF_BYTES]);
    stream.read_exact(&mut theirs).context("it does not introduce itself")?;
    stream.read_exact(&mut proof).context("it does not introduce itself")?;
    ensure!(proves(secret, LISTENER, &[&ours, &theirs], &proof), "it has another secret: {BOTH_SECRETS}");
    Ok(stream.write_all(&prove(secret, CALLER, &[&ours, &theirs]))?)
}

/// The listener's side of [`introduce`].
fn be_introduced(stream: &mut (impl Read + Write), secret: &Secret) -> anyhow::Result<()> {
    let (mut theirs, mut proof): (Nonce, Proof) = ([0; NONCE_BYTES], [0; PROOF_BYTES]);
    stream.read_exact(&mut theirs).context("it does not introduce itself")?;
    let ours = nonce()?;
    stream.write_all(&ours)?;
    stream.write_all(&prove(secret, LISTENER, &[&theirs, &ours]))?;
    stream.read_exact(&mut proof).with_context(|| format!("it left: {BOTH_SECRETS}"))?;
    ensure!(proves(secret, CALLER, &[&theirs, &ours], &proof), "it has another secret: {BOTH_SECRETS}");
    Ok(())
}

const BOTH_SECRETS: &str = "both hosts need the same file in --secret-file";

#[cfg(test)]
mod tests {
    use super::*;

    /// A caller with one secret at a listener with another.
    fn meet(caller: Secret, listener: Secret) -> (anyhow::Result<()>, anyhow::Result<()>) {
        let socket = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let address = socket.local_addr().expect("an address");
        std::thread::scope(|scope| {
            let side = scope.spawn(move || {
                let (mut stream, _) = socket.accept().expect("a caller");
                stream.set_read_timeout(Some(Duration::from_secs(5))).expect("a limit");
                be_introduced(&mut stream, &listener)
            });
            let mut stream = TcpStream::connect(address).expect("connect");
            let called = introduce(&mut stream, &caller);
            drop(stream);
            (called, side.join().expect("no panic"))
        })
    }

    #[test]
    fn both_ends_must_know_the_secret() {
        let secret = Secret::generate().expect("random");
        let (called, heard) = meet(secret.clone(), secret.clone());
        assert!(called.is_ok() && heard.is_ok(), "{called:?} {heard:?}");
        let (called, heard) = meet(secret, Secret::generate().expect("random"));
        assert!(called.expect_err("refused").to_string().contains("--secret-file"));
        assert!(heard.expect_err("refused").to_string().contains("--secret-file"));
    }
}
