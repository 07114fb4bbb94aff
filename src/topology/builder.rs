//! Makes the plan.

use std::collections::BTreeMap;

use super::cpu::{self, Share};
use super::placement::{self, Hosts, Place, Spot};
use super::plan::{LinkPlan, Plan, ProxyPlan, WorkerPlan, count, reach};
use super::ports::{Listener, PortError, PortWish, Ports};
use super::vllm::{NATIVE_FLOOR, NIXL_PUSH_FLOOR, P2P_NCCL_LAST, TESTED, VERSION_FLOOR, VllmProgram, VllmVersion};
use super::{experts, kv_transfer, reference, vllm_args};
use crate::config::{
    Config, ConnectorImpl, EngineKind, HOST_ENV, KvConnector, KvMemory, KvSendType, Path, Role, WeightBroadcastType,
};
use crate::security::SECRET_FILE_ENV;

/// From this version on vLLM refuses to load adapters at run time with several API servers.
const LORA_NEEDS_ONE_API_SERVER: VllmVersion = VllmVersion::new(0, 33);

/// What the plan must know about where it runs.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// Our own program.
    pub pdlink: &'a str,
    /// The `vllm` that workers run; needed with `engine = "vllm"` only.
    pub vllm: Option<&'a VllmProgram>,
    /// Cores that workers on the CPU may share.
    pub cores: &'a [u32],
    /// The file with the run's secret.
    pub secret_file: &'a str,
    /// Which node of the run this is.
    pub place: &'a Place,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error(transparent)]
    Port(#[from] PortError),
    #[error("the engine is vllm, and no vllm was looked for")]
    NoVllm,
    #[error("vLLM {version} is too old: pdlink knows {VERSION_FLOOR} and later, and is tested with {} to {}", TESTED.0, TESTED.1)]
    TooOld { version: VllmVersion },
    #[error(
        "vLLM {version} is too old for pdlink's connector, which needs {NATIVE_FLOOR} or later; update vLLM, or set \
         `pd_disagg.connector_impl = \"vllm\"`"
    )]
    TooOldForNative { version: VllmVersion },
    #[error(
        "vLLM {version} ships no NixlPushConnector; set `pd_disagg.kv_send_type = \"GET\"`, or use vLLM {NIXL_PUSH_FLOOR} or later"
    )]
    NoNixlPush { version: VllmVersion },
    #[error(
        "`kv.paths` asks for {wanted}, and vLLM {release} keeps its KV in {memory}, which this version does not move that way; set \
         it to some of {possible}, or `pd_disagg.connector_impl = \"vllm\"`"
    )]
    NoPath { wanted: String, release: String, memory: &'static str, possible: String },
    #[error(
        "vLLM {version} ships no P2pNcclConnector any more (the last that did was {P2P_NCCL_LAST}); set `pd_disagg.connector_impl = \
         \"native\"`, or `pd_disagg.kv_connector = \"NixlConnector\"`"
    )]
    P2pGone { version: VllmVersion },
    #[error(
        "`{}` has {count} GPU id(s), which do not make workers of {tp} for the {role} role; give a multiple of the role's `tp`, at \
         least one",
        gpu_list(role)
    )]
    GpuList { role: &'static str, count: usize, tp: u32 },
}

impl PlanError {
    /// The settings that it is about, the one to change first; none where the host is at fault.
    pub fn keys(&self) -> Vec<&str> {
        match self {
            Self::Port(PortError::Taken { key, .. } | PortError::NoneFree { key, .. }) => vec![key],
            Self::Port(_) | Self::NoVllm | Self::TooOld { .. } => Vec::new(),
            Self::TooOldForNative { .. } => vec!["pd_disagg.connector_impl", "pd_disagg.enabled"],
            Self::NoNixlPush { .. } => vec!["pd_disagg.kv_send_type"],
            Self::NoPath { .. } => vec!["kv.paths"],
            Self::P2pGone { .. } => vec!["pd_disagg.kv_connector", "pd_disagg.connector_impl"],
            Self::GpuList { role, .. } => vec![gpu_list(role)],
        }
    }

