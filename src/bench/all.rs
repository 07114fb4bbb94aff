//! `pdlink bench`: every level in one run, each on what this machine has; what it has not is skipped by name.

mod lines;

use std::ffi::OsString;
use std::time::Duration;

use super::partner::Place;
use super::proxy;
use super::report::{Level, Report, Skipped};
use super::running::Running;
use super::serve::{self, Pace, Target};
use super::{kv, link, raw, weights};
use crate::config::{KvSendType, Path};
use crate::ffi::cuda::survey;
use crate::ffi::{Search, nixl};

/// Time of a line of `raw`, `link` and `kv`, where nobody says it, and with little time.
const LINE_SECONDS: [f64; 2] = [0.5, 0.1];
/// Time of all lines of these levels, where nobody says that of one.
const RAW_SECONDS: f64 = 20.0;
const LINK_SECONDS: f64 = 50.0;
const KV_SECONDS: f64 = 20.0;

/// One of the levels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Name {
    Raw,
    Link,
    Kv,
    Serve,
    Weights,
    Proxy,
}

impl Name {
    pub const ALL: [Self; 6] = [Self::Raw, Self::Link, Self::Kv, Self::Serve, Self::Weights, Self::Proxy];

    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Link => "link",
            Self::Kv => "kv",
            Self::Serve => "serve",
            Self::Weights => "weights",
            Self::Proxy => "proxy",
        }
    }
}

/// What to measure, and how long.
#[derive(Debug, Clone)]
pub struct Options {
    pub levels: Vec<Name>,
    /// Few sizes and little time: to see that everything works, and for a gate that runs often.
    pub quick: bool,
    pub shapes: Vec<kv::Shape>,
    pub layout: kv::Layout,
    pub tokens: Vec<u32>,
    pub block_size: u32,
    pub prefill_tp: u32,
    pub decode_tp: u32,
    pub threads: usize,
    /// Time per line of `raw`, `link` and `kv`. None: half a second, or less where a level has many lines.
    pub seconds: Option<f64>,
    /// Of this process and of the other.
    pub gpus: Option<[i32; 2]>,
    /// Arguments of `pdlink up`, and whether its workers are reference engines.
    pub fleet: Vec<OsString>,
    pub is_reference: bool,
    pub admin_url: Option<String>,
    pub admin_token: Option<String>,
    /// A server without PD. None: a reference engine is started, where the fleet is of reference engines.
    pub baseline_url: Option<String>,
    /// How long the fleet may take to start.
    pub within: Duration,
    pub proxy: proxy::Args,
}

/// Measures into `report`. What fails is among what was skipped, and fails the whole at the end.
pub fn run(options: &Options, report: &mut Report, tell: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
    let machine = Machine::look(options);
    let mut failed = Vec::new();
    for level in Name::ALL {
        if !options.levels.contains(&level) {
            report.skipped.push(Skipped { what: level.name().to_owned(), why: "not asked for (--only)".to_owned() });
            continue;
        }
        tell(&format!("\n## {}\n", level.name()));
        let parts = options.parts(level, &machine, &mut report.skipped);
        for part in parts {
            match part(tell) {
                Ok(measured) => {
                    tell(&measured.to_string());
                    report.levels.push(measured);
                }
                Err(error) => {
                    tell(&format!("failed: {error:#}\n"));
                    let why = format!("failed: {error:#}");
                    report.skipped.push(Skipped { what: level.name().to_owned(), why });
                    failed.push(format!("{}: {error:#}", level.name()));
                }
            }
        }
    }
    for Skipped { what, why } in &report.skipped {
        tell(&format!("skipped: {what}: {why}\n"));
    }
    anyhow::ensure!(failed.is_empty(), "{}", failed.join("; "));
    Ok(())
}

/// One measurement that is still to be made.
type Part<'a> = Box<dyn FnOnce(&mut dyn FnMut(&str)) -> anyhow::Result<Level> + 'a>;

/// What there is here.
struct Machine {
    gpus: usize,
    /// Why a path cannot be used, for those that cannot.
    absent: Vec<(Path, String)>,
}

