//! What the checks are about: the configuration, the plan that it makes on this machine, and what that needs.

use std::sync::Arc;
use std::time::Duration;

use super::deployment::Target;
use super::probe::{self, Order};
use crate::config::{Config, ConnectorImpl, EngineKind, KvConnector, KvMemory, LoadError, Loaded, Path, Role};
use crate::ffi::cuda::Survey;
use crate::launcher::machine;
use crate::launcher::nodes::site;
use crate::launcher::vllm::program::{self, VllmError};
use crate::topology::host::Host;
use crate::topology::ports::{Listener, PortError, PortWish, Ports};
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
    /// Which node of `[hosts]` this is, or why that is not known.
    pub(super) place: Result<Place, String>,
    /// What NVIDIA's driver tells of its GPUs, or why it tells nothing.
    pub(super) survey: Result<Survey, String>,
    pub(super) plan: Option<Result<Plan, PlanError>>,
    /// Ports that the plan wishes for on this host.
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
    /// Where it is to listen.
    pub(super) host: String,
    pub(super) base: u16,
    pub(super) count: u16,
    pub(super) search: bool,
}

impl Setting {
    /// Looks at what was given, and makes the plan as `pdlink up` would, without taking a port.
    /// `node`: which node of `[hosts]` this is, as the command line says.
    pub fn new(
        loaded: Option<Result<Loaded, LoadError>>,
        node: Option<usize>,
        target: Option<Target>,
    ) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let config = loaded.as_ref().and_then(|loaded| loaded.as_ref().ok()).map(|loaded| &loaded.config);
        let model = config.map_or("", |config| config.model_name());
        let (host, vllm, place) = runtime.block_on(async {
            let looking = async {
                match config {
                    Some(config) if config.inference.engine == EngineKind::Vllm => Some(find_vllm(config).await),
                    _ => None,
                }
            };
            tokio::join!(machine::look(model), looking, find_place(config, node))
        });
        let survey = probe::ask(&Order::Gpus, &[], LOOK_MAX).map_err(|error| format!("{error:#}"));
        let (mut ports, anywhere) = (Vec::new(), Place::default());
        let own = place.as_ref().unwrap_or(&anywhere);
        let make = |config| {
            let mut listed = Listed { config, place: place.as_ref().ok(), wishes: &mut ports };
            make_plan(config, vllm.as_ref(), &host, own, &mut listed)
        };
        let plan = config.map(make).transpose()?;
        ports.extend(config.zip(place.as_ref().ok()).and_then(|(config, place)| of_nodes(config, place)));
        Ok(Self { loaded, vllm, host, place, survey, plan, ports, corrupts: None, target })
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

    /// The GPUs of this host that a role's workers have, in order; with the reference engine only slots.
    pub(super) fn gpu_ids(&self, role: Role) -> Vec<u32> {
        match (self.config(), &self.place) {
            (Some(config), Ok(place)) => config.gpu_ids_on(place.node, role),
            _ => Vec::new(),
        }
    }

    /// The same, as CUDA counts them.
    pub(super) fn ordinals(&self, role: Role) -> Vec<i32> {
        self.gpu_ids(role).into_iter().filter_map(|id| i32::try_from(id).ok()).collect()
    }

    /// Workers of a role on this host.
    fn workers(&self, role: Role) -> usize {
        let tp = self.config().map_or(1, |config| config.tp(role).max(1));
        self.gpu_ids(role).len() / usize::try_from(tp).unwrap_or(1)
    }

    /// Workers on this host, and ranks of them all.
    pub(super) fn workers_and_ranks(&self) -> (usize, usize) {
        let roles = self.config().map_or(&[][..], Config::roles);
        let of = |role: &Role| (self.workers(*role), self.gpu_ids(*role).len());
        roles.iter().map(of).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }

    /// The plan's part that runs on this host.
    pub(super) fn share(&self) -> Option<Plan> {
        let (plan, place) = (self.plan.as_ref()?.as_ref().ok()?, self.place.as_ref().ok()?);
        Some(plan.share(place.node))
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
    place: &Place,
    ports: &mut Listed<'_>,
) -> anyhow::Result<Result<Plan, PlanError>> {
    let version = if needs_p2p_nccl(config) { P2P_NCCL_LAST } else { TESTED.1 };
    let assumed = VllmProgram::new(vec!["vllm".to_owned()], &format!("{version}.0"));
    let vllm = match vllm {
        Some(Ok(found)) => Some(found),
        Some(Err(_)) => assumed.as_ref(),
        None => None,
    };
    let pdlink = std::env::current_exe()?.to_string_lossy().into_owned();
    let around = Surroundings { pdlink: &pdlink, vllm, cores: &host.cores, secret_file: "secret", place };
    Ok(plan(config, &around, ports))
}

/// Why this host has no place among the nodes, if it has none.
async fn find_place(config: Option<&Config>, node: Option<usize>) -> Result<Place, String> {
    let Some(config) = config else { return Ok(Place::default()) };
    let site = site::look(config, node).await.map_err(|error| error.to_string())?;
    match site.no_network {
        Some(error) => Err(format!("node {}: {error}", site.place.node)),
        None => Ok(site.place),
    }
}

/// Where node 0 hears the others.
fn of_nodes(config: &Config, place: &Place) -> Option<Wish> {
    let hosts = Some(&config.hosts).filter(|hosts| hosts.has_several() && place.node == 0)?;
    let (purpose, key) = ("control connection of the nodes".to_owned(), "hosts.port".to_owned());
    let host = hosts.address(0).unwrap_or_default().to_owned();
    Some(Wish { purpose, key, host, base: hosts.port, count: 1, search: false })
}

/// Writes down what is wished for on this host, and gives it without looking.
struct Listed<'a> {
    config: &'a Config,
    place: Option<&'a Place>,
    wishes: &'a mut Vec<Wish>,
}

impl Ports for Listed<'_> {
    fn take(&mut self, wish: PortWish<'_>) -> Result<u16, PortError> {
        let PortWish { purpose, key, base, count, search, node, of } = wish;
        if let Some(place) = self.place.filter(|place| place.node == node) {
            let (http, kv) = place.own_hosts(self.config);
            let host = match of {
                Listener::Front => self.config.host(),
                Listener::Http => http,
                Listener::Kv => kv,
            };
            let (purpose, key, host) = (purpose.to_owned(), key.to_owned(), host.to_owned());
            self.wishes.push(Wish { purpose, key, host, base, count, search });
        }
        Ok(base)
    }
}

/// What every check holds.
pub(super) type Shared = Arc<Setting>;
