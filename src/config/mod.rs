//! Every setting: its unit, its default, what it costs, and where its value came from.
//!
//! One file per section. A part of the program is given its own section by reference, never the whole [`Config`].
#![forbid(unsafe_code)]

mod hosts;
mod inference;
mod kubernetes;
mod kv;
mod launcher;
mod load;
mod manual;
mod model;
mod network;
mod orchestrator;
mod pd_disagg;
mod proxy;
mod reference;
mod render;
mod role;
mod root;
mod rules;
mod security;
mod slurm;
mod telemetry;
mod variables;
mod vllm;
mod weight_broadcast;
mod weights;

pub use hosts::{HOST_ENV, HostsConfig, NodeConfig};
pub use inference::{
    All2AllBackend, Dtype, EngineKind, InferenceConfig, InferenceModelConfig, ParallelConfig, ServerConfig,
};
pub use kubernetes::{KubernetesConfig, ServiceType};
pub use kv::{DigestPolicy, KvConfig, KvMemory, LoadFailurePolicy, NcclConfig, NixlConfig, Path};
pub use launcher::{LauncherConfig, Restart};
pub use load::{Finding, LoadError, LoadRequest, Loaded, Origin, Origins, Override, load, schema};
pub use manual::markdown;
pub use model::ModelConfig;
pub use network::{Network, host_port};
pub use orchestrator::{ClientConfig, OrchestratorConfig};
pub use pd_disagg::{ConnectorImpl, KvConnector, KvSendType, PdDisaggConfig};
pub use proxy::{Dispatch, Policy, ProxyConfig};
pub use reference::{ReferenceConfig, ReferenceLayout};
pub use render::to_toml;
pub use role::Role;
pub use root::Config;
pub use security::SecurityConfig;
pub use slurm::SlurmConfig;
pub use telemetry::{LogFormat, TelemetryConfig};
pub use variables::is_secret_variable;
pub use vllm::{SECRET_ARGUMENTS, VllmArgs, VllmConfig};
pub use weight_broadcast::{TrainerConfig, WeightBroadcastConfig, WeightBroadcastType};
pub use weights::{InFlight, Staging, WeightsConfig};
