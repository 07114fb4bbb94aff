//! The whole configuration, and the answers that need more than one section.

use std::net::{IpAddr, Ipv4Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    All2AllBackend, ConnectorImpl, EngineKind, HostsConfig, InferenceConfig, KubernetesConfig, KvConfig, KvConnector,
    KvMemory, LauncherConfig, ModelConfig, OrchestratorConfig, Path, PdDisaggConfig, ProxyConfig, Role, SecurityConfig,
    SlurmConfig, TelemetryConfig, TrainerConfig, WeightBroadcastConfig, WeightBroadcastType, WeightsConfig,
};

/// The model that vLLM, and PRIME-RL, serve when none is named.
const VLLM_DEFAULT_MODEL: &str = "Qwen/Qwen3-0.6B";
/// The name under which the reference engine answers when none is given.
const REFERENCE_DEFAULT_MODEL: &str = "pdlink-reference";

/// Every setting of a run. Plain data: a part of the program is given its own section, never the whole.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
#[schemars(extend("x-shared-with" = "PRIME-RL"))]
pub struct Config {
    /// The model all parts share.
    pub model: ModelConfig,
    /// What each worker runs.
    pub inference: InferenceConfig,
    /// PRIME-RL's list of inference GPUs. With PD on it is not used: `[pd_disagg]` has the lists. With PD off each run of
    /// `[inference.parallel] tp` ids is one plain worker. Default: GPU 0 onwards, for `dp` workers.
    pub inference_gpu_ids: Option<Vec<u32>>,
    /// PRIME-RL's list of trainer GPUs: read only to count GPUs for weights by NCCL.
    pub trainer_gpu_ids: Option<Vec<u32>>,
    /// Prefill and decode apart.
    pub pd_disagg: PdDisaggConfig,
    /// The orchestrator's client.
    pub orchestrator: OrchestratorConfig,
    /// How new weights reach the workers.
    pub weight_broadcast: Option<WeightBroadcastConfig>,
    /// The trainer's copy of `[weight_broadcast]`.
    pub trainer: TrainerConfig,
    /// The HTTP front.
    pub proxy: ProxyConfig,
    /// The link between prefill and decode.
    pub kv: KvConfig,
    /// How `up` starts, watches and ends the workers.
    pub launcher: LauncherConfig,
    /// New weights into workers that serve.
    pub weights: WeightsConfig,
    /// A run on several hosts.
    pub hosts: HostsConfig,
    /// The head of a batch script, for `pdlink render slurm`.
    pub slurm: SlurmConfig,
    /// The manifests, for `pdlink render k8s`.
    pub kubernetes: KubernetesConfig,
    /// The run's secret.
    pub security: SecurityConfig,
    /// The log.
    pub telemetry: TelemetryConfig,
}

/// An argument of vLLM's that names a class for its workers.
const WORKER_EXTENSION: &str = "worker_extension_cls";

impl Config {
    /// The model to serve: `[inference.model] name`, else `[model] name`, else the engine's own default.
    pub fn model_name(&self) -> &str {
        let named = self.inference.model.name.as_deref().or(self.model.name.as_deref());
        named.unwrap_or(match self.inference.engine {
            EngineKind::Vllm => VLLM_DEFAULT_MODEL,
            EngineKind::Reference => REFERENCE_DEFAULT_MODEL,
        })
    }

    /// The host of every listener: `[pd_disagg] host` (with PD on), else `[inference.server] host`, else loopback.
    pub fn host(&self) -> &str {
        let pd_host = self.pd_disagg.host.as_deref().filter(|_| self.pd_disagg.enabled);
        pd_host.or(self.inference.server.host.as_deref()).unwrap_or("127.0.0.1")
    }

    /// The port of the front: `pd_disagg.proxy_port`, or `inference.server.port` with PD off.
    pub fn proxy_port(&self) -> u16 {
        if self.pd_disagg.enabled { self.pd_disagg.proxy_port } else { self.inference.server.port }
    }

