//! What the checks are about: the configuration, the plan that it makes on this machine, and what that needs.

use std::sync::Arc;
use std::time::Duration;

use super::deployment::Target;
use super::probe::{self, Order};
use crate::config::{Config, ConnectorImpl, EngineKind, KvConnector, KvMemory, LoadError, Loaded, Path, Role};
use crate::ffi::cuda::Survey;
use crate::launcher::machine;
use crate::launcher::vllm::program::{self, VllmError};
use crate::topology::host::Host;
use crate::topology::ports::{PortError, PortWish, Ports};
use crate::topology::vllm::{P2P_NCCL_LAST, TESTED, VllmProgram};
use crate::topology::{Place, Plan, PlanError, Surroundings, needs_p2p_nccl, plan};

/// How long the look for vLLM may take before it is given up: its Python states versions, nothing is imported.
const LOOK_MAX: Duration = Duration::from_secs(10);

/// What was given, and what follows from it.
pub struct Setting {
    /// `None`: no configuration was given.
    pub(super) loaded: Option<Result<Loaded, LoadError>>,
    /// The `vllm` that workers would run; `None` where no worker runs one.
    pub(super) vllm: Option<Result<VllmProgram, VllmError>>,
    pub(super) host: Host,
    /// What NVIDIA's driver tells of its GPUs, or why it tells nothing.
    pub(super) survey: Result<Survey, String>,
    pub(super) plan: Option<Result<Plan, PlanError>>,
    /// Ports that the plan wishes for.
    pub(super) ports: Vec<Wish>,
    /// The path whose canary gets a wrong run on its way, to see that it is found.
    pub(super) corrupts: Option<Path>,
    /// A deployment of this configuration that runs.
    pub(super) target: Option<Target>,
}

/// Some ports in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) purpose: String,
    pub(super) key: String,
    pub(super) base: u16,
    pub(super) count: u16,
    pub(super) search: bool,
}

impl Setting {
    /// Looks at what was given, and makes the plan as `pdlink up` would, without taking a port.
    pub fn new(loaded: Option<Result<Loaded, LoadError>>, target: Option<Target>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let config = loaded.as_ref().and_then(|loaded| loaded.as_ref().ok()).map(|loaded| &loaded.config);
        let model = config.map_or("", |config| config.model_name());
        let (host, vllm) = runtime.block_on(async {
            let looking = async {
                match config {
                    Some(config) if config.inference.engine == EngineKind::Vllm => Some(find_vllm(config).await),
                    _ => None,
                }
            };
            tokio::join!(machine::look(model), looking)
        });
        let survey = probe::ask(&Order::Gpus, &[], LOOK_MAX).map_err(|error| format!("{error:#}"));
        let mut ports = Listed::default();
        let plan = config.map(|config| make_plan(config, vllm.as_ref(), &host, &mut ports)).transpose()?;
        Ok(Self { loaded, vllm, host, survey, plan, ports: ports.0, corrupts: None, target })
    }

    /// The same, with a wrong run on the way of one path's canary.
    #[must_use]
    pub fn corrupting(self, path: Option<Path>) -> Self {
        Self { corrupts: path, ..self }
    }

    /// The configuration, where one was given and can be used.
    pub(super) fn config(&self) -> Option<&Config> {
        Some(&self.loaded.as_ref()?.as_ref().ok()?.config)
    }

    /// Whether vLLM is its build for the CPU.
    pub(super) fn on_cpu(&self) -> bool {
        matches!(&self.vllm, Some(Ok(vllm)) if vllm.on_cpu)
    }

    /// Where KV lies; `None` without a configuration.
    pub(super) fn memory(&self) -> Option<KvMemory> {
        self.config().map(|config| config.kv_memory(self.on_cpu()))
    }

    /// Whether workers have a runtime of ours that moves KV.
    pub(super) fn has_link(&self) -> bool {
        let native = |config: &Config| {
            config.inference.engine == EngineKind::Reference || config.pd_disagg.connector_impl == ConnectorImpl::Native
        };
        self.config().is_some_and(|config| config.pd_disagg.enabled && native(config))
    }

