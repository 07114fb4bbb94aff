//! `[pd_disagg]`: which workers prefill, which decode, and how KV goes between them.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{All2AllBackend, Path, Role};

/// The connector's name, as PRIME-RL and vLLM know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum KvConnector {
    /// Prefers `cuda-ipc`, then `nccl`.
    #[default]
    P2pNcclConnector,
    /// Prefers `nixl`.
    NixlConnector,
}

impl KvConnector {
    /// The name used in configuration, in vLLM's own settings and in the ready line.
    pub fn name(self) -> &'static str {
        match self {
            Self::P2pNcclConnector => "P2pNcclConnector",
            Self::NixlConnector => "NixlConnector",
        }
    }

    /// What it prefers for KV in GPU memory, best first, whether this program has the path or not.
    pub fn preferred(self) -> &'static [Path] {
        match self {
            Self::P2pNcclConnector => &[Path::CudaIpc, Path::Nccl],
            Self::NixlConnector => &[Path::Nixl],
        }
    }
}

/// Whose code stands behind the connector's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConnectorImpl {
    /// pdlink's runtime.
    #[default]
    Native,
    /// The class that vLLM itself ships under that name.
    Vllm,
}

impl ConnectorImpl {
    /// The name used in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Vllm => "vllm",
        }
    }
}

/// Who drives the copy of the KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum KvSendType {
    /// Prefill pushes as soon as decode names its blocks, without holding up its next step.
    #[default]
    PutAsync,
    /// Prefill pushes when it is done, into the blocks that decode has named.
    Put,
    /// Decode pulls when prefill is done.
    Get,
}

impl KvSendType {
    /// The name used in configuration and in vLLM's own settings.
    pub fn name(self) -> &'static str {
        match self {
            Self::PutAsync => "PUT_ASYNC",
            Self::Put => "PUT",
            Self::Get => "GET",
        }
    }
}

/// Prefill and decode apart. Each run of `tp` ids in a list is one worker: `[0, 1, 2, 3]` with 2 ranks is `[0, 1]` and `[2, 3]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct PdDisaggConfig {
    /// Whether prefill and decode run apart. Default false: plain workers behind the same proxy.
    pub enabled: bool,
    /// GPUs of the prefill workers. Needed with `enabled`. With the reference engine the ids are only worker slots: as many
    /// workers as runs of `tp` ids, and no GPU is touched.
    pub prefill_gpu_ids: Vec<u32>,
    /// GPUs of the decode workers; as `prefill_gpu_ids`. The two lists share no id, but with `shared_gpus`.
    pub decode_gpu_ids: Vec<u32>,
    /// Whether both roles may name the same GPU. Default false: a GPU serves one role. True is for trying PD out on one GPU, with
    /// `[inference] gpu_memory_utilization` below 0.5; the roles then slow each other down.
    pub shared_gpus: bool,
    /// Tensor-parallel ranks of one prefill worker. Default: `[inference.parallel] tp`. The roles may differ.
    #[schemars(range(min = 1, max = 1024))]
    pub prefill_tp: Option<u32>,
    /// Tensor-parallel ranks of one decode worker. Default: `[inference.parallel] tp`.
    #[schemars(range(min = 1, max = 1024))]
    pub decode_tp: Option<u32>,
    /// Host that listeners bind to, and the host of every worker's address. Default: `[inference.server] host`, else
    /// `127.0.0.1`. Beyond loopback, everybody who reaches the port may send requests.
    pub host: Option<String>,
    /// Port of the proxy. Default 8000.
    #[schemars(range(min = 1))]
    pub proxy_port: u16,
    /// HTTP port of prefill worker 0; worker `i` takes this plus `i`. Default 8100.
    #[schemars(range(min = 1))]
    pub prefill_port: u16,
    /// HTTP port of decode worker 0; worker `i` takes this plus `i`. Default 8200. Plain workers use it too.
    #[schemars(range(min = 1))]
    pub decode_port: u16,
    /// KV port of prefill worker 0; worker `i` takes this plus `i`. Default 14579. On vLLM each rank has one: with
    /// `auto_ports = false` they stand in a row, and worker `i` begins at this plus `i` times its ranks; else ranks above 0 take
    /// free ports.
    #[schemars(range(min = 1))]
    pub prefill_kv_port: u16,
    /// KV port of decode worker 0; further workers and ranks as with `prefill_kv_port`. Default 14580: with `auto_ports = false` and more than one
    /// prefill worker, or rank on vLLM, it must be raised. Plain workers use it too.
    #[schemars(range(min = 1))]
    pub decode_kv_port: u16,
    /// Whether a port that is taken may be replaced by a free one. Default true. False means exactly these ports or none.
    pub auto_ports: bool,
    /// How KV goes from prefill to decode. Default `P2pNcclConnector`.
    pub kv_connector: KvConnector,
    /// Who drives the copy: with `GET` decode pulls, with `PUT` prefill pushes and takes its next step when that is out, with
    /// `PUT_ASYNC` it pushes beside its steps. Default `PUT_ASYNC`; with the `NixlConnector` that vLLM ships `GET`, as vLLM means that name. There
    /// `PUT` and `PUT_ASYNC` both choose vLLM's `NixlPushConnector`.
    pub kv_send_type: Option<KvSendType>,
    /// Whose code stands behind the connector's name. Default `native`.
    pub connector_impl: ConnectorImpl,
    /// `all2all_backend` of prefill workers. Default: `[inference] all2all_backend`.
    pub prefill_all2all_backend: Option<All2AllBackend>,
    /// `all2all_backend` of decode workers. Default: `[inference] all2all_backend`.
    pub decode_all2all_backend: Option<All2AllBackend>,
    /// Environment variables of prefill workers, added to those pdlink runs with. Default none.
    pub prefill_env: BTreeMap<String, String>,
    /// Environment variables of decode workers, added to those pdlink runs with. Default none.
    pub decode_env: BTreeMap<String, String>,
}

