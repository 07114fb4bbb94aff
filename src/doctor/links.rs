//! A canary over every path that may be used: both ways, byte for byte, between two processes that are neither's parent, as
//! workers are. Its speed is held against that of the plainest copy there is, measured in turns with it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;

use super::check::{Answer, Check, Group};
use super::libraries;
use super::probe::{Order, Probe};
use super::setting::{Setting, Shared};
use crate::bench::link::canary::{Flown, SPAN_BYTES};
use crate::bench::link::{Orders, Ready, SecretFile};
use crate::config::{KvMemory, NcclConfig, NixlConfig, Path, Role};

/// Longest for one path, and for each of its two processes to start.
const FLIGHT: Duration = Duration::from_secs(20);
const START: Duration = Duration::from_secs(8);

pub(super) fn checks(setting: &Shared) -> Vec<Check> {
    let check = |path: Path| {
        let setting = setting.clone();
        Check::new(Group::Links, path.name(), FLIGHT, move || fly(&setting, path))
    };
    Path::BEST_FIRST.into_iter().map(check).collect()
}

/// Below this share of the plain copy something is wrong with the path here: half of what it reached in small transfers on
/// quiet machines, or less.
fn floor(path: Path) -> f64 {
    match path {
        Path::Shm => 0.4,
        Path::Tcp => 0.25,
        Path::CudaIpc => 0.3,
        Path::Nixl | Path::Nccl => 0.1,
    }
}

fn fly(setting: &Setting, path: Path) -> Answer {
    let needed = setting.allows(path);
    if setting.config().is_some() && !needed {
        return Answer::skipped("not a path that KV may take by this configuration");
    }
    let ends = match ends(setting, path) {
        Ok(ends) => ends,
        Err(absent) => return *absent,
    };
    match flown(setting, path, &ends) {
        Ok(flown) => judge(path, &ends, flown),
        Err(error) => Answer::fault(
            needed || setting.config().is_none(),
            format!("{}: {error:#}", ends.name()),
            "no KV can be trusted to this path here: mend what is named, or leave it out of kv.paths",
        ),
    }
}

/// The memory of both ends: a GPU each, or the host's.
struct Ends {
    gpus: Option<[i32; 2]>,
    /// NIXL's or NCCL's, on its path.
    library: Option<PathBuf>,
}

impl Ends {
    fn name(&self) -> String {
        match self.gpus {
            Some([one, other]) if one == other => format!("within GPU {one}"),
            Some([one, other]) => format!("GPU {one} and GPU {other}"),
            None => "host memory".to_owned(),
        }
    }
}

/// What the two ends lie in, or why the path cannot be tried.
fn ends(setting: &Setting, path: Path) -> Result<Ends, Box<Answer>> {
    let on_gpu = match path {
        Path::Nixl => setting.memory() == Some(KvMemory::Gpu),
        _ => path.moves(KvMemory::Gpu) && !path.moves(KvMemory::Host),
    };
    let library = match path {
        Path::Nccl if setting.gpus() > 0 => libraries::nccl_library(setting).map_err(|_| {
            Box::new(Answer::absent(setting.allows(path), "NCCL cannot be opened; see nccl", "see nccl"))
        })?,
        Path::Nixl => libraries::library(setting).map_err(|_| {
            Box::new(Answer::absent(setting.allows(path), "NIXL cannot be opened; see nixl", "see nixl"))
        })?,
        _ => None,
    };
    if !on_gpu {
        return Ok(Ends { gpus: None, library });
    }
    if setting.gpus() == 0 {
        let absent =
            Answer::absent(setting.allows(path), "no GPU can be used; see gpus", "run this where the workers run");
        return Err(Box::new(absent));
    }
    let [ours, theirs] = pair(setting);
    if path == Path::Nccl && ours == theirs {
        return Err(Box::new(Answer::absent(
            setting.paths() == [Path::Nccl],
            format!("NCCL refuses two ranks on one GPU, and both are on GPU {ours}"),
            "name \"cuda-ipc\" in kv.paths as well, which moves KV there",
        )));
    }
    Ok(Ends { gpus: Some([ours, theirs]), library })
}

/// The first GPU of decode and of prefill. Where this host has one role alone, two of its GPUs.
fn pair(setting: &Setting) -> [i32; 2] {
    let (prefill, decode) = (setting.ordinals(Role::Prefill), setting.ordinals(Role::Decode));
    let own = [decode.as_slice(), prefill.as_slice()].concat();
    let ours = own.first().copied().unwrap_or(0);
    let theirs = match prefill.first() {
        Some(first) if !decode.is_empty() => *first,
        _ => {
            let any = || i32::from(ours == 0 && setting.gpus() > 1);
            own.into_iter().find(|id| *id != ours).unwrap_or_else(any)
        }
    };
    [ours, theirs]
}

fn flown(setting: &Setting, path: Path, ends: &Ends) -> anyhow::Result<Flown> {
    let secret = SecretFile::new()?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).div_ceil(2).clamp(1, 8);
    let wish = libraries::wish(setting);
    let (env, parameters) = (libraries::variables(setting), wish.parameters.into_iter().collect());
    let nixl = NixlConfig {
        library: ends.library.clone(),
        environment: None,
        backend: wish.backend,
        parameters,
        env: env.iter().cloned().collect(),
        ..NixlConfig::default()
    };
    let nccl = NcclConfig { library: ends.library.clone(), ..NcclConfig::default() };
    let orders = |gpu: Option<i32>| Orders {
        path,
        span: SPAN_BYTES,
        threads,
        gpu,
        secret_file: secret.path.clone(),
        host: std::net::Ipv4Addr::LOCALHOST.into(),
        nixl: nixl.clone(),
        nccl: nccl.clone(),
    };
    let [ours, theirs] = ends.gpus.map_or([None; 2], |[ours, theirs]| [Some(ours), Some(theirs)]);
    let mut peer = Probe::start(&Order::HoldLink(orders(theirs)), &env)?;
    let ready: Ready = peer.answer(START).context("the end that is read")?;
    let order = Order::Fly { orders: orders(ours), ready, corrupt: setting.corrupts == Some(path) };
    Probe::start(&order, &env)?.answer(FLIGHT - START)
}

fn judge(path: Path, ends: &Ends, flown: Flown) -> Answer {
    let Flown { bytes, gigabytes_per_second: ours, ceiling_gigabytes_per_second: ceiling } = flown;
    let share = ours / ceiling;
    let plain = match path {
        Path::Tcp => "plain sockets",
        _ if ends.gpus.is_some() => "a plain peer copy",
        _ => "memcpy",
    };
    let (mib, name) = (bytes >> 20, ends.name());
    let seen = format!("{mib} MiB right, {name}; {ours:.1} GB/s, {:.0} % of {plain}", share * 100.0);
    let answer = if cfg!(debug_assertions) || share >= floor(path) {
        Answer::ok(seen)
    } else {
        let seen = format!("{seen}, less than {:.0} %", floor(path) * 100.0);
        Answer::warn(seen, "look for what else runs here, and measure it: `pdlink bench link`")
    };
    answer.with("gigabytes_per_second", ours).with("ceiling_gigabytes_per_second", ceiling).with("share", share)
}
