//! The objects of Kubernetes that a run needs, as far as it uses them.
//!
//! Own types and not those of `k8s-openapi`: that crate has every object of a cluster and takes minutes to build, for the dozen that
//! are written here and never read. What the compiler then does not hold, `tools/check_manifests` does, against the schemas of
//! several versions of Kubernetes.

use std::collections::BTreeMap;

use serde::Serialize;

pub(super) type Map = BTreeMap<String, String>;

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Object<S: Serialize> {
    pub(super) api_version: &'static str,
    pub(super) kind: &'static str,
    pub(super) metadata: Metadata,
    #[serde(flatten)]
    pub(super) content: S,
}

#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Metadata {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(super) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) namespace: Option<String>,
    pub(super) labels: Map,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) annotations: Map,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct ConfigMap {
    pub(super) data: Map,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Secret {
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    pub(super) string_data: Map,
}

/// Where an object keeps what is wanted of it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Spec<S: Serialize> {
    pub(super) spec: S,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Service {
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub(super) kind: Option<crate::config::ServiceType>,
    #[serde(rename = "clusterIP", skip_serializing_if = "Option::is_none")]
    pub(super) cluster_ip: Option<&'static str>,
    pub(super) publish_not_ready_addresses: bool,
    pub(super) selector: Map,
    pub(super) ports: Vec<ServicePort>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServicePort {
    pub(super) name: &'static str,
    pub(super) port: u16,
    pub(super) target_port: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct StatefulSet {
    pub(super) service_name: String,
    pub(super) replicas: u32,
    pub(super) pod_management_policy: &'static str,
    pub(super) selector: Selector,
    pub(super) template: Template,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Selector {
    pub(super) match_labels: Map,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Template {
    pub(super) metadata: Metadata,
    pub(super) spec: Pod,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Pod {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) service_account_name: Option<String>,
    pub(super) automount_service_account_token: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) image_pull_secrets: Vec<Name>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) host_network: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dns_policy: Option<&'static str>,
    pub(super) termination_grace_period_seconds: u64,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) node_selector: Map,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) tolerations: Vec<Toleration>,
    pub(super) containers: Vec<Container>,
    pub(super) volumes: Vec<Volume>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Name {
    pub(super) name: String,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Toleration {
    pub(super) key: String,
    pub(super) operator: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Container {
    pub(super) name: &'static str,
    pub(super) image: String,
    pub(super) command: Vec<String>,
    pub(super) env: Vec<Variable>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) env_from: Vec<EnvFrom>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) ports: Vec<Port>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) startup_probe: Option<Probe>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) readiness_probe: Option<Probe>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) liveness_probe: Option<Probe>,
    pub(super) resources: Resources,
    pub(super) security_context: SecurityContext,
    pub(super) volume_mounts: Vec<Mount>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Variable {
    pub(super) name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) value: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) value_from: Option<ValueFrom>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum ValueFrom {
    #[serde(rename_all = "camelCase")]
    FieldRef {
        field_path: &'static str,
    },
    SecretKeyRef {
        name: String,
        key: &'static str,
        optional: bool,
    },
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EnvFrom {
    pub(super) secret_ref: Name,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Port {
    pub(super) name: String,
    pub(super) container_port: u16,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Probe {
    #[serde(flatten)]
    pub(super) ask: Ask,
    pub(super) period_seconds: u32,
    pub(super) timeout_seconds: u32,
    pub(super) failure_threshold: u32,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Ask {
    HttpGet { path: &'static str, port: &'static str },
    TcpSocket { port: &'static str },
}

#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Resources {
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) limits: Map,
    #[serde(skip_serializing_if = "Map::is_empty")]
    pub(super) requests: Map,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SecurityContext {
    pub(super) allow_privilege_escalation: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) capabilities: Option<Capabilities>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Capabilities {
    pub(super) add: Vec<&'static str>,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Mount {
    pub(super) name: &'static str,
    pub(super) mount_path: String,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) read_only: bool,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Volume {
    pub(super) name: &'static str,
    #[serde(flatten)]
    pub(super) source: Source,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum Source {
    ConfigMap {
        name: String,
    },
    #[serde(rename_all = "camelCase")]
    Secret {
        secret_name: String,
        default_mode: u32,
        items: Vec<Item>,
    },
    #[serde(rename_all = "camelCase")]
    EmptyDir {
        medium: &'static str,
        size_limit: String,
    },
    #[serde(rename_all = "camelCase")]
    PersistentVolumeClaim {
        claim_name: String,
        read_only: bool,
    },
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Item {
    pub(super) key: &'static str,
    pub(super) path: &'static str,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PodMonitor {
    pub(super) selector: Selector,
    pub(super) pod_metrics_endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Endpoint {
    pub(super) port: String,
    pub(super) path: &'static str,
    pub(super) interval: &'static str,
}
