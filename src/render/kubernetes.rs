//! Manifests for Kubernetes: a StatefulSet for node 0, which has the proxy, one for each run of further nodes that are alike, and
//! what they share.
//!
//! A StatefulSet gives each pod a name that others can find before it is ready, and keeps it when the pod is made anew: just what
//! a node of a run is. Only node 0 is probed: it alone has a front that says how the run is, and it watches the others itself.

use serde::Serialize;
use serde_json::{Value, json};

use super::objects::*;
use super::shape::{Node, nodes};
use super::yaml::document;
use super::{RenderError, configuration, refuse_role_secrets, refuse_secrets};
use crate::config::{Config, KubernetesConfig};

const CONFIG_FOLDER: &str = "/etc/pdlink";
const SECRET_FOLDER: &str = "/run/secrets/pdlink";
const MEND: &str = "put it into a Secret, and name that in kubernetes.env_from";
/// How often a probe asks, in seconds, and how long it waits.
const PROBE_S: u32 = 10;
/// What prefill and decode workers may take to meet, and the front to listen, once all have loaded.
const MEETING_S: f64 = 60.0;
const PROBE_TIMEOUT_S: u32 = 5;

/// All manifests, as documents of one YAML stream.
pub fn manifests(config: &Config) -> Result<String, RenderError> {
    let writer = Writer::new(config)?;
    let mut all = vec![value(&writer.config_map()?)];
    if config.kubernetes.secret.is_none() {
        all.push(value(&writer.secret()));
    }
    all.push(value(&writer.nodes_service()));
    all.push(value(&writer.front_service()));
    all.extend(writer.groups().iter().map(|group| value(&writer.stateful_set(group))));
    if config.kubernetes.pod_monitor {
        all.push(value(&writer.pod_monitor()));
    }
    Ok(all.iter().map(document).collect())
}

/// Plain data of strings, numbers and string-keyed maps always has a JSON form.
fn value(object: &impl Serialize) -> Value {
    serde_json::to_value(object).unwrap_or_default()
}

/// Nodes after one another that are alike.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    name: String,
    /// The rank of the first.
    first: usize,
    count: usize,
    gpus: u32,
}

struct Writer<'a> {
    config: &'a Config,
    own: &'a KubernetesConfig,
    image: &'a str,
    nodes: Vec<Node>,
}

impl<'a> Writer<'a> {
    fn new(config: &'a Config) -> Result<Self, RenderError> {
        let own = &config.kubernetes;
        refuse_role_secrets(config, MEND)?;
        refuse_secrets("kubernetes.env", own.env.keys(), MEND)?;
        let image = own.image.as_deref().ok_or(RenderError::NoImage)?;
        Ok(Self { config, own, image, nodes: nodes(config) })
    }

    /// Whether each pod is told which node it is.
    fn has_nodes(&self) -> bool {
        self.config.hosts.is_given()
    }

    fn object<S: Serialize>(&self, version: &'static str, kind: &'static str, name: String, content: S) -> Object<S> {
        let metadata =
            Metadata { name, namespace: self.own.namespace.clone(), labels: self.labels(), annotations: Map::new() };
        Object { api_version: version, kind, metadata, content }
    }

    fn labels(&self) -> Map {
        Map::from([
            ("app.kubernetes.io/name".to_owned(), "pdlink".to_owned()),
            ("app.kubernetes.io/instance".to_owned(), self.own.name.clone()),
        ])
    }

    fn labels_of(&self, group: &Group) -> Map {
        let mut labels = self.labels();
        labels.insert("pdlink/group".to_owned(), group.name.clone());
        labels
    }

    fn nodes_name(&self) -> String {
        format!("{}-nodes", self.own.name)
    }

    fn secret_name(&self) -> String {
        self.own.secret.clone().unwrap_or_else(|| format!("{}-secret", self.own.name))
    }

    /// Node 0 alone, since it is probed and found by clients; then each run of nodes with as many GPUs.
    fn groups(&self) -> Vec<Group> {
        let name = |first: usize| format!("{}-{first}", self.own.name);
        let mut groups: Vec<Group> = Vec::new();
        for (rank, node) in self.nodes.iter().enumerate() {
            match groups.last_mut() {
                Some(last) if rank > 1 && last.gpus == node.gpus => last.count += 1,
                _ => groups.push(Group { name: name(rank), first: rank, count: 1, gpus: node.gpus }),
            }
        }
        groups
    }

    /// Where every node is found, in order of rank: by the name that its StatefulSet gives its pod.
    fn addresses(&self) -> Vec<String> {
        let nodes = self.nodes_name();
        let of = |group: &Group| -> Vec<String> {
            (0..group.count).map(|ordinal| format!("{}-{ordinal}.{nodes}", group.name)).collect()
        };
        self.groups().iter().flat_map(of).collect()
    }

