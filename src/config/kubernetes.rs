//! `[kubernetes]`: what `pdlink render k8s` writes into its manifests.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A run on Kubernetes: one pod for each node of the run, with all workers of that node in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KubernetesConfig {
    /// Names all objects. Default `pdlink`.
    #[schemars(regex(pattern = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"))]
    pub name: String,
    /// Namespace of all objects. Default: that of whoever applies them.
    pub namespace: Option<String>,
    /// The image, with `pdlink` and, for vLLM, both in one environment. Must be given.
    pub image: Option<String>,
    /// Names of secrets to pull it with.
    pub image_pull_secrets: Vec<String>,
    /// Service account of the pods.
    pub service_account: Option<String>,
    /// What a GPU is called among the nodes' resources. Default `nvidia.com/gpu`.
    pub gpu_resource: String,
    /// RDMA and other devices of each pod, by their names among the nodes' resources: `{ "rdma/hca" = 1 }`. With any, pods may
    /// lock memory.
    pub devices: BTreeMap<String, u32>,
    /// Processors of each pod, as Kubernetes writes them: `64`. Default: not limited.
    pub cpu: Option<String>,
    /// Memory of each pod, as Kubernetes writes it: `800Gi`. Default: not limited.
    pub memory: Option<String>,
    /// Size of each pod's `/dev/shm`. Default `16Gi`. It counts against the pod's memory.
    pub shm: String,
    /// A claim of a volume with the model, mounted at `model_path`.
    pub model_claim: Option<String>,
    /// Default `/models`.
    pub model_path: String,
    /// Which nodes pods may be on, by label.
    pub node_selector: BTreeMap<String, String>,
    /// Keys of taints that pods tolerate, whatever their value. Default `nvidia.com/gpu`.
    pub tolerate: Vec<String>,
    /// Annotations of pods: `k8s.v1.cni.cncf.io/networks` names further networks.
    pub annotations: BTreeMap<String, String>,
    /// Variables of every pod. Secrets belong into `env_from`.
    pub env: BTreeMap<String, String>,
    /// Names of secrets whose entries become variables of every pod, for tokens of the model hub.
    pub env_from: Vec<String>,
    /// A secret that exists, with `secret` (64 hex digits) and, where admin calls ask for one, `admin-token`. Default: one is made
    /// each time, and printed with the manifests.
    pub secret: Option<String>,
    /// Whether pods share the network of their host: InfiniBand without a second network needs that. Default false.
    pub host_network: bool,
    /// Kind of the service that clients use. Default `ClusterIP`.
    pub service_type: ServiceType,
    /// Whether a PodMonitor of the Prometheus operator is written. Default true.
    pub pod_monitor: bool,
}

/// How clients reach a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum ServiceType {
    #[default]
    ClusterIP,
    NodePort,
    LoadBalancer,
}

impl Default for KubernetesConfig {
    fn default() -> Self {
        Self {
            name: "pdlink".to_owned(),
            namespace: None,
            image: None,
            image_pull_secrets: Vec::new(),
            service_account: None,
            gpu_resource: "nvidia.com/gpu".to_owned(),
            devices: BTreeMap::new(),
            cpu: None,
            memory: None,
            shm: "16Gi".to_owned(),
            model_claim: None,
            model_path: "/models".to_owned(),
            node_selector: BTreeMap::new(),
            tolerate: vec!["nvidia.com/gpu".to_owned()],
            annotations: BTreeMap::new(),
            env: BTreeMap::new(),
            env_from: Vec::new(),
            secret: None,
            host_network: false,
            service_type: ServiceType::default(),
            pod_monitor: true,
        }
    }
}
