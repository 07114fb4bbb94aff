//! `pdlink bench proxy`: what the proxy costs, in processor time, latency and memory.
//!
//! Five kinds of process: the mock workers, the load, the proxy under test, a bare relay, and this one, which only
//! measures. For each body size: a row without a proxy (a client that does both legs itself), a row through a relay that
//! does nothing but move the bytes, a row through the proxy, and one through each other router that was named; at one
//! connection for the latency that is added, and at many for the processor time per 1,000 requests. The relay says what of
//! that time is the machine's.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde::Serialize;

use super::environment::Environment;
use super::load::{self, Load, Seen, Until};
use super::mock::{self, Mock};
use super::process::{resident_bytes, tree_cpu_time};
use super::relay;
use super::running::Running;
use crate::proxy::FILES_OF_OTHERS;

/// Requests before each measurement, so that buffers, pools and caches are as in a running server.
const WARM_UP_REQUESTS: u64 = 400;
/// How long the mock holds each of `--inflight` requests.
const HOLD: Duration = Duration::from_secs(12);
/// Waves of `--inflight` requests.
const WAVES: usize = 3;
const PATIENCE: Duration = Duration::from_secs(120);
const ROUTER_START_MAX: Duration = Duration::from_secs(60);

/// Measures a proxy between mock workers
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Prompt sizes, in bytes
    #[arg(long, value_delimiter = ',', default_values_t = [200, 2_000, 20_000, 200_000, 1_000_000])]
    bodies: Vec<usize>,
    /// Connections of the load: one row each. 1 shows the latency that the proxy adds, more its processor time
    #[arg(long, value_delimiter = ',', default_values_t = [1, 32])]
    connections: Vec<usize>,
    /// Requests per row [default: as many as move about 2 GB, 2,000 to 20,000]
    #[arg(long, conflicts_with = "seconds")]
    requests: Option<u64>,
    /// Seconds per row, instead of a number of requests
    #[arg(long)]
    seconds: Option<f64>,
    /// Events of a streamed answer; 0 asks for one JSON object
    #[arg(long, default_value_t = 0)]
    events: u32,
    /// Also hold this many requests in flight, three times, and show the proxy's memory
    #[arg(long, default_value_t = 0)]
    inflight: usize,
    /// Seed of the prompts
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Write all figures to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure another router as well, in the same run: the command that starts it, split at white space, in which {port},
    /// {prefill} and {decode} stand for the port to listen on and the URLs of the workers. Repeat for more
    #[arg(long = "router", value_name = "COMMAND")]
    routers: Vec<String>,
    /// Settings for the proxy under test, as `--section.key=value`
    #[arg(long = "proxy-arg", value_name = "ARG", allow_hyphen_values = true)]
    proxy_args: Vec<String>,
    /// This process is one part of the scenario
    #[arg(long, hide = true)]
    part: Option<Part>,
    /// Addresses for the load's or the relay's part
    #[arg(long, hide = true, value_delimiter = ',')]
    targets: Vec<SocketAddr>,
    /// How long the mock waits before an answer, in milliseconds
    #[arg(long, hide = true, default_value_t = 0)]
    delay_ms: u64,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Part {
    MockPrefill,
    MockDecode,
    Relay,
    Load,
}

/// One line of the table.
#[derive(Debug, Clone, Serialize)]
struct Row {
    prompt_bytes: usize,
    connections: usize,
    /// What the requests go through: nothing (`direct`), the bare relay, the proxy, or another router, by its name.
    through: String,
    #[serde(flatten)]
    seen: Seen,
    /// Processor time of what they go through per 1,000 requests, in milliseconds.
    cpu_ms_per_1000: Option<f64>,
    /// The same as a multiple of the relay's.
    cpu_of_relay: Option<f64>,
    /// Its p50 above that of a client that does both legs itself.
    added_p50_us: Option<i64>,
}

/// Memory of the proxy, in bytes, around waves of requests held in flight.
#[derive(Debug, Clone, Serialize)]
struct Memory {
    inflight: usize,
    before_bytes: u64,
    waves: Vec<Wave>,
}

#[derive(Debug, Clone, Serialize)]
struct Wave {
    errors: u64,
    first_error: Option<String>,
    peak_bytes: u64,
    after_bytes: u64,
}

#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    environment: Environment,
    rows: Vec<Row>,
    memory: Option<Memory>,
}