    /// Whether the configuration is at fault, rather than the host.
    pub fn is_configuration(&self) -> bool {
        !matches!(self, Self::Port(_) | Self::NoVllm | Self::TooOld { .. } | Self::TooOldForNative { .. })
    }
}

/// The list of a role's GPUs.
fn gpu_list(role: &str) -> &'static str {
    match role {
        "prefill" => "pd_disagg.prefill_gpu_ids",
        "decode" => "pd_disagg.decode_gpu_ids",
        _ => "inference_gpu_ids",
    }
}

/// Makes the plan of a checked configuration, and takes its ports.
pub fn plan(config: &Config, around: &Surroundings<'_>, ports: &mut dyn Ports) -> Result<Plan, PlanError> {
    let mut warnings = Vec::new();
    check_vllm(config, around, &mut warnings)?;
    let host = config.host().to_owned();
    let proxy = ProxyPlan { reach: reach(&host), port: take_proxy_port(config, ports)?, host };
    let nodes = placement::nodes(config, around.place);
    let spots = placement::spots(config)?;
    let kv_parallel_size = count(spots.len());
    let kv_paths = kv_paths(config, around)?;
    let mut workers = Vec::new();
    for (rank, spot) in spots.iter().enumerate() {
        // Workers on a CPU share the cores of their node; what other nodes have is told from this one.
        let ranks = placement::ranks_on(&spots, spot.node);
        let shares = if is_on_cpu(config, around) { cpu::shares(around.cores, &ranks) } else { Vec::new() };
        let earlier = spots[..rank].iter().filter(|other| other.node == spot.node).count();
        let share = shares.get(earlier).map(|share| (share, ranks.iter().sum()));
        let hosts = placement::hosts(config, &nodes, spot.node);
        let slot = Slot { spot: spot.clone(), hosts, kv_rank: count(rank), kv_parallel_size, share };
        workers.push(worker(config, around, &kv_paths, ports, slot)?);
    }
    Ok(Plan {
        model: config.model_name().to_owned(),
        world_size: world_size(config, &workers),
        link: link(config, kv_paths),
        notes: notes(config, around),
        workers,
        proxy,
        nodes,
        warnings,
    })
}

fn is_on_cpu(config: &Config, around: &Surroundings<'_>) -> bool {
    config.inference.engine == EngineKind::Vllm && around.vllm.is_some_and(|vllm| vllm.on_cpu)
}

/// The paths KV may take; refused where none of those that are named moves it.
fn kv_paths(config: &Config, around: &Surroundings<'_>) -> Result<Vec<Path>, PlanError> {
    let on_cpu = is_on_cpu(config, around);
    let paths = config.kv_paths(on_cpu);
    let has_runtime = config.pd_disagg.enabled && is_native(config) && config.inference.engine == EngineKind::Vllm;
    let (Some(vllm), Some(named), true, true) = (around.vllm, &config.kv.paths, has_runtime, paths.is_empty()) else {
        return Ok(paths);
    };
    let memory = config.kv_memory(on_cpu);
    Err(PlanError::NoPath {
        wanted: Path::list(named.iter().copied()),
        release: vllm.release.clone(),
        memory: memory.name(),
        possible: Path::list(Path::that_move(memory)),
    })
}

/// Paths that were named, exist, and do not suit the memory that KV lies in here.
fn unsuited_paths(config: &Config, on_cpu: bool) -> Option<String> {
    let (memory, other) = match config.kv_memory(on_cpu) {
        KvMemory::Host => (KvMemory::Host, KvMemory::Gpu),
        KvMemory::Gpu => (KvMemory::Gpu, KvMemory::Host),
    };
    let named = config.kv.paths.as_deref().unwrap_or_default().iter().copied();
    let unsuited: Vec<Path> = named.filter(|path| path.moves(other) && !path.moves(memory)).collect();
    let said = || {
        format!(
            "kv.paths: {} cannot move KV in {}, and is left out",
            Path::list(unsuited.iter().copied()),
            memory.name()
        )
    };
    (config.pd_disagg.enabled && is_native(config) && !unsuited.is_empty()).then(said)
}

