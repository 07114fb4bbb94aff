//! Cores, open files, locked memory.

use rustix::process::{Resource, getrlimit};

use super::super::check::Answer;
use super::super::setting::Setting;
use super::rdma;
use crate::config::EngineKind;

/// Files that one request in flight at the proxy holds open: the client's socket and a worker's.
const FILES_PER_REQUEST: u64 = 2;
/// Files that a worker or the proxy has open before the first request, and some more.
const FILES_AT_REST: u64 = 512;

/// Every rank has threads that poll, copy and compute; on fewer cores than ranks they starve each other.
pub(super) fn cores(setting: &Setting) -> Answer {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (workers, ranks) = setting.workers_and_ranks();
    let seen = match ranks {
        0 => format!("{cores} may be used"),
        _ => format!("{cores} may be used by {workers} workers with {ranks} ranks and a proxy"),
    };
    let computes = setting.config().is_some_and(|config| config.inference.engine == EngineKind::Vllm);
    let answer = if computes && cores < ranks {
        Answer::warn(seen, "give the container more cores, or run fewer ranks: their threads will wait for each other")
    } else {
        Answer::ok(seen)
    };
    answer.with("cores", cores).with("ranks", ranks)
}

/// The proxy raises its own soft limit as far as it may, so the hard limit is what counts.
pub(super) fn open_files(setting: &Setting) -> Answer {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    let inflight = setting.config().map(|config| u64::try_from(config.proxy.inflight_max).unwrap_or(u64::MAX));
    let wanted = inflight.map_or(FILES_AT_REST, |inflight| inflight.saturating_mul(FILES_PER_REQUEST) + FILES_AT_REST);
    let seen = format!("at most {}", number(limit.maximum));
    let answer = if hard < FILES_AT_REST {
        Answer::fail(
            format!("{seen}: fewer than a worker opens before its first request"),
            format!(
                "raise the hard limit to {wanted}: `ulimit -Hn`, LimitNOFILE of systemd, --ulimit nofile of docker"
            ),
        )
    } else if hard < wanted {
        let room = (hard - FILES_AT_REST) / FILES_PER_REQUEST;
        Answer::warn(
            format!("{seen}: room for {room} requests in flight, of proxy.inflight_max = {}", inflight.unwrap_or(0)),
            format!("raise the hard limit to {wanted}, or set proxy.inflight_max to {room}"),
        )
    } else {
        Answer::ok(seen)
    };
    answer.with("hard", limit.maximum).with("soft", limit.current).with("wanted", wanted)
}

/// Memory that a network card reads must be locked. Where there is none, nothing here locks any.
pub(super) fn locked_memory(setting: &Setting) -> Answer {
    let limit = getrlimit(Resource::Memlock).current;
    let (devices, nixl) = (rdma::devices(), setting.needs_nixl());
    let answer = match (limit, devices.is_empty()) {
        (None, _) => Answer::ok("no limit"),
        (Some(_), true) => Answer::skipped("nothing locks memory: there are no RDMA devices"),
        (Some(bytes), false) => Answer::fault(
            nixl,
            format!("at most {} KiB, and {} cannot reach more than that", bytes / 1024, devices.join(", ")),
            "set the limit to unlimited: `ulimit -l unlimited`, LimitMEMLOCK of systemd, --ulimit memlock=-1 of docker",
        ),
    };
    answer.with("bytes", limit)
}

fn number(limit: Option<u64>) -> String {
    limit.map_or_else(|| "any number".to_owned(), |limit| limit.to_string())
}
