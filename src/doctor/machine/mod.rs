//! Checks of the machine, and of the container that we may be in.

mod gpu_memory;
mod gpu_wires;
mod gpus;
mod limits;
mod memory;
mod names;
mod ports;
mod process_memory;
pub(super) mod rdma;
mod shared_memory;

use std::time::Duration;

use super::check::{Answer, Check, Group};
use super::setting::Shared;

/// Longest for what the kernel answers.
const KERNEL: Duration = Duration::from_secs(5);
/// Longest for a name server that does not answer.
const NAMES: Duration = Duration::from_secs(15);

pub(super) fn checks(setting: &Shared) -> Vec<Check> {
    vec![
        check("cores", KERNEL, setting, limits::cores),
        check("memory", KERNEL, setting, memory::check),
        check("shared-memory", KERNEL, setting, shared_memory::check),
        check("process-memory", KERNEL, setting, process_memory::check),
        check("open-files", KERNEL, setting, limits::open_files),
        check("locked-memory", KERNEL, setting, limits::locked_memory),
        check("host-names", NAMES, setting, names::check),
        check("ports", KERNEL, setting, ports::check),
        check("gpus", KERNEL, setting, gpus::check),
        check("gpu-memory", KERNEL, setting, gpu_memory::check),
        check("gpu-peers", KERNEL, setting, gpus::peers),
        check("gpu-wires", KERNEL, setting, gpu_wires::check),
        check("rdma", KERNEL, setting, rdma::check),
    ]
}

fn check(name: &str, within: Duration, setting: &Shared, ask: fn(&super::Setting) -> Answer) -> Check {
    let setting = setting.clone();
    Check::new(Group::Machine, name, within, move || ask(&setting))
}
