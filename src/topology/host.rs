//! What a host must have for a plan: the connector in vLLM's environment, the GPUs, the model's folder.
//!
//! A fault refuses a run before anything starts. A dry run only tells it: its plan may be for another host.

use super::plan::Plan;
use super::vllm::{VllmProgram, Wheel};
use crate::config::{Config, ConnectorImpl, EngineKind, Role};

/// What is known of the host that the workers run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    pub gpus: Gpus,
    /// One logical core of each physical one that this process may use, in order.
    pub cores: Vec<u32>,
    /// Whether the model's name can only mean a folder, and what is wrong with it.
    pub model_fault: Option<ModelFault>,
}

/// The GPUs that this host shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gpus {
    /// There is nothing here that could tell.
    Unknown,
    Count(u32),
}

/// What is wrong with a model's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelFault {
    Missing,
    /// It is a folder, and nothing in it says that it is a model.
    NoModel,
}

/// Why a plan cannot run on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HostFault {
    #[error(
        "pdlink's connector is not installed with vLLM {release} ({python}); install the wheel there (`{python} -m pip install \
         pdlink-{ours}-*.whl`), or set `pd_disagg.connector_impl = \"vllm\"`"
    )]
    NoWheel { release: String, python: String, ours: &'static str },
    #[error(
        "pdlink's connector {version} in vLLM's environment cannot be imported by {python}: {why}; install it again \
         (`{python} -m pip install --force-reinstall --no-deps pdlink-{ours}-*.whl`)"
    )]
    BrokenWheel { version: String, python: String, why: String, ours: &'static str },
    #[error(
        "pdlink is {ours}, and the connector in vLLM's environment is {theirs}: both ends of a link must be of one version; \
         `{python} -m pip install pdlink-{ours}-*.whl`"
    )]
    OtherWheel { theirs: String, python: String, ours: &'static str },
    #[error(
        "GPU {gpu} ({role} worker, `{key}`) is not on this host, which has {}; list ids that `nvidia-smi -L` shows",
        match count { 0 => "none".to_owned(), 1 => "GPU 0 alone".to_owned(), count => format!("GPUs 0 to {}", count - 1) }
    )]
    NoGpu { gpu: u32, role: &'static str, key: &'static str, count: u32 },
    #[error(
        "the model `{name}` is a path, and there is nothing; set `inference.model.name` to a folder or to a name of the hub"
    )]
    NoModelFolder { name: String },
    #[error(
        "the model's folder `{name}` has no config.json (nor params.json): it is no model that vLLM can load; set \
         `inference.model.name`"
    )]
    NoModelThere { name: String },
}

/// Everything that keeps `plan` from running here.
pub fn faults(config: &Config, plan: &Plan, host: &Host, vllm: Option<&VllmProgram>) -> Vec<HostFault> {
    let Some(vllm) = vllm.filter(|_| config.inference.engine == EngineKind::Vllm) else { return Vec::new() };
    let mut faults: Vec<HostFault> = wheel(config, vllm).into_iter().collect();
    faults.extend(host.model_fault.map(|fault| {
        let name = plan.model.clone();
        match fault {
            ModelFault::Missing => HostFault::NoModelFolder { name },
            ModelFault::NoModel => HostFault::NoModelThere { name },
        }
    }));
    if !vllm.on_cpu {
        faults.extend(no_gpu(plan, host));
    }
    faults
}

/// What cannot be found out here and should be known.
pub fn doubts(config: &Config, plan: &Plan, host: &Host, vllm: Option<&VllmProgram>) -> Vec<String> {
    let Some(vllm) = vllm.filter(|_| config.inference.engine == EngineKind::Vllm) else { return Vec::new() };
    let mut doubts = Vec::new();
    if needs_wheel(config) && vllm.wheel == Wheel::Unknown {
        let program = vllm.command.join(" ");
        doubts.push(format!(
            "cannot tell whether pdlink's connector is installed with {program}: it is no script of a Python that can be asked"
        ));
    }
    if !vllm.on_cpu && host.gpus == Gpus::Unknown {
        let gpus: Vec<String> = plan.workers.iter().flat_map(|worker| &worker.gpus).map(u32::to_string).collect();
        doubts.push(format!(
            "cannot tell whether GPU {} is there: this host has neither nvidia-smi nor /dev/nvidia*",
            gpus.join(", ")
        ));
    }
    doubts
}

fn needs_wheel(config: &Config) -> bool {
    config.pd_disagg.enabled && config.pd_disagg.connector_impl == ConnectorImpl::Native
}

fn wheel(config: &Config, vllm: &VllmProgram) -> Option<HostFault> {
    if !needs_wheel(config) {
        return None;
    }
    let ours = env!("CARGO_PKG_VERSION");
    let python = vllm.python.clone().unwrap_or_else(|| "python".to_owned());
    match &vllm.wheel {
        Wheel::Unknown => None,
        Wheel::Missing => Some(HostFault::NoWheel { release: vllm.release.clone(), python, ours }),
        Wheel::Installed { version } if version == ours => None,
        Wheel::Installed { version } => Some(HostFault::OtherWheel { theirs: version.clone(), python, ours }),
        Wheel::Broken { version, why } => {
            Some(HostFault::BrokenWheel { version: version.clone(), python, why: why.clone(), ours })
        }
    }
}

fn no_gpu(plan: &Plan, host: &Host) -> Option<HostFault> {
    let Gpus::Count(count) = host.gpus else { return None };
    let asked = plan.workers.iter().flat_map(|worker| worker.gpus.iter().map(|gpu| (worker.role, *gpu)));
    asked.into_iter().find(|(_, gpu)| *gpu >= count).map(|(role, gpu)| {
        let key = match role {
            Role::Prefill => "pd_disagg.prefill_gpu_ids",
            Role::Decode => "pd_disagg.decode_gpu_ids",
            Role::Both => "inference_gpu_ids",
        };
        HostFault::NoGpu { gpu, role: role.name(), key, count }
    })
}
