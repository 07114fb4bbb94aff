//! Checks of the libraries that are not ours. Each is opened in a process of its own, with the variables that workers get.

mod agents;
mod nccl;
mod nixl;
mod tls;
mod ucx;

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::check::{Answer, Check, Group};
use super::probe::{NixlFound, NixlWish, Order, Probe};
use super::setting::{Setting, Shared};
use crate::config::{Config, NixlConfig};

/// Longest for opening a library: from a cold disk, on a busy machine.
const OPEN: Duration = Duration::from_secs(10);
/// Longest for a check that opens one several times, or waits for another check that does.
const SEVERAL: Duration = Duration::from_secs(20);

pub(super) fn checks(setting: &Shared) -> Vec<Check> {
    let libraries = Arc::new(Libraries { setting: setting.clone(), nixl: OnceLock::new() });
    let check = |name: &str, ask: fn(&Libraries) -> Answer| {
        let libraries = libraries.clone();
        Check::new(Group::Libraries, name, SEVERAL, move || ask(&libraries))
    };
    vec![
        check("nixl", nixl::check),
        check("ucx-transports", ucx::transports),
        check("ucx-copies", ucx::copies),
        check("ucx-tls", tls::check),
        check("nixl-gpu-memory", ucx::gpu_memory),
        check("nixl-together", agents::together),
        check("nixl-restart", agents::restart),
        check("nccl", nccl::check),
    ]
}

/// What the checks of this group share: NIXL is opened once, by the check that comes first.
struct Libraries {
    setting: Shared,
    nixl: OnceLock<Result<Looked, String>>,
}

/// NIXL as it was found, and what it and UCX said meanwhile.
struct Looked {
    found: NixlFound,
    said: String,
}

impl Libraries {
    fn nixl(&self) -> Result<&Looked, &str> {
        self.nixl.get_or_init(|| self.look().map_err(|error| format!("{error:#}"))).as_ref().map_err(String::as_str)
    }

    fn look(&self) -> anyhow::Result<Looked> {
        let gpu = (self.setting.gpus() > 0).then_some(0);
        let mut probe = Probe::start(&Order::Nixl { wish: self.wish(), gpu }, &self.variables())?;
        let found = probe.answer(OPEN)?;
        Ok(Looked { found, said: probe.said() })
    }

    /// The library that workers would open.
    fn wish(&self) -> NixlWish {
        wish(&self.setting)
    }

    fn variables(&self) -> Vec<(String, String)> {
        variables(&self.setting)
    }

    /// Why a check of NIXL says nothing: the check `nixl` has said it.
    fn no_nixl(&self) -> Answer {
        Answer::skipped("there is no NIXL to look at; see nixl")
    }
}

fn nixl_config(setting: &Setting) -> NixlConfig {
    setting.config().map(|config| config.kv.nixl.clone()).unwrap_or_default()
}

/// NCCL's library as workers would open it.
pub(super) fn nccl_library(setting: &Setting) -> anyhow::Result<Option<PathBuf>> {
    Ok(Some(nccl::look(setting)?.library).filter(|library| library.is_absolute()))
}

/// `[kv.nixl]`, and the environments that workers look into: the one that is active, and that of their vLLM.
pub(super) fn wish(setting: &Setting) -> NixlWish {
    let NixlConfig { library, environment, backend, parameters, .. } = nixl_config(setting);
    let named = environment.is_some();
    let mut environments: Vec<PathBuf> = environment.into_iter().collect();
    if !named {
        environments.extend(active_environments(setting));
    }
    NixlWish { library, environments, backend, parameters: parameters.into_iter().collect() }
}

/// The library that workers would open; `None` leaves it to the loader.
pub(super) fn library(setting: &Setting) -> anyhow::Result<Option<PathBuf>> {
    let order = Order::Nixl { wish: wish(setting), gpu: None };
    let found: NixlFound = Probe::start(&order, &variables(setting))?.answer(OPEN)?;
    Ok(Some(found.library).filter(|library| library.is_absolute()))
}

/// Python environments, most wanted first: that of the vLLM that was found, the active one, and the one we are in.
fn active_environments(setting: &Setting) -> Vec<PathBuf> {
    let of_program = |program: &Path| Some(program.parent()?.parent()?.to_owned());
    let vllm = setting.vllm.as_ref().and_then(|vllm| vllm.as_ref().ok()?.python.clone());
    let vllm = vllm.and_then(|python| of_program(Path::new(&python)));
    let active = std::env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let own = std::env::current_exe().ok().and_then(|own| of_program(&own));
    let mut found = Vec::new();
    for environment in [vllm, active, own].into_iter().flatten() {
        if !found.contains(&environment) {
            found.push(environment);
        }
    }
    found
}

/// What `pdlink up` adds to the environment of a decode worker, as far as NIXL reads it.
pub(super) fn variables(setting: &Setting) -> Vec<(String, String)> {
    let of_role = |config: &Config| config.pd_disagg.decode_env.clone();
    let mut variables = nixl_config(setting).env;
    variables.extend(setting.config().map(of_role).unwrap_or_default());
    variables.into_iter().collect()
}
