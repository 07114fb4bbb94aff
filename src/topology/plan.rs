//! What a run is going to be, as plain data.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::redact;
use crate::config::{ConnectorImpl, EngineKind, KvConnector, KvSendType, Path, Role, host_port};

/// Everything that a run starts.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub model: String,
    /// Prefill workers first, then decode: vLLM's `kv_rank` order.
    pub workers: Vec<WorkerPlan>,
    pub proxy: ProxyPlan,
    /// The nodes by rank; none where all runs on the launcher's host.
    pub nodes: Vec<NodePlan>,
    /// How KV goes from prefill to decode; `None` for plain workers.
    pub link: Option<LinkPlan>,
    /// With weights by NCCL: ranks of all workers, and the trainer's.
    pub world_size: Option<u32>,
    /// What is good to know, and what should be changed.
    pub notes: Vec<String>,
    pub warnings: Vec<String>,
}

/// How KV goes from prefill to decode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkPlan {
    pub connector: KvConnector,
    pub connector_impl: ConnectorImpl,
    /// Who drives the copy.
    pub send_type: KvSendType,
    /// Allowed paths, best first; with `connector_impl = "vllm"` none: vLLM's class chooses for itself.
    pub paths: Vec<Path>,
}

/// One node of a run on several hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    pub rank: usize,
    pub address: String,
    /// The address that KV takes. What another node chooses by `hosts.kv_interface` is known once that node has told.
    pub kv_address: String,
}

/// One worker: one process tree with one HTTP port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerPlan {
    pub role: Role,
    /// Number within its role.
    pub index: u32,
    /// The node it is on.
    pub node: usize,
    pub engine: EngineKind,
    pub gpus: Vec<u32>,
    /// The address it binds, as configured.
    pub host: String,
    /// The address under which others on this host reach it.
    pub reach: String,
    /// The address under which its KV runtime is reached; on several hosts it may have a network of its own.
    pub kv_reach: String,
    pub port: u16,
    /// Where its KV runtime (or vLLM's own side channel) listens; a plain worker has none.
    pub kv_port: Option<u16>,
    /// One for each runtime behind the worker, `kv_port` first: with vLLM, one for each rank.
    pub kv_ports: Vec<u16>,
    /// Where each rank takes orders about new weights, if no runtime of ours does.
    pub weights_ports: Vec<u16>,
    /// Whether a control connection of ours is behind `kv_port`.
    pub has_runtime: bool,
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
}

impl WorkerPlan {
    /// Names the worker in logs and on the terminal: `prefill_0`; plain workers are `worker_0`.
    pub fn name(&self) -> String {
        let role = match self.role {
            Role::Both => "worker",
            role => role.name(),
        };
        format!("{role}_{}", self.index)
    }

    /// Where its HTTP server is reached.
    pub fn url(&self) -> String {
        format!("http://{}", host_port(&self.reach, self.port))
    }

    /// Where its runtime takes control connections.
    pub fn kv_address(&self) -> Option<String> {
        self.kv_port.map(|port| host_port(&self.kv_reach, port))
    }

    /// Where its first rank takes orders about new weights, if it has a door of its own for them.
    pub fn weights_address(&self) -> Option<String> {
        self.weights_ports.first().map(|port| host_port(&self.kv_reach, *port))
    }

    /// Where each of its runtimes takes control connections, by rank.
    pub fn kv_addresses(&self) -> Vec<String> {
        self.kv_ports.iter().map(|port| host_port(&self.kv_reach, *port)).collect()
    }

    /// The environment as it may be shown: values of secrets are not.
    pub fn shown_env(&self) -> BTreeMap<String, String> {
        self.env.iter().map(|(name, value)| (name.clone(), redact::value(name, value).to_owned())).collect()
    }

    fn to_json(&self) -> Value {
        json!({
            "name": self.name(),
            "role": self.role.name(),
            "index": self.index,
            "engine": self.engine.name(),
            "gpus": self.gpus,
            "host": self.host,
            "port": self.port,
            "url": self.url(),
            "kv_port": self.kv_port,
            "kv_address": self.kv_address(),
            "kv_ports": self.kv_ports,
            "weights_ports": self.weights_ports,
            "command": self.command,
            "env": self.shown_env(),
            "node": self.node,
        })
    }
}

/// The HTTP front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyPlan {
    pub host: String,
    pub reach: String,
    pub port: u16,
}

impl ProxyPlan {
    /// What an OpenAI client, or PRIME-RL's orchestrator, is given.
    pub fn base_url(&self) -> String {
        format!("http://{}/v1", host_port(&self.reach, self.port))
    }
}

impl Plan {
    /// The plan for machines: nothing in it is secret.
    pub fn to_json(&self) -> Value {
        let mut plan = json!({
            "model": self.model,
            "workers": self.workers.iter().map(WorkerPlan::to_json).collect::<Vec<_>>(),
            "proxy": { "host": self.proxy.host, "port": self.proxy.port, "base_url": self.proxy.base_url() },
        });
        if let Some(link) = &self.link {
            plan["kv_connector"] = json!(link.connector.name());
            plan["connector_impl"] = json!(link.connector_impl.name());
            plan["kv_send_type"] = json!(link.send_type.name());
            plan["kv_paths"] = json!(link.paths.iter().map(|path| path.name()).collect::<Vec<_>>());
        }
        if let Some(world_size) = self.world_size {
            plan["world_size"] = json!(world_size);
        }
        if !self.nodes.is_empty() {
            let node =
                |node: &NodePlan| json!({ "rank": node.rank, "address": node.address, "kv_address": node.kv_address });
            plan["nodes"] = json!(self.nodes.iter().map(node).collect::<Vec<_>>());
        }
        plan["notes"] = json!(self.notes);
        plan
    }

    /// The workers of one node, in order.
    pub fn on_node(&self, node: usize) -> impl Iterator<Item = &WorkerPlan> {
        self.workers.iter().filter(move |worker| worker.node == node)
    }

    /// What one node starts of it: the same plan with that node's workers alone.
    pub fn share(&self, node: usize) -> Self {
        Self { workers: self.on_node(node).cloned().collect(), ..self.clone() }
    }

    /// Workers of one role, in order.
    pub fn of_role(&self, role: Role) -> impl Iterator<Item = &WorkerPlan> {
        self.workers.iter().filter(move |worker| worker.role == role)
    }
}

/// Workers, ranks and cores are far fewer than this type holds; the configuration bounds them by its lists.
pub(super) fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// `host:port` of a listener on `host`, for whoever dials.
pub fn dial(host: &str, port: u16) -> String {
    host_port(&reach(host), port)
}

/// The address under which a listener on `host` is reached from its own host.
pub(super) fn reach(host: &str) -> String {
    match host {
        "" | "*" | "0.0.0.0" => "127.0.0.1".to_owned(),
        "::" | "[::]" => "::1".to_owned(),
        host => host.trim_matches(['[', ']']).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_can_be_dialled() {
        let cases = [
            ("127.0.0.1", "127.0.0.1:80"),
            ("0.0.0.0", "127.0.0.1:80"),
            ("::", "[::1]:80"),
            ("fe80::1", "[fe80::1]:80"),
            ("[::1]", "[::1]:80"),
            ("node-7", "node-7:80"),
        ];
        for (host, want) in cases {
            assert_eq!(host_port(&reach(host), 80), want, "case: {host}");
        }
    }
}