impl PdDisaggConfig {
    /// The GPU ids (or slots) of one role. Plain workers have theirs elsewhere: [`super::Config::gpu_ids`].
    pub fn role_gpu_ids(&self, role: Role) -> &[u32] {
        match role {
            Role::Prefill => &self.prefill_gpu_ids,
            Role::Decode => &self.decode_gpu_ids,
            Role::Both => &[],
        }
    }

    /// HTTP port of worker 0 of a role.
    pub fn base_port(&self, role: Role) -> u16 {
        match role {
            Role::Prefill => self.prefill_port,
            Role::Decode | Role::Both => self.decode_port,
        }
    }

    /// KV port of worker 0 of a role.
    pub fn base_kv_port(&self, role: Role) -> u16 {
        match role {
            Role::Prefill => self.prefill_kv_port,
            Role::Decode | Role::Both => self.decode_kv_port,
        }
    }

    /// Who drives the copy: what is given, else what the connector's name means to those who know it.
    pub fn send_type(&self) -> KvSendType {
        match (self.kv_send_type, self.connector_impl, self.kv_connector) {
            (Some(given), ..) => given,
            (None, ConnectorImpl::Vllm, KvConnector::NixlConnector) => KvSendType::Get,
            (None, ..) => KvSendType::default(),
        }
    }

    /// Further environment variables of a role.
    pub fn env(&self, role: Role) -> Option<&BTreeMap<String, String>> {
        match role {
            Role::Prefill => Some(&self.prefill_env),
            Role::Decode => Some(&self.decode_env),
            Role::Both => None,
        }
    }
}

impl Default for PdDisaggConfig {
    fn default() -> Self {
        Self {
            enabled: false,
            prefill_gpu_ids: Vec::new(),
            decode_gpu_ids: Vec::new(),
            shared_gpus: false,
            prefill_tp: None,
            decode_tp: None,
            host: None,
            proxy_port: 8000,
            prefill_port: 8100,
            decode_port: 8200,
            prefill_kv_port: 14579,
            decode_kv_port: 14580,
            auto_ports: true,
            kv_connector: KvConnector::default(),
            kv_send_type: None,
            connector_impl: ConnectorImpl::default(),
            prefill_all2all_backend: None,
            decode_all2all_backend: None,
            prefill_env: BTreeMap::new(),
            decode_env: BTreeMap::new(),
        }
    }
}