    /// The paths of ours that the configuration allows; none without one.
    pub(super) fn paths(&self) -> Vec<Path> {
        let paths = |config: &Config| config.kv_paths(self.on_cpu());
        if self.has_link() { self.config().map(paths).unwrap_or_default() } else { Vec::new() }
    }

    pub(super) fn allows(&self, path: Path) -> bool {
        self.paths().contains(&path)
    }

    /// Whether the workers run a NIXL class that vLLM ships, with the library of its environment.
    pub(super) fn uses_own_nixl(&self) -> bool {
        self.config().is_some_and(|config| {
            let pd = &config.pd_disagg;
            pd.enabled
                && config.inference.engine == EngineKind::Vllm
                && pd.connector_impl == ConnectorImpl::Vllm
                && pd.kv_connector == KvConnector::NixlConnector
        })
    }

    /// Whether anything configured goes over NIXL.
    pub(super) fn needs_nixl(&self) -> bool {
        self.allows(Path::Nixl) || self.uses_own_nixl()
    }

    /// How many GPUs this machine has.
    pub(super) fn gpus(&self) -> usize {
        self.survey.as_ref().map_or(0, |survey| survey.gpus.len())
    }

    /// Whether workers compute on GPUs.
    pub(super) fn needs_gpus(&self) -> bool {
        self.config().is_some_and(|config| config.inference.engine == EngineKind::Vllm) && !self.on_cpu()
    }

    /// Workers, and ranks of them all.
    pub(super) fn workers_and_ranks(&self) -> (usize, usize) {
        let Some(config) = self.config() else { return (0, 0) };
        let of = |role: &Role| {
            let ranks = config.gpu_ids(*role).len();
            (ranks / usize::try_from(config.tp(*role).max(1)).unwrap_or(1), ranks)
        };
        config.roles().iter().map(of).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }
}

async fn find_vllm(config: &Config) -> Result<VllmProgram, VllmError> {
    let (pdlink, path) = (std::env::current_exe().unwrap_or_default(), std::env::var_os("PATH"));
    let envs: Vec<_> = config.roles().iter().filter_map(|role| config.pd_disagg.env(*role)).collect();
    let given = config.launcher.vllm_program.as_deref();
    let finding = program::find(given, &pdlink, path.as_deref(), &envs);
    let silent = || VllmError::Silent {
        program: given.map_or_else(|| "vllm".into(), std::path::Path::to_owned),
        what: "asked for its version",
    };
    tokio::time::timeout(LOOK_MAX, finding).await.unwrap_or_else(|_| Err(silent()))
}

/// The plan; with the newest vLLM that has the connector where none was found, so that the rest can be looked at all the same.
fn make_plan(
    config: &Config,
    vllm: Option<&Result<VllmProgram, VllmError>>,
    host: &Host,
    ports: &mut Listed,
) -> anyhow::Result<Result<Plan, PlanError>> {
    let version = if needs_p2p_nccl(config) { P2P_NCCL_LAST } else { TESTED.1 };
    let assumed = VllmProgram::new(vec!["vllm".to_owned()], &format!("{version}.0"));
    let vllm = match vllm {
        Some(Ok(found)) => Some(found),
        Some(Err(_)) => assumed.as_ref(),
        None => None,
    };
    let pdlink = std::env::current_exe()?.to_string_lossy().into_owned();
    let around =
        Surroundings { pdlink: &pdlink, vllm, cores: &host.cores, secret_file: "secret", place: &Place::default() };
    Ok(plan(config, &around, ports))
}

/// Writes down what is wished for, and gives it without looking.
#[derive(Default)]
struct Listed(Vec<Wish>);

impl Ports for Listed {
    fn take(&mut self, wish: PortWish<'_>) -> Result<u16, PortError> {
        let PortWish { purpose, key, base, count, search, .. } = wish;
        self.0.push(Wish { purpose: purpose.to_owned(), key: key.to_owned(), base, count, search });
        Ok(base)
    }
}

/// What every check holds.
pub(super) type Shared = Arc<Setting>;
