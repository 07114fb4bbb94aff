//! `pdlink bench proxy`: what the proxy costs, in processor time, latency and memory.
//!
//! Five kinds of process: the mock workers, the load, the proxy under test, a bare relay, and this one, which only
//! measures. For each body size: a row without a proxy (a client that does both legs itself), a row through a relay that
//! does nothing but move the bytes, a row through the proxy, and one through each other router that was named; at one
//! connection for the latency that is added, and at many for the processor time per 1,000 requests. The relay says what of
//! that time is the machine's.

mod report;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use self::report::{Memory, Tally, Wave};
pub use self::report::{Report, Row};
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
    /// Every row is measured so many times, with all other rows between them
    #[arg(long, default_value_t = 5)]
    rounds: usize,
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

impl Args {
    /// A short and a long prompt, alone and many at once; with `quick` a fifth of the requests.
    pub fn brief(quick: bool) -> Self {
        Self {
            bodies: vec![200, 20_000],
            rounds: 5,
            connections: vec![1, 32],
            requests: quick.then_some(2_000),
            seconds: None,
            events: 0,
            inflight: 0,
            seed: 1,
            routers: Vec::new(),
            proxy_args: Vec::new(),
            part: None,
            targets: Vec::new(),
            delay_ms: 0,
        }
    }

    /// Whether this process is one part of the scenario.
    pub fn is_a_part(&self) -> bool {
        self.part.is_some()
    }
}

/// Runs the part of the scenario that this process is.
pub fn run_part(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match args.part.context("this process is no part of the scenario")? {
        Part::MockPrefill => runtime.block_on(serve_mock(Mock::Prefill)),
        Part::MockDecode => {
            let mock = Mock::Decode { events: args.events, delay: Duration::from_millis(args.delay_ms) };
            runtime.block_on(serve_mock(mock))
        }
        Part::Relay => runtime.block_on(serve_relay(args)),
        Part::Load => runtime.block_on(run_load(args)),
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
        let rounds = self.args.rounds.max(1);
        if let Some(seconds) = self.args.seconds {
            return format!("--seconds={}", seconds / rounds as f64);
        }
        let fitting = 2_000_000_000 / (prompt_bytes as u64 + 1_000);
        let requests = self.args.requests.unwrap_or_else(|| fitting.clamp(2_000, 20_000));
        let requests = if connections == 1 { requests.min(3_000) } else { requests };
        format!("--requests={}", requests.div_ceil(rounds as u64))
    }

    /// One round of one row. Without a `front`, the load does both legs itself.
    fn round(&self, tally: &mut Tally, front: Option<&Front>) -> anyhow::Result<()> {
        let (prompt_bytes, connections) = (tally.prompt_bytes, tally.connections);
        let targets = front.map_or(&self.legs[..], |front| std::slice::from_ref(&front.address));
        if tally.is_new() {
            self.load(targets, prompt_bytes, connections, &format!("--requests={WARM_UP_REQUESTS}"))?;
        }
        let spent = || front.map(|front| tree_cpu_time(front.pid));
        let before = spent();
        let seen = self.load(targets, prompt_bytes, connections, &self.until(prompt_bytes, connections))?;
        let (failed, all) = (seen.errors, seen.errors + seen.requests);
        let first_error = seen.first_error.as_deref().unwrap_or_default();
        ensure!(failed == 0, "{failed} of {all} requests through {} failed, the first: {first_error}", tally.through);
        let spent = spent().zip(before).map(|(after, before)| after.saturating_sub(before));
        tally.take(&seen, spent);
        Ok(())
    }

    /// All rows of one load: without a proxy, through the relay, the proxy, and every other router.
    fn rows(&self, prompt_bytes: usize, connections: usize) -> anyhow::Result<Vec<Row>> {
        let fronts = [&self.relay, &self.proxy].into_iter().chain(&self.routers).map(Some);
        let mut tallies: Vec<(Option<&Front>, Tally)> = std::iter::once(None)
            .chain(fronts)
            .map(|front| {
                let name = front.map_or("direct", |front| &front.name);
                (front, Tally::new(prompt_bytes, connections, name))
            })
            .collect();
        for _ in 0..self.args.rounds.max(1) {
            for (front, tally) in &mut tallies {
                self.round(tally, *front)?;
            }
        }
        Row::of(tallies.into_iter().map(|(_, tally)| tally))
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

/// Runs the scenario.
pub fn run(args: &Args, tell: &mut dyn FnMut(&str)) -> anyhow::Result<Report> {
    let inflight = raise_file_limit(args.inflight, tell);
    let mut report = Report::default();
    let bench = Bench::start(args, Duration::ZERO)?;
    for &prompt_bytes in &args.bodies {
        for &connections in &args.connections {
            report.rows.extend(bench.rows(prompt_bytes, connections)?);
        }
    }
    drop(bench);
    if inflight > 0 {
        report.memory = Some(Bench::start(args, HOLD)?.memory(inflight)?);
    }
    Ok(report)
}

/// Each request in flight takes two sockets of the proxy. The parts inherit the limit. Returns how many requests it allows,
/// `inflight` at most.
fn raise_file_limit(inflight: usize, tell: &mut dyn FnMut(&str)) -> usize {
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
    tell(&format!(
        "the limit on open files is {files}: {fitting} requests are held in flight, for {inflight} raise it to {wanted}\n"
    ));
    fitting
}