/// Runs the scenario, or the part of it that this process is.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match args.part {
        Some(Part::MockPrefill) => runtime.block_on(serve_mock(Mock::Prefill)).map(|()| ExitCode::SUCCESS),
        Some(Part::MockDecode) => {
            let mock = Mock::Decode { events: args.events, delay: Duration::from_millis(args.delay_ms) };
            runtime.block_on(serve_mock(mock)).map(|()| ExitCode::SUCCESS)
        }
        Some(Part::Relay) => runtime.block_on(serve_relay(args)).map(|()| ExitCode::SUCCESS),
        Some(Part::Load) => runtime.block_on(run_load(args)).map(|()| ExitCode::SUCCESS),
        None => measure(args),
    }
}

async fn serve_mock(mock: Mock) -> anyhow::Result<()> {
    mock::serve(mock, |address| println!("{address}")).await?;
    Ok(())
}

async fn serve_relay(args: &Args) -> anyhow::Result<()> {
    relay::serve(&args.targets, |address| println!("{address}")).await?;
    Ok(())
}

async fn run_load(args: &Args) -> anyhow::Result<()> {
    let until = match (args.requests, args.seconds) {
        (_, Some(seconds)) => Until::Time(Duration::try_from_secs_f64(seconds)?),
        (requests, None) => Until::Requests(requests.unwrap_or(WARM_UP_REQUESTS)),
    };
    let load = Load {
        targets: args.targets.clone(),
        connections: args.connections.first().copied().unwrap_or(1),
        until,
        prompt_bytes: args.bodies.first().copied().unwrap_or(0),
        stream: args.events > 0,
        seed: args.seed,
        patience: PATIENCE,
    };
    println!("{}", serde_json::to_string(&load::run(&load).await?)?);
    Ok(())
}

/// What stands between load and workers, and whose processor time counts.
struct Front {
    name: String,
    address: SocketAddr,
    pid: i32,
    _running: Running,
}

/// The processes of the scenario: the workers, and what is measured between them and the load.
struct Bench<'a> {
    args: &'a Args,
    legs: Vec<SocketAddr>,
    relay: Front,
    proxy: Front,
    routers: Vec<Front>,
    _workers: [Running; 2],
}

fn words(text: &[&str]) -> Vec<String> {
    text.iter().map(|&word| word.to_owned()).collect()
}

fn start_relay(legs: &[SocketAddr]) -> anyhow::Result<Front> {
    let mut line = words(&["bench", "proxy", "--part", "relay"]);
    line.push(format!("--targets={},{}", legs[0], legs[1]));
    let mut running = Running::part(&line)?;
    Ok(Front { name: "relay".to_owned(), address: running.line()?.parse()?, pid: running.pid()?, _running: running })
}

fn start_proxy(legs: &[SocketAddr], settings: &[String]) -> anyhow::Result<Front> {
    let mut line = words(&["proxy", "--port", "0", "--connector", "NixlConnector", "--connector-impl", "vllm"]);
    line.extend([format!("--prefill=http://{}", legs[0]), format!("--decode=http://{}", legs[1])]);
    line.extend(settings.iter().cloned());
    let mut running = Running::part(&line)?;
    let ready = running.line()?;
    let address = ready.split(['/', ' ']).find_map(|word| word.parse().ok());
    let address = address.with_context(|| format!("the proxy said `{ready}`"))?;
    Ok(Front { name: "proxy".to_owned(), address, pid: running.pid()?, _running: running })
}