    fn config_map(&self) -> Result<Object<ConfigMap>, RenderError> {
        let toml = configuration(self.config, |config| {
            config["security"]["secret_file"] = json!(format!("{SECRET_FOLDER}/secret"));
            if self.has_nodes() {
                config["hosts"]["addresses"] = json!(self.addresses());
            } else {
                // A pod's loopback is its own: clients come from outside.
                config["pd_disagg"]["host"] = json!("0.0.0.0");
                config["inference"]["server"]["host"] = json!("0.0.0.0");
            }
        })?;
        let data = Map::from([("pdlink.toml".to_owned(), toml)]);
        Ok(self.object("v1", "ConfigMap", self.own.name.clone(), ConfigMap { data }))
    }

    fn secret(&self) -> Object<Secret> {
        let secret = hex::encode(rand::random::<[u8; 32]>());
        let mut string_data = Map::from([("secret".to_owned(), secret)]);
        if let Some(token) = &self.config.proxy.admin_token {
            string_data.insert("admin-token".to_owned(), token.clone());
        }
        self.object("v1", "Secret", self.secret_name(), Secret { kind: "Opaque", string_data })
    }

    /// Gives each pod a name. Nodes must find each other before they are ready.
    fn nodes_service(&self) -> Object<Spec<Service>> {
        let spec = Service {
            kind: None,
            cluster_ip: Some("None"),
            publish_not_ready_addresses: true,
            selector: self.labels(),
            ports: vec![self.http_port()],
        };
        self.object("v1", "Service", self.nodes_name(), Spec { spec })
    }

    /// Where clients come: node 0, once it serves.
    fn front_service(&self) -> Object<Spec<Service>> {
        let first = Group { name: format!("{}-0", self.own.name), first: 0, count: 1, gpus: 0 };
        let spec = Service {
            kind: Some(self.own.service_type),
            cluster_ip: None,
            publish_not_ready_addresses: false,
            selector: self.labels_of(&first),
            ports: vec![self.http_port()],
        };
        self.object("v1", "Service", self.own.name.clone(), Spec { spec })
    }

    fn http_port(&self) -> ServicePort {
        ServicePort { name: "http", port: self.config.proxy_port(), target_port: "http" }
    }

    fn stateful_set(&self, group: &Group) -> Object<Spec<StatefulSet>> {
        let labels = self.labels_of(group);
        let metadata =
            Metadata { labels: labels.clone(), annotations: self.own.annotations.clone(), ..Metadata::default() };
        let spec = StatefulSet {
            service_name: self.nodes_name(),
            replicas: u32::try_from(group.count).unwrap_or(u32::MAX),
            // All at once: each waits for the others.
            pod_management_policy: "Parallel",
            selector: Selector { match_labels: labels },
            template: Template { metadata, spec: self.pod(group) },
        };
        self.object("apps/v1", "StatefulSet", group.name.clone(), Spec { spec })
    }

    fn pod(&self, group: &Group) -> Pod {
        let launcher = &self.config.launcher;
        // What `pdlink up` takes to end in order, and a little.
        let grace = std::time::Duration::try_from_secs_f64(launcher.drain_s + launcher.grace_s).unwrap_or_default();
        let named = |name: &String| Name { name: name.clone() };
        Pod {
            service_account_name: self.own.service_account.clone(),
            automount_service_account_token: false,
            image_pull_secrets: self.own.image_pull_secrets.iter().map(named).collect(),
            host_network: self.own.host_network,
            dns_policy: self.own.host_network.then_some("ClusterFirstWithHostNet"),
            termination_grace_period_seconds: grace.as_secs().saturating_add(10),
            node_selector: self.own.node_selector.clone(),
            tolerations: self
                .own
                .tolerate
                .iter()
                .map(|key| Toleration { key: key.clone(), operator: "Exists" })
                .collect(),
            containers: vec![self.container(group)],
            volumes: self.volumes(),
        }
    }

    fn container(&self, group: &Group) -> Container {
        let is_front = group.first == 0;
        let probe = |ask, failure_threshold| Probe {
            ask,
            period_seconds: PROBE_S,
            timeout_seconds: PROBE_TIMEOUT_S,
            failure_threshold,
        };
        let health = Ask::HttpGet { path: "/health", port: "http" };
        Container {
            name: "pdlink",
            image: self.image.to_owned(),
            command: self.command(group),
            env: self.variables(),
            env_from: self
                .own
                .env_from
                .iter()
                .map(|name| EnvFrom { secret_ref: Name { name: name.clone() } })
                .collect(),
            ports: if is_front {
                vec![Port { name: "http".to_owned(), container_port: self.config.proxy_port() }]
            } else {
                Vec::new()
            },
            startup_probe: is_front.then(|| probe(health.clone(), self.start_probes())),
            // 503 while a role has no worker that serves: such a front gets no clients, and is not killed for it.
            readiness_probe: is_front.then(|| probe(health, 2)),
            liveness_probe: is_front.then(|| probe(Ask::TcpSocket { port: "http" }, 6)),
            resources: self.resources(group),
            security_context: SecurityContext {
                allow_privilege_escalation: false,
                // RDMA pins the memory that it reads and writes.
                capabilities: (!self.own.devices.is_empty()).then(|| Capabilities { add: vec!["IPC_LOCK"] }),
            },
            volume_mounts: self.mounts(),
        }
    }