/// Whether the run needs the `P2pNcclConnector` that vLLM itself used to ship.
pub fn needs_p2p_nccl(config: &Config) -> bool {
    let pd = &config.pd_disagg;
    let is_p2p = pd.kv_connector == KvConnector::P2pNcclConnector;
    pd.enabled && config.inference.engine == EngineKind::Vllm && pd.connector_impl == ConnectorImpl::Vllm && is_p2p
}

/// Whether the workers run a NIXL class that vLLM ships.
fn is_own_nixl(config: &Config) -> bool {
    let pd = &config.pd_disagg;
    pd.enabled && pd.connector_impl == ConnectorImpl::Vllm && pd.kv_connector == KvConnector::NixlConnector
}

fn needs_nixl_push(config: &Config) -> bool {
    is_own_nixl(config) && config.pd_disagg.send_type() != KvSendType::Get
}

fn check_vllm(config: &Config, around: &Surroundings<'_>, warnings: &mut Vec<String>) -> Result<(), PlanError> {
    if config.inference.engine != EngineKind::Vllm {
        return Ok(());
    }
    let version = around.vllm.ok_or(PlanError::NoVllm)?.version;
    if version < VERSION_FLOOR {
        return Err(PlanError::TooOld { version });
    }
    if needs_p2p_nccl(config) && version > P2P_NCCL_LAST {
        return Err(PlanError::P2pGone { version });
    }
    if config.pd_disagg.enabled && is_native(config) && version < NATIVE_FLOOR {
        return Err(PlanError::TooOldForNative { version });
    }
    if needs_nixl_push(config) && version < NIXL_PUSH_FLOOR {
        return Err(PlanError::NoNixlPush { version });
    }
    if version.is_untested() {
        let (from, to) = TESTED;
        warnings.push(format!("vLLM {version} is outside of the range pdlink is tested with ({from} to {to})"));
    }
    warnings.extend(config.roles().iter().flat_map(|role| experts::doubts(config, version, *role)));
    let inference = &config.inference;
    if inference.enable_lora && inference.api_server_count > 1 && version >= LORA_NEEDS_ONE_API_SERVER {
        warnings.push(format!(
            "vLLM {version} loads adapters at run time only with `inference.api_server_count = 1`, not {}",
            inference.api_server_count
        ));
    }
    Ok(())
}

fn take_proxy_port(config: &Config, ports: &mut dyn Ports) -> Result<u16, PortError> {
    let key = if config.pd_disagg.enabled { "pd_disagg.proxy_port" } else { "inference.server.port" };
    let (base, search) = (config.proxy_port(), config.pd_disagg.auto_ports);
    ports.take(PortWish { purpose: "proxy", key, base, count: 1, search, node: 0, of: Listener::Front })
}

struct Slot<'a> {
    spot: Spot,
    hosts: Hosts,
    kv_rank: u32,
    kv_parallel_size: u32,
    /// On a CPU: its cores, and the ranks of all workers.
    share: Option<(&'a Share, u32)>,
}