/// Starts somebody else's router and waits until it listens.
fn start_router(command: &str, legs: &[SocketAddr]) -> anyhow::Result<Front> {
    let address = TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    let fill = |word: &str| {
        let word = word.replace("{port}", &address.port().to_string());
        word.replace("{prefill}", &format!("http://{}", legs[0])).replace("{decode}", &format!("http://{}", legs[1]))
    };
    let line: Vec<String> = command.split_whitespace().map(fill).collect();
    let program = line.first().context("--router is empty")?;
    let name =
        Path::new(program).file_name().map_or_else(|| program.clone(), |name| name.to_string_lossy().into_owned());
    let mut running = Running::start(Command::new(program).args(&line[1..]).stdout(Stdio::null()))
        .with_context(|| format!("--router `{command}`"))?;
    let until = Instant::now() + ROUTER_START_MAX;
    while TcpStream::connect(address).is_err() {
        if let Some(status) = running.ended()? {
            bail!("--router `{command}` ended before it listened on port {}: {status}", address.port());
        }
        ensure!(Instant::now() < until, "--router `{command}` does not listen on {address} after {ROUTER_START_MAX:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(Front { name, address, pid: running.pid()?, _running: running })
}

impl<'a> Bench<'a> {
    fn start(args: &'a Args, delay: Duration) -> anyhow::Result<Self> {
        let mut prefill = Running::part(&words(&["bench", "proxy", "--part", "mock-prefill"]))?;
        let mut decode = words(&["bench", "proxy", "--part", "mock-decode"]);
        decode.extend([format!("--events={}", args.events), format!("--delay-ms={}", delay.as_millis())]);
        let mut decode = Running::part(&decode)?;
        let legs: Vec<SocketAddr> = vec![prefill.line()?.parse()?, decode.line()?.parse()?];
        let relay = start_relay(&legs)?;
        let proxy = start_proxy(&legs, &args.proxy_args)?;
        let routers: Result<_, _> = args.routers.iter().map(|command| start_router(command, &legs)).collect();
        Ok(Self { args, legs, relay, proxy, routers: routers?, _workers: [prefill, decode] })
    }

    fn load(
        &self,
        targets: &[SocketAddr],
        prompt_bytes: usize,
        connections: usize,
        until: &str,
    ) -> anyhow::Result<Seen> {
        let mut line = words(&["bench", "proxy", "--part", "load", until]);
        let targets: Vec<String> = targets.iter().map(SocketAddr::to_string).collect();
        line.extend([
            format!("--targets={}", targets.join(",")),
            format!("--bodies={prompt_bytes}"),
            format!("--connections={connections}"),
            format!("--events={}", self.args.events),
            format!("--seed={}", self.args.seed),
        ]);
        Ok(serde_json::from_str(&Running::part(&line)?.line()?)?)
    }

    fn until(&self, prompt_bytes: usize, connections: usize) -> String {
        if let Some(seconds) = self.args.seconds {
            return format!("--seconds={seconds}");
        }
        let fitting = 2_000_000_000 / (prompt_bytes as u64 + 1_000);
        let requests = self.args.requests.unwrap_or_else(|| fitting.clamp(2_000, 20_000));
        format!("--requests={}", if connections == 1 { requests.min(3_000) } else { requests })
    }

    /// Without a `front`, the load does both legs itself.
    fn row(&self, prompt_bytes: usize, connections: usize, front: Option<&Front>) -> anyhow::Result<Row> {
        let targets = front.map_or(&self.legs[..], |front| std::slice::from_ref(&front.address));
        let name = front.map_or("direct", |front| &front.name);
        self.load(targets, prompt_bytes, connections, &format!("--requests={WARM_UP_REQUESTS}"))?;
        let spent = || front.map(|front| tree_cpu_time(front.pid));
        let before = spent();
        let seen = self.load(targets, prompt_bytes, connections, &self.until(prompt_bytes, connections))?;
        let (failed, all) = (seen.errors, seen.errors + seen.requests);
        let first_error = seen.first_error.as_deref().unwrap_or_default();
        ensure!(failed == 0, "{failed} of {all} requests through {name} failed, the first: {first_error}");
        let spent = spent().zip(before).map(|(after, before)| after.saturating_sub(before));
        // Milliseconds per 1,000 requests are microseconds per request.
        let cpu_ms_per_1000 = spent.map(|spent| spent.as_secs_f64() * 1e6 / seen.requests as f64);
        let through = name.to_owned();
        Ok(Row { prompt_bytes, connections, through, seen, cpu_ms_per_1000, cpu_of_relay: None, added_p50_us: None })
    }

    fn rows(&self, prompt_bytes: usize, connections: usize) -> anyhow::Result<Vec<Row>> {
        let direct = self.row(prompt_bytes, connections, None)?;
        let relay = self.row(prompt_bytes, connections, Some(&self.relay))?;
        let (direct_p50_us, relay_cpu) = (direct.seen.p50_us, relay.cpu_ms_per_1000);
        let mut rows = vec![direct, relay];
        for front in std::iter::once(&self.proxy).chain(&self.routers) {
            rows.push(self.row(prompt_bytes, connections, Some(front))?);
        }
        for row in &mut rows[1..] {
            row.added_p50_us = i64::try_from(row.seen.p50_us)
                .ok()
                .zip(i64::try_from(direct_p50_us).ok())
                .map(|(through, direct)| through - direct);
        }
        for row in &mut rows[2..] {
            row.cpu_of_relay = row.cpu_ms_per_1000.zip(relay_cpu).map(|(through, relay)| through / relay);
        }
        Ok(rows)
    }

    /// Holds `inflight` requests at once, several times: no wave must need more memory than the first.
    fn memory(&self, inflight: usize) -> anyhow::Result<Memory> {
        let pid = self.proxy.pid;
        let now = || resident_bytes(pid).context("the proxy is gone");
        let before_bytes = now()?;
        let mut waves = Vec::new();
        for _ in 0..WAVES {
            let (stop, stopped) = std::sync::mpsc::channel::<()>();
            let sampler = std::thread::spawn(move || {
                let mut peak = 0;
                while stopped.recv_timeout(Duration::from_millis(100))
                    == Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                {
                    peak = resident_bytes(pid).unwrap_or(0).max(peak);
                }
                peak
            });
            let seen = self.load(&[self.proxy.address], 200, inflight, &format!("--requests={inflight}"));
            drop(stop);
            let peak_bytes = sampler.join().unwrap_or(0);
            let Seen { errors, first_error, .. } = seen?;
            waves.push(Wave { errors, first_error, peak_bytes, after_bytes: now()? });
        }
        Ok(Memory { inflight, before_bytes, waves })
    }
}

fn measure(args: &Args) -> anyhow::Result<ExitCode> {
    let inflight = raise_file_limit(args.inflight);
    let mut report = Report { environment: Environment::current(), rows: Vec::new(), memory: None };
    println!("{}", report.environment);
    println!("{}", HEADINGS);
    let bench = Bench::start(args, Duration::ZERO)?;
    for &prompt_bytes in &args.bodies {
        for &connections in &args.connections {
            for row in bench.rows(prompt_bytes, connections)? {
                println!("{}", row.line());
                report.rows.push(row);
            }
        }
    }
    drop(bench);
    if inflight > 0 {
        let memory = Bench::start(args, HOLD)?.memory(inflight)?;
        println!("{}", memory.lines());
        report.memory = Some(memory);
    }
    if let Some(file) = &args.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

const HEADINGS: &str = "prompt bytes  connections  through          req/s  p50 us  p90 us  p99 us  added p50 us  CPU ms/1000 requests  of relay";

impl Row {
    fn line(&self) -> String {
        let rate = self.seen.requests as f64 / self.seen.seconds;
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        format!(
            "{:>12}  {:>11}  {:<14}  {rate:>6.0}  {:>6}  {:>6}  {:>6}  {:>12}  {:>20}  {:>8}",
            self.prompt_bytes,
            self.connections,
            self.through,
            self.seen.p50_us,
            self.seen.p90_us,
            self.seen.p99_us,
            or_dash(self.added_p50_us.map(|added| added.to_string())),
            or_dash(self.cpu_ms_per_1000.map(|cpu| format!("{cpu:.1}"))),
            or_dash(self.cpu_of_relay.map(|times| format!("{times:.2}"))),
        )
    }
}

impl Memory {
    fn lines(&self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let mut lines =
            format!("memory with {} requests in flight: {:.0} MiB before", self.inflight, mib(self.before_bytes));
        for (number, wave) in self.waves.iter().enumerate() {
            lines += &format!(
                ", wave {}: {:.0} MiB at most, {:.0} MiB after, {} errors",
                number + 1,
                mib(wave.peak_bytes),
                mib(wave.after_bytes),
                wave.errors,
            );
            if let Some(error) = &wave.first_error {
                lines += &format!(" (the first: {error})");
            }
        }
        lines
    }
}

/// Each request in flight takes two sockets of the proxy. The parts inherit the limit. Returns how many requests it allows,
/// `inflight` at most.
fn raise_file_limit(inflight: usize) -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let wanted = inflight as u64 * 2 + FILES_OF_OTHERS as u64;
    let maximum = getrlimit(Resource::Nofile).maximum;
    // Only a privileged user may raise the hard limit; for others it stays, and says how many requests there can be.
    if maximum.is_some_and(|maximum| maximum < wanted) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: Some(wanted) });
    } else {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
    let Some(files) = getrlimit(Resource::Nofile).current.filter(|&files| files < wanted) else { return inflight };
    let fitting = usize::try_from(files.saturating_sub(FILES_OF_OTHERS as u64) / 2).unwrap_or(inflight);
    println!(
        "the limit on open files is {files}: {fitting} requests are held in flight, for {inflight} raise it to {wanted}"
    );
    fitting
}
