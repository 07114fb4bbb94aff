//! UCX behind NIXL: which transports this build has, how many copies there are, and what it makes of GPU memory.

use std::collections::BTreeSet;

use super::super::check::Answer;
use super::super::machine::rdma;
use super::{Libraries, Looked};
use crate::config::KvMemory;
use crate::ffi::ucx::Loaded;

const OTHER_WHEEL: &str = "install nixl-cu13 or nixl-cu12 from PyPI as the CUDA of the driver is, and leave UCX_MODULE_DIR and \
                           LD_LIBRARY_PATH unset";

/// What NIXL's UCX backend writes where its UCX takes GPU memory for the processor's.
const SEEN_AS_HOST: &str = "detected as host";

pub(super) fn transports(libraries: &Libraries) -> Answer {
    let Ok(Looked { found, .. }) = libraries.nixl() else { return libraries.no_nixl() };
    let ucx = &found.ucx;
    let Some(file) = ucx.copies.first() else {
        return Answer::skipped(format!("NIXL's backend {} does not run on UCX", libraries.wish().backend));
    };
    let needed = libraries.setting.needs_nixl();
    let names = ucx.transports();
    let not_loaded: BTreeSet<&String> = ucx.built.difference(&ucx.modules).collect();
    let unused = match not_loaded.len() {
        0 => String::new(),
        _ => format!(" (not loaded here: {})", not_loaded.into_iter().cloned().collect::<Vec<_>>().join(", ")),
    };
    let seen = format!("{}: {}{unused}", file.display(), names.join(", "));
    let devices = rdma::devices();
    let answer = if !devices.is_empty() && !ucx.knows_rdma() {
        Answer::fault(needed, format!("{seen}; none for RDMA, and there is {}", devices.join(", ")), OTHER_WHEEL)
    } else {
        Answer::ok(seen)
    };
    answer.with("transports", names).with("library", file.display().to_string())
}

pub(super) fn copies(libraries: &Libraries) -> Answer {
    let Ok(Looked { found, .. }) = libraries.nixl() else { return libraries.no_nixl() };
    let copies: Vec<String> = found.ucx.copies.iter().map(|copy| copy.display().to_string()).collect();
    let answer = match copies.len() {
        0 => Answer::skipped("NIXL loads no UCX"),
        1 => Answer::ok(format!("one: {}", copies[0])),
        _ => Answer::fault(
            libraries.setting.needs_nixl(),
            format!("one process loads {}, which take each other's place: {}", copies.len(), copies.join(" and ")),
            "keep the one that is not NIXL's out of the workers: LD_PRELOAD, LD_LIBRARY_PATH, another wheel that brings UCX",
        ),
    };
    answer.with("copies", copies)
}

/// GPU memory that UCX takes for the processor's is read as such: the process ends, or the bytes are wrong.
pub(super) fn gpu_memory(libraries: &Libraries) -> Answer {
    let Ok(Looked { found, said }) = libraries.nixl() else { return libraries.no_nixl() };
    let setting = &libraries.setting;
    let needed = setting.needs_nixl() && setting.memory() == Some(KvMemory::Gpu);
    if found.ucx.copies.is_empty() {
        return Answer::skipped("NIXL loads no UCX");
    }
    if !found.ucx.knows_gpus() {
        let seen = format!("UCX would take GPU memory for host memory: {}", no_cuda(&found.ucx));
        return if needed || setting.gpus() > 0 {
            Answer::fault(needed, seen, OTHER_WHEEL)
        } else {
            Answer::skipped(format!("no GPU here; on one {seen}"))
        };
    }
    if setting.gpus() > 0 && !found.ucx.modules.contains("cuda") {
        let seen = "UCX takes GPU memory for host memory: its CUDA module (libuct_cuda) is there and was not loaded";
        let mend =
            "install the wheel that fits the driver's CUDA (nixl-cu13 or nixl-cu12), and leave UCX_MODULES unset";
        return Answer::fault(needed, seen, mend);
    }
    match &found.gpu {
        None => Answer::absent(
            needed,
            "UCX has its CUDA module, and there is no GPU here to try it on",
            "run this where the workers run, with the driver and the GPUs in the container",
        ),
        Some(Err(error)) => Answer::fault(needed, format!("GPU memory cannot be registered: {error}"), OTHER_WHEEL),
        Some(Ok(())) if said.contains(SEEN_AS_HOST) => Answer::fault(
            needed,
            "UCX takes GPU memory for host memory: its CUDA module does not work here",
            OTHER_WHEEL,
        ),
        Some(Ok(())) => Answer::ok("UCX knows a GPU's memory as such"),
    }
}

fn no_cuda(ucx: &Loaded) -> String {
    let folder = ucx.copies.first().and_then(|copy| copy.parent()).map(|folder| folder.display().to_string());
    format!("it has no CUDA module (libuct_cuda) beside {}", folder.unwrap_or_default())
}