fn worker(
    config: &Config,
    around: &Surroundings<'_>,
    kv_paths: &[Path],
    ports: &mut dyn Ports,
    slot: Slot<'_>,
) -> Result<WorkerPlan, PlanError> {
    let Hosts { host, reach, kv_host, kv_reach } = slot.hosts.clone();
    let port = take_http_port(config, ports, &slot.spot)?;
    let kv_ports = take_kv_ports(config, ports, &slot.spot)?;
    let Spot { role, index, node, gpus } = slot.spot.clone();
    let engine = config.inference.engine;
    let weights_ports = take_weights_ports(config, ports, &slot.spot)?;
    let mut env = BTreeMap::new();
    if slot.share.is_none() {
        env.insert("CUDA_VISIBLE_DEVICES".to_owned(), list(&gpus));
        // So that an id means what `nvidia-smi` calls it, also where GPUs differ.
        env.insert("CUDA_DEVICE_ORDER".to_owned(), "PCI_BUS_ID".to_owned());
    }
    let has_runtime = engine == EngineKind::Reference || (role != Role::Both && is_native(config));
    if has_runtime || !weights_ports.is_empty() {
        env.insert(SECRET_FILE_ENV.to_owned(), around.secret_file.to_owned());
    }
    let command = match engine {
        EngineKind::Reference => {
            let kv_port = kv_ports.first().copied().unwrap_or(0);
            let seat = reference::Seat { role, host: &host, kv_host: &kv_host, port, kv_port };
            reference::command(around.pdlink, config, &seat)
        }
        EngineKind::Vllm => {
            let (kv_rank, kv_parallel_size) = (slot.kv_rank, slot.kv_parallel_size);
            let cpu = slot.share.map(|(share, ranks)| kv_transfer::CpuSeat { share, ranks });
            let seat = kv_transfer::Seat {
                role,
                kv_rank,
                kv_parallel_size,
                reach: &reach,
                kv_reach: &kv_reach,
                port,
                kv_ports: &kv_ports,
                weights_ports: &weights_ports,
                kv_paths,
                cpu,
            };
            env.extend(vllm_args::env(config, &seat));
            vllm_args::command(around.vllm.ok_or(PlanError::NoVllm)?, config, &host, &seat)
        }
    };
    let uses = |path| role != Role::Both && uses(config, kv_paths, path);
    if config.hosts.is_given() {
        env.insert(HOST_ENV.to_owned(), host_mark(config, node));
        env.extend(placement::network_hints(around.place, &gpus, uses));
    }
    if uses(Path::Nixl) {
        env.extend(config.kv.nixl.env.clone());
    }
    env.extend(config.pd_disagg.env(role).into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())));
    Ok(WorkerPlan {
        role,
        index,
        node,
        engine,
        gpus,
        host,
        reach,
        kv_reach,
        port,
        kv_port: kv_ports.first().copied(),
        kv_ports,
        weights_ports,
        has_runtime,
        command,
        env,
    })
}

/// Whether KV of this run may go by a path, whoever's connector has it.
fn uses(config: &Config, kv_paths: &[Path], path: Path) -> bool {
    let of_vllm = match path {
        Path::Nixl => is_own_nixl(config),
        Path::Nccl => needs_p2p_nccl(config),
        Path::CudaIpc | Path::Shm | Path::Tcp => false,
    };
    kv_paths.contains(&path) || of_vllm
}

/// What no worker of another node has.
fn host_mark(config: &Config, node: usize) -> String {
    format!("node {node} at {}", config.hosts.address(node).unwrap_or_default())
}

fn is_native(config: &Config) -> bool {
    config.pd_disagg.connector_impl == ConnectorImpl::Native
}

fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn base(first: u16, index: u32) -> u16 {
    first.saturating_add(u16::try_from(index).unwrap_or(u16::MAX))
}

fn take_http_port(config: &Config, ports: &mut dyn Ports, spot: &Spot) -> Result<u16, PortError> {
    let purpose = format!("HTTP port of {} {}", spot.role.name(), spot.index);
    let key = if spot.role == Role::Prefill { "pd_disagg.prefill_port" } else { "pd_disagg.decode_port" };
    let base = base(config.pd_disagg.base_port(spot.role), spot.index);
    ports.take(PortWish {
        purpose: &purpose,
        key,
        base,
        count: 1,
        search: config.pd_disagg.auto_ports,
        node: spot.node,
        of: Listener::Http,
    })
}