impl Machine {
    fn look(options: &Options) -> Self {
        let (gpus, no_gpus) = match survey() {
            Ok(found) => (found.gpus.len(), "the driver shows no GPU".to_owned()),
            Err(error) => (0, format!("no GPU: {error}")),
        };
        let environments = link::python_environment();
        let mut absent = Vec::new();
        if gpus == 0 {
            absent.push((Path::CudaIpc, no_gpus.clone()));
        }
        match (gpus, raw::nccl_absent()) {
            (0, _) => absent.push((Path::Nccl, no_gpus)),
            (1, _) => absent.push((Path::Nccl, "two GPUs are needed, and there is one".to_owned())),
            (_, Some(why)) => absent.push((Path::Nccl, why)),
            (_, None) if options.gpus.is_some_and(|[ours, theirs]| ours == theirs) => {
                absent.push((Path::Nccl, "two GPUs are needed, and --gpus names one".to_owned()));
            }
            (_, None) => {}
        }
        if let Err(error) = nixl::Library::open(&Search { library: None, environments: &environments }) {
            absent.push((Path::Nixl, error.to_string()));
        }
        Self { gpus, absent }
    }

    /// Paths that can be used; those that cannot are noted.
    fn paths(&self, wanted: &[Path], level: Name, skipped: &mut Vec<Skipped>) -> Vec<Path> {
        let why = |path: &Path| self.absent.iter().find(|(absent, _)| absent == path).map(|(_, why)| why);
        for path in wanted {
            if let Some(why) = why(path) {
                skipped.push(Skipped { what: format!("{} {}", level.name(), path.name()), why: why.clone() });
            }
        }
        wanted.iter().filter(|path| why(path).is_none()).copied().collect()
    }
}