    /// The roles that workers of this run have: prefill first, as vLLM ranks count them.
    pub fn roles(&self) -> &'static [Role] {
        if self.pd_disagg.enabled { &[Role::Prefill, Role::Decode] } else { &[Role::Both] }
    }

    /// Tensor-parallel ranks of one worker of a role.
    pub fn tp(&self, role: Role) -> u32 {
        let own = match role {
            Role::Prefill => self.pd_disagg.prefill_tp,
            Role::Decode => self.pd_disagg.decode_tp,
            Role::Both => None,
        };
        own.unwrap_or(self.inference.parallel.tp)
    }

    /// Nodes of the run; one where `[hosts]` names none.
    pub fn node_count(&self) -> usize {
        self.hosts.nodes.len().max(1)
    }

    /// The GPU ids of a role's workers on one node, in order; with the reference engine only slots. Each run of [`Self::tp`] is one
    /// worker.
    pub fn gpu_ids_on(&self, node: usize, role: Role) -> Vec<u32> {
        match self.hosts.nodes.get(node) {
            Some(node) => node.role_gpu_ids(role).to_vec(),
            None => self.gpu_ids_here(role),
        }
    }

    /// The same of all nodes, one after the other. Ids of different nodes may be the same.
    pub fn gpu_ids(&self, role: Role) -> Vec<u32> {
        (0..self.node_count()).flat_map(|node| self.gpu_ids_on(node, role)).collect()
    }

    fn gpu_ids_here(&self, role: Role) -> Vec<u32> {
        match (role, &self.inference_gpu_ids) {
            (Role::Prefill | Role::Decode, _) => self.pd_disagg.role_gpu_ids(role).to_vec(),
            (Role::Both, Some(ids)) => ids.clone(),
            (Role::Both, None) => {
                let count = self.inference.parallel.dp.saturating_mul(self.tp(role));
                (0..count).collect()
            }
        }
    }

    /// `all2all_backend` of a role's workers.
    pub fn all2all_backend(&self, role: Role) -> All2AllBackend {
        let own = match role {
            Role::Prefill => self.pd_disagg.prefill_all2all_backend,
            Role::Decode => self.pd_disagg.decode_all2all_backend,
            Role::Both => None,
        };
        own.unwrap_or(self.inference.all2all_backend)
    }

    /// The paths KV may take, best first: `[kv] paths`, else what the memory it lies in and the connector call for.
    /// `on_cpu`: vLLM is its build for the CPU. The reference engine always computes there.
    /// Those that this program does not have, or that do not move such memory, are left out.
    pub fn kv_paths(&self, on_cpu: bool) -> Vec<Path> {
        let memory = self.kv_memory(on_cpu);
        let wanted = match (&self.kv.paths, memory) {
            (Some(paths), _) => paths.as_slice(),
            (None, KvMemory::Host) => &[Path::Shm, Path::Tcp],
            (None, KvMemory::Gpu) => self.pd_disagg.kv_connector.preferred(),
        };
        wanted.iter().copied().filter(|path| path.moves(memory)).collect()
    }

    /// Where the KV of its workers lies.
    pub fn kv_memory(&self, on_cpu: bool) -> KvMemory {
        if on_cpu || self.inference.engine == EngineKind::Reference { KvMemory::Host } else { KvMemory::Gpu }
    }

    /// KV ports in a row that each worker of a role takes where ports are fixed: one for each process that listens. A reference
    /// worker and vLLM's NIXL side channel have one, our runtime in vLLM and vLLM's `P2pNcclConnector` one for each rank.
    pub fn fixed_kv_ports(&self, role: Role) -> u16 {
        let pd = &self.pd_disagg;
        match (self.inference.engine, role, pd.connector_impl, pd.kv_connector) {
            (EngineKind::Vllm, Role::Both, ..) => 0,
            (EngineKind::Reference, ..) | (EngineKind::Vllm, _, ConnectorImpl::Vllm, KvConnector::NixlConnector) => 1,
            (EngineKind::Vllm, _, ConnectorImpl::Native, _)
            | (EngineKind::Vllm, _, ConnectorImpl::Vllm, KvConnector::P2pNcclConnector) => {
                u16::try_from(self.tp(role).max(1)).unwrap_or(u16::MAX)
            }
        }
    }

    /// Whether vLLM's workers of a role take new weights from us; the reference engine's always do.
    pub fn vllm_takes_weights(&self, role: Role) -> bool {
        let is_wanted = self.weights.vllm_workers.unwrap_or_else(|| {
            let within = is_loopback(self.host()) && !self.hosts.has_several();
            self.has_vllm_runtime(role) && within && self.worker_extension(role).is_none()
        });
        self.inference.engine == EngineKind::Vllm && is_wanted
    }

    /// Whether vLLM's workers of a role have a KV runtime of ours.
    pub fn has_vllm_runtime(&self, role: Role) -> bool {
        let is_native = role != Role::Both && self.pd_disagg.connector_impl == ConnectorImpl::Native;
        self.inference.engine == EngineKind::Vllm && is_native
    }

    /// The class that `[inference.vllm]` adds to vLLM's workers.
    pub fn worker_extension(&self, role: Role) -> Option<Value> {
        self.inference.vllm.arg(role, WORKER_EXTENSION)
    }

    /// How weights reach the workers, wherever PRIME-RL's file says so.
    pub fn weight_broadcast_type(&self) -> WeightBroadcastType {
        let copies = [&self.weight_broadcast, &self.trainer.weight_broadcast, &self.inference.weight_broadcast];
        copies.iter().find_map(|copy| copy.as_ref()?.r#type).unwrap_or_default()
    }
}

/// Whether only this host reaches what listens there.
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse().unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)).is_loopback()
}