/// One KV port for each process that listens. Fixed ports stand in a row, worker after worker. Where ports may be searched for,
/// the ranks of our runtime take what is free: each is told the others' ports. vLLM's `P2pNcclConnector` counts on a row.
fn take_kv_ports(config: &Config, ports: &mut dyn Ports, spot: &Spot) -> Result<Vec<u16>, PortError> {
    let pd = &config.pd_disagg;
    let count = config.fixed_kv_ports(spot.role);
    if count == 0 {
        return Ok(Vec::new());
    }
    let (row, step) = match (pd.auto_ports, pd.connector_impl) {
        (false, _) => (count, count),
        (true, ConnectorImpl::Vllm) => (count, 1),
        (true, ConnectorImpl::Native) => (1, 1),
    };
    let purpose = format!("KV port of {} {}", spot.role.name(), spot.index);
    let key = if spot.role == Role::Prefill { "pd_disagg.prefill_kv_port" } else { "pd_disagg.decode_kv_port" };
    let base = base(pd.base_kv_port(spot.role), spot.index.saturating_mul(step.into()));
    let first = ports.take(PortWish {
        purpose: &purpose,
        key,
        base,
        count: row,
        search: pd.auto_ports,
        node: spot.node,
        of: Listener::Kv,
    })?;
    let mut taken: Vec<u16> = (0..row).map(|rank| first.saturating_add(rank)).collect();
    for _ in row..count {
        taken.push(ports.take(PortWish {
            purpose: &purpose,
            key,
            base: 0,
            count: 1,
            search: true,
            node: spot.node,
            of: Listener::Kv,
        })?);
    }
    Ok(taken)
}

/// Doors for orders about weights, of ranks that have no KV runtime of ours: nobody else has to know these ports beforehand.
fn take_weights_ports(config: &Config, ports: &mut dyn Ports, spot: &Spot) -> Result<Vec<u16>, PortError> {
    if !config.vllm_takes_weights(spot.role) || config.has_vllm_runtime(spot.role) {
        return Ok(Vec::new());
    }
    let purpose = format!("weights port of {} {}", spot.role.name(), spot.index);
    let key = "weights.vllm_workers";
    let of = if config.hosts.is_given() { Listener::Kv } else { Listener::Http };
    let wish = PortWish { purpose: &purpose, key, base: 0, count: 1, search: true, node: spot.node, of };
    let take = |_: &u32| ports.take(wish);
    spot.gpus.iter().map(take).collect()
}

/// Ranks of a broadcast over all workers: the trainer's, and one per GPU.
fn world_size(config: &Config, workers: &[WorkerPlan]) -> Option<u32> {
    let ranks: usize = workers.iter().map(|worker| worker.gpus.len()).sum();
    (config.weight_broadcast_type() == WeightBroadcastType::Nccl).then(|| count(ranks + 1))
}

fn link(config: &Config, kv_paths: Vec<Path>) -> Option<LinkPlan> {
    let has_runtime = is_native(config) || config.inference.engine == EngineKind::Reference;
    let paths = if has_runtime { kv_paths } else { Vec::new() };
    config.pd_disagg.enabled.then_some(LinkPlan {
        connector: config.pd_disagg.kv_connector,
        connector_impl: config.pd_disagg.connector_impl,
        send_type: config.pd_disagg.send_type(),
        paths,
    })
}

