//! `[hosts]`: a run on several hosts.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Role;

/// Tells a worker which host of the run it is on: two that are named as different hosts never share memory, also where one
/// machine plays both.
pub const HOST_ENV: &str = "PDLINK_HOST";

/// The hosts of a run, and how they find and watch each other. Without `nodes` all workers run on the host of the launcher.
/// With them, `pdlink up` is started on every node, node 0 also runs the proxy, and the secret must be the same everywhere
/// (`security.secret_file`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HostsConfig {
    /// The nodes, in order of rank. Each is a table of its own, `[[hosts.nodes]]`. A worker is on one node with all its ranks.
    pub nodes: Vec<NodeConfig>,
    /// Addresses of the nodes, in order of rank; they win over `address` of each node, so that one file serves any allocation
    /// (`--hosts.addresses '["n1","n2"]'`). Default none.
    pub addresses: Option<Vec<String>>,
    /// Port of node 0's control connection, on its `address`. Default 14570.
    #[schemars(range(min = 1))]
    pub port: u16,
    /// The network that KV takes, on every node: the name of an interface (`ib0`), the beginning of one (`ib*`), or a network
    /// (`10.1.0.0/16`). Default none: the node's own `address`. `kv_address` of a node wins.
    pub kv_interface: Option<String>,
    /// Whether workers are told which RDMA devices are next to their GPUs: `UCX_NET_DEVICES` with `nixl`, `NCCL_IB_HCA` and
    /// `NCCL_SOCKET_IFNAME` (the interface of KV) with `nccl`, each only where nobody has set it. Default true.
    pub rdma_hints: bool,
    /// How long node 0 waits at the start for all nodes to be there, and they for it, in seconds. Default 600: schedulers start
    /// nodes minutes apart. Loading the model counts apart (`launcher.ready_timeout_s`).
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub join_timeout_s: f64,
    /// Silence after which a node counts as lost, in seconds. Default 3. Its workers get no more requests; when it is heard
    /// again they come back. Shorter is sooner, and takes a busy host for a lost one.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub lost_after_s: f64,
    /// How long the other nodes keep their workers, loaded, while node 0 is away, in seconds. Default 60. If it is back by
    /// then it takes them over as they are, else they end.
    #[schemars(range(min = 0))]
    pub node0_timeout_s: f64,
}

impl Default for HostsConfig {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            addresses: None,
            port: 14_570,
            kv_interface: None,
            rdma_hints: true,
            join_timeout_s: 600.0,
            lost_after_s: 3.0,
            node0_timeout_s: 60.0,
        }
    }
}

/// One node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// The name or address under which the other nodes reach it, and on which its workers listen. Needed, here or in
    /// `hosts.addresses`.
    pub address: Option<String>,
    /// The address that KV takes on this node. Default: by `hosts.kv_interface`, else `address`.
    pub kv_address: Option<String>,
    /// GPUs of this node that prefill, as ids on this node. Each run of the role's `tp` ids is one worker.
    pub prefill_gpu_ids: Vec<u32>,
    /// GPUs of this node that decode.
    pub decode_gpu_ids: Vec<u32>,
    /// GPUs of this node for plain workers, with `pd_disagg.enabled = false`.
    pub gpu_ids: Vec<u32>,
}

impl NodeConfig {
    pub fn role_gpu_ids(&self, role: Role) -> &[u32] {
        match role {
            Role::Prefill => &self.prefill_gpu_ids,
            Role::Decode => &self.decode_gpu_ids,
            Role::Both => &self.gpu_ids,
        }
    }
}

impl HostsConfig {
    /// Whether the run is on nodes that the file names.
    pub fn is_given(&self) -> bool {
        !self.nodes.is_empty()
    }

    /// Whether the run is on more than one node.
    pub fn has_several(&self) -> bool {
        self.nodes.len() > 1
    }

    /// The address of a node, if it has one.
    pub fn address(&self, node: usize) -> Option<&str> {
        let listed = self.addresses.as_ref().and_then(|addresses| addresses.get(node));
        let own = || self.nodes.get(node)?.address.as_ref();
        listed.or_else(own).map(String::as_str)
    }
}