impl Options {
    fn parts<'a>(&'a self, level: Name, machine: &Machine, skipped: &mut Vec<Skipped>) -> Vec<Part<'a>> {
        match level {
            Name::Raw => vec![self.raw(machine, skipped)],
            Name::Link => {
                let paths = [Path::Shm, Path::Tcp, Path::CudaIpc, Path::Nccl, Path::Nixl];
                vec![self.link(machine.paths(&paths, level, skipped), machine)]
            }
            Name::Kv => {
                let paths = machine.paths(&[Path::Shm, Path::Tcp, Path::CudaIpc, Path::Nixl], level, skipped);
                self.kv(&paths)
            }
            Name::Serve => {
                if !self.is_reference && self.baseline_url.is_none() {
                    let why = "only reference engines are started beside the fleet: name a server by --baseline-url";
                    skipped.push(Skipped { what: "serve without PD".to_owned(), why: why.to_owned() });
                }
                vec![Box::new(|tell: &mut dyn FnMut(&str)| self.serve(tell).map(Level::Serve))]
            }
            Name::Weights if !self.is_reference => {
                let why = "vLLM's workers do not take weights from pdlink yet; name no configuration, or one of reference engines";
                skipped.push(Skipped { what: level.name().to_owned(), why: why.to_owned() });
                Vec::new()
            }
            Name::Weights => vec![Box::new(|tell: &mut dyn FnMut(&str)| self.weights(tell).map(Level::Weights))],
            Name::Proxy => {
                vec![Box::new(|tell: &mut dyn FnMut(&str)| proxy::run(&self.proxy, tell).map(Level::Proxy))]
            }
        }
    }

    /// Time of each of so many lines of a level whose lines may take so long together.
    fn seconds(&self, of_level: f64, lines: usize) -> f64 {
        let most = LINE_SECONDS[usize::from(self.quick)];
        self.seconds.unwrap_or_else(|| most.min(of_level / lines.max(1) as f64))
    }

    fn raw<'a>(&self, machine: &Machine, skipped: &mut Vec<Skipped>) -> Part<'a> {
        let named =
            [(Path::CudaIpc, raw::Means::GpuCopy), (Path::Nccl, raw::Means::NcclSend), (Path::Nixl, raw::Means::Nixl)];
        let usable = machine.paths(&named.map(|(path, _)| path), Name::Raw, skipped);
        let more = named.into_iter().filter(|(path, _)| usable.contains(path)).map(|(_, means)| means);
        let mut options = raw::Options {
            means: [raw::Means::Memcpy, raw::Means::Sockets].into_iter().chain(more).collect(),
            bytes: lines::bytes(self.quick),
            bytes_aside: lines::bytes_aside(self.quick),
            threads: self.threads,
            seconds: 0.0,
            gpus: self.gpus.unwrap_or(if machine.gpus > 1 { [0, 1] } else { [0, 0] }),
            place: Place::Here,
        };
        options.seconds = self.seconds(RAW_SECONDS, options.lines());
        Box::new(move |_| raw::run(&options).map(Level::Raw))
    }

    fn link<'a>(&self, paths: Vec<Path>, machine: &Machine) -> Part<'a> {
        let of_ways = lines::link(self.quick);
        let count: usize = of_ways.iter().map(|(_, cases)| cases.len()).sum();
        let options = link::Options {
            cases: Vec::new(),
            threads: self.threads,
            seconds: self.seconds(LINK_SECONDS, count * paths.len()),
            ways: Vec::new(),
            place: Place::Here,
            gpus: self.gpus.or_else(|| (machine.gpus > 1).then_some([0, 1])),
            paths,
        };
        Box::new(move |_| {
            let mut report = link::Report::default();
            for (way, cases) in of_ways {
                let more = link::run(&link::Options { cases, ways: vec![way], ..options.clone() })?;
                report.latency.extend(more.latency);
                report.rows.extend(more.rows);
            }
            Ok(Level::Link(report))
        })
    }

    fn kv<'a>(&self, paths: &[Path]) -> Vec<Part<'a>> {
        let send_types = [KvSendType::Get, KvSendType::PutAsync];
        let mut all: Vec<kv::Options> = Vec::new();
        for &shape in &self.shapes {
            all.push(kv::Options {
                paths: paths.to_vec(),
                shape,
                layout: self.layout,
                cases: lines::kv(self.quick, &self.tokens, shape.token_bytes()),
                block_size: self.block_size,
                send_types: send_types.to_vec(),
                threads: self.threads,
                digest: false,
                gpus: self.gpus,
                prefill_tp: self.prefill_tp,
                decode_tp: self.decode_tp,
                place: Place::Here,
                seconds: 0.0,
            });
        }
        let count: usize = all.iter().map(|options| options.cases.len()).sum();
        let seconds = self.seconds(KV_SECONDS, count * paths.len() * send_types.len());
        let part = |options: kv::Options| -> Part<'a> {
            Box::new(move |_| kv::run(&kv::Options { seconds, ..options }).map(Level::Kv))
        };
        all.into_iter().map(part).collect()
    }

    fn serve(&self, tell: &mut dyn FnMut(&str)) -> anyhow::Result<serve::Report> {
        let alone = match &self.baseline_url {
            None if self.is_reference => Some(Alone::start(&self.fleet)?),
            _ => None,
        };
        let options = serve::Options {
            target: Target::Start { arguments: self.fleet.clone(), within: self.within },
            admin_url: self.admin_url.clone(),
            admin_token: self.admin_token.clone(),
            baseline: self.baseline_url.clone().or_else(|| alone.as_ref().map(|alone| alone.url.clone())),
            model: None,
            prompt_tokens: vec![128, 1024],
            output_tokens: if self.quick { 16 } else { 64 },
            loads: vec![Pace::AtOnce(1), Pace::AtOnce(8)],
            requests: if self.quick { 16 } else { 64 },
            warm_up: 4,
            seed: 1,
            as_text: false,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(serve::run(&options, tell))
    }

    fn weights(&self, tell: &mut dyn FnMut(&str)) -> anyhow::Result<weights::Report> {
        let options = weights::Options {
            fleet: self.fleet.clone(),
            admin_token: self.admin_token.clone(),
            bytes: if self.quick { vec![16 << 20] } else { vec![16 << 20, 256 << 20] },
            tensors: 64,
            pushes: if self.quick { 5 } else { 9 },
            clients: 2,
            threads: self.threads,
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(weights::run(&options, tell))
    }
}

/// One reference engine that does both, for what clients see without PD.
struct Alone {
    url: String,
    _running: Running,
}

impl Alone {
    /// Of the same configuration as the fleet.
    fn start(fleet: &[OsString]) -> anyhow::Result<Self> {
        let mut line: Vec<OsString> = ["engine", "--role", "both", "--port", "0"].map(OsString::from).to_vec();
        line.extend_from_slice(fleet);
        let mut running = Running::part(&line)?;
        let ready = running.line()?;
        let url = ready.split(' ').nth(1).unwrap_or_default().to_owned();
        anyhow::ensure!(url.starts_with("http"), "the engine without PD said `{ready}`");
        Ok(Self { url, _running: running })
    }
}