fn notes(config: &Config, around: &Surroundings<'_>) -> Vec<String> {
    let mut notes = Vec::from_iter(unsuited_paths(config, is_on_cpu(config, around)));
    if let Some(vllm) = around.vllm.filter(|_| is_on_cpu(config, around)) {
        notes.push(format!("vLLM {} computes on the CPU: GPU ids only number the workers", vllm.release));
        let ranks: usize = config.roles().iter().map(|role| config.gpu_ids(*role).len()).sum();
        if is_own_nixl(config) && around.cores.len() < 2 * ranks {
            notes.push(format!(
                "NIXL keeps a core busy for each rank, idle or not: {ranks} ranks on {} cores may starve each other",
                around.cores.len()
            ));
        }
    }
    if config.inference.engine == EngineKind::Reference {
        notes.push("engine = \"reference\": GPU ids only number the workers, no GPU is used".to_owned());
    }
    if !config.pd_disagg.enabled {
        notes.push("pd_disagg.enabled = false: plain workers, each prefills and decodes by itself".to_owned());
    }
    notes
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// Every port is free.
    struct AnyPort(u16);

    impl Ports for AnyPort {
        fn take(&mut self, _wish: PortWish<'_>) -> Result<u16, PortError> {
            self.0 += 10;
            Ok(self.0)
        }
    }

    fn planned(config: &Config) -> Plan {
        let vllm = VllmProgram::new(vec!["vllm".to_owned()], "0.33.0").expect("a version");
        let around = Surroundings {
            pdlink: "pdlink",
            vllm: Some(&vllm),
            cores: &[],
            secret_file: "secret",
            place: &Place::default(),
        };
        plan(config, &around, &mut AnyPort(20_000)).expect("a plan")
    }

    fn named() -> Config {
        let mut config = Config::default();
        config.inference.model.name = Some("M".to_owned());
        config
    }

    fn told(worker: &WorkerPlan) -> Option<Value> {
        worker.env.get("PDLINK_WEIGHTS").map(|text| text.parse().expect("JSON"))
    }

    /// The class that the second worker is given, if it takes weights from us.
    fn class(config: &Config) -> (Option<String>, bool) {
        let worker = planned(config).workers.remove(1);
        let takes = worker.env.contains_key("VLLM_SERVER_DEV_MODE");
        assert_eq!(takes, told(&worker).is_some());
        if let Some(told) = told(&worker) {
            assert_eq!(told["http"], format!("http://127.0.0.1:{}", worker.port));
            assert_eq!(told["weights"]["in_flight"], "continue");
            assert_eq!(told["kv"]["transfer_timeout_ms"], config.kv.transfer_timeout_ms);
        }
        assert!(worker.weights_ports.is_empty(), "the KV link's listener is the door");
        let at = worker.command.iter().position(|word| word == "--worker-extension-cls");
        (at.map(|at| worker.command[at + 1].clone()), takes)
    }

    #[test]
    fn vllms_workers_take_weights_where_nobody_else_can_call_them() {
        let ours = || Some("pdlink.vllm.weights.WeightsExtension".to_owned());
        let mut config = named();
        config.pd_disagg.enabled = true;
        (config.pd_disagg.prefill_gpu_ids, config.pd_disagg.decode_gpu_ids) = (vec![0], vec![1]);
        assert_eq!(class(&config), (ours(), true));
        config.pd_disagg.host = Some("0.0.0.0".to_owned());
        assert_eq!(class(&config), (None, false));
        config.weights.vllm_workers = Some(true);
        assert_eq!(class(&config), (ours(), true));
        config.inference.vllm.all.insert("worker-extension-cls".to_owned(), json!("mine.Derived"));
        assert_eq!(class(&config), (Some("mine.Derived".to_owned()), true));
        (config.weights.vllm_workers, config.pd_disagg.host) = (None, None);
        assert_eq!(class(&config), (Some("mine.Derived".to_owned()), false));
    }

    #[test]
    fn what_kv_says_of_nccl_holds_for_broadcasts_also_where_kv_goes_another_way() {
        let mut config = named();
        config.pd_disagg.enabled = true;
        (config.pd_disagg.prefill_gpu_ids, config.pd_disagg.decode_gpu_ids) = (vec![0], vec![1]);
        config.kv.paths = Some(vec![Path::CudaIpc]);
        config.weights.paths = vec![Path::Nccl, Path::CudaIpc];
        config.kv.nccl.multiprocessors = 7;
        let told = told(&planned(&config).workers[0]).expect("settings");
        assert_eq!((&told["kv"]["nccl"]["multiprocessors"], &told["kv"]["nixl"]), (&json!(7), &Value::Null));
    }

    #[test]
    fn workers_without_our_runtime_have_doors_of_their_own_for_weights() {
        let mut config = named();
        config.inference.parallel.tp = 2;
        config.inference_gpu_ids = Some(vec![0, 1]);
        assert!(told(&planned(&config).workers[0]).is_none(), "not unless it is wanted");
        config.weights.vllm_workers = Some(true);
        let plan = planned(&config);
        let worker = &plan.workers[0];
        let told = told(worker).expect("settings");
        assert_eq!((&told["ports"], &told["host"]), (&json!(worker.weights_ports), &json!("127.0.0.1")));
        assert_eq!(worker.weights_ports.len(), 2);
        assert_eq!(worker.env[SECRET_FILE_ENV], "secret");
    }
}