    /// A pod knows its own number among those of its StatefulSet; the first of which is some node of the run.
    fn command(&self, group: &Group) -> Vec<String> {
        let config = format!("{CONFIG_FOLDER}/pdlink.toml");
        if !self.has_nodes() {
            return ["pdlink", "up", "@", &config].map(str::to_owned).to_vec();
        }
        let up = format!("exec pdlink up @ {config} --node $(({} + POD_INDEX))", group.first);
        ["/bin/sh", "-c", &up].map(str::to_owned).to_vec()
    }

    fn variables(&self) -> Vec<Variable> {
        let mut variables = vec![Variable {
            name: "POD_INDEX".to_owned(),
            value: None,
            value_from: Some(ValueFrom::FieldRef { field_path: "metadata.labels['apps.kubernetes.io/pod-index']" }),
        }];
        variables.push(Variable {
            name: "PDLINK_ADMIN_TOKEN".to_owned(),
            value: None,
            value_from: Some(ValueFrom::SecretKeyRef { name: self.secret_name(), key: "admin-token", optional: true }),
        });
        let own = self.own.env.iter();
        variables.extend(own.map(|(name, value)| Variable {
            name: name.clone(),
            value: Some(value.clone()),
            value_from: None,
        }));
        variables
    }

    /// How often the front may be asked before it must be there: for as long as nodes may take to be there and workers to load.
    fn start_probes(&self) -> u32 {
        let joining_s = if self.config.hosts.has_several() { self.config.hosts.join_timeout_s } else { 0.0 };
        let within_s = joining_s + self.config.launcher.ready_timeout_s + MEETING_S;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded before")]
        let probes = (within_s / f64::from(PROBE_S)).ceil().clamp(1.0, 1e6) as u32;
        probes
    }

    fn resources(&self, group: &Group) -> Resources {
        let mut limits = Map::new();
        if group.gpus > 0 {
            limits.insert(self.own.gpu_resource.clone(), group.gpus.to_string());
        }
        limits.extend(self.own.devices.iter().map(|(name, count)| (name.clone(), count.to_string())));
        let mut requests = limits.clone();
        for (name, given) in [("cpu", &self.own.cpu), ("memory", &self.own.memory)] {
            if let Some(given) = given {
                requests.insert(name.to_owned(), given.clone());
                limits.insert(name.to_owned(), given.clone());
            }
        }
        Resources { limits, requests }
    }

    fn volumes(&self) -> Vec<Volume> {
        let item = Item { key: "secret", path: "secret" };
        let mut volumes = vec![
            Volume { name: "config", source: Source::ConfigMap { name: self.own.name.clone() } },
            Volume {
                name: "secret",
                // 0400: `pdlink` takes no secret that others may read.
                source: Source::Secret { secret_name: self.secret_name(), default_mode: 0o400, items: vec![item] },
            },
            Volume { name: "shm", source: Source::EmptyDir { medium: "Memory", size_limit: self.own.shm.clone() } },
        ];
        if let Some(claim) = &self.own.model_claim {
            let source = Source::PersistentVolumeClaim { claim_name: claim.clone(), read_only: true };
            volumes.push(Volume { name: "model", source });
        }
        volumes
    }

    fn mounts(&self) -> Vec<Mount> {
        let mount = |name, path: &str, read_only| Mount { name, mount_path: path.to_owned(), read_only };
        let mut mounts = vec![
            mount("config", CONFIG_FOLDER, true),
            mount("secret", SECRET_FOLDER, true),
            mount("shm", "/dev/shm", false),
        ];
        if self.own.model_claim.is_some() {
            mounts.push(mount("model", &self.own.model_path, true));
        }
        mounts
    }

    /// For the Prometheus operator: the front's page, which has the launcher's numbers, the pools' and the workers'.
    fn pod_monitor(&self) -> Object<Spec<PodMonitor>> {
        let spec = PodMonitor {
            selector: Selector { match_labels: self.labels() },
            pod_metrics_endpoints: vec![Endpoint { port: "http".to_owned(), path: "/metrics", interval: "15s" }],
        };
        self.object("monitoring.coreos.com/v1", "PodMonitor", self.own.name.clone(), Spec { spec })
    }
}
