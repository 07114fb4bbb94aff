//! Who runs where: each run of a role's ranks in a node's list of GPUs is one worker, on that node with all its ranks.

use std::collections::{BTreeMap, BTreeSet};

use super::builder::PlanError;
use super::plan::{NodePlan, count, reach};
use crate::config::{Config, Path, Role};

/// A worker to be, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) role: Role,
    /// Number within its role, over all nodes in order of rank.
    pub(super) index: u32,
    pub(super) node: usize,
    pub(super) gpus: Vec<u32>,
}

/// All workers: prefill first, each role node by node. Every node finds the same.
pub(super) fn spots(config: &Config) -> Result<Vec<Spot>, PlanError> {
    let mut spots = Vec::new();
    for role in config.roles() {
        let mut index = 0;
        for node in 0..config.node_count() {
            for gpus in chunks(config, node, *role)? {
                spots.push(Spot { role: *role, index, node, gpus });
                index += 1;
            }
        }
        if index == 0 {
            return Err(PlanError::GpuList { role: role.name(), count: 0, tp: config.tp(*role) });
        }
    }
    Ok(spots)
}

/// Each run of TP ids is one worker.
fn chunks(config: &Config, node: usize, role: Role) -> Result<Vec<Vec<u32>>, PlanError> {
    let (gpus, tp) = (config.gpu_ids_on(node, role), config.tp(role));
    let width = usize::try_from(tp).unwrap_or(usize::MAX);
    if width == 0 || gpus.len() % width != 0 {
        return Err(PlanError::GpuList { role: role.name(), count: gpus.len(), tp });
    }
    Ok(gpus.chunks(width).map(<[u32]>::to_vec).collect())
}

/// What a launcher knows of the node it is on, and of no other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    pub node: usize,
    /// The address that KV takes here, and the interface that has it. `None`: the node's own address.
    pub kv_address: Option<String>,
    pub kv_interface: Option<String>,
    /// By GPU: the RDMA ports next to it (`mlx5_0:1`), best first. Empty where there are none, or where nobody shall be told.
    pub rdma: BTreeMap<u32, Vec<String>>,
    /// Variables that the launcher itself was started with, among those that hints would set: the user's word stands.
    pub set_by_user: BTreeSet<String>,
}

impl Place {
    /// The addresses on which this node's workers listen, and their KV runtimes.
    pub fn own_hosts<'a>(&'a self, config: &'a Config) -> (&'a str, &'a str) {
        if !config.hosts.is_given() {
            return (config.host(), config.host());
        }
        let host = config.hosts.address(self.node).unwrap_or_default();
        let named = config.hosts.nodes.get(self.node).and_then(|node| node.kv_address.as_deref());
        (host, named.or(self.kv_address.as_deref()).unwrap_or(host))
    }
}

/// The nodes of the run; none where all of it is on one host that the file does not name.
pub(super) fn nodes(config: &Config, place: &Place) -> Vec<NodePlan> {
    let of = |node: usize| {
        let address = config.hosts.address(node).unwrap_or_default().to_owned();
        let here = place.kv_address.clone().filter(|_| node == place.node);
        let named = config.hosts.nodes[node].kv_address.clone();
        // Another node's choice by interface is known only there; until it tells, its address stands in.
        let kv_address = named.or(here).unwrap_or_else(|| address.clone());
        NodePlan { rank: node, address, kv_address }
    };
    (0..config.hosts.nodes.len()).map(of).collect()
}

/// Where one worker listens, and how it is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hosts {
    pub(super) host: String,
    pub(super) reach: String,
    pub(super) kv_host: String,
    pub(super) kv_reach: String,
}

/// The hosts of a worker on this node: the run's one host where no nodes are named.
pub(super) fn hosts(config: &Config, nodes: &[NodePlan], node: usize) -> Hosts {
    let (host, kv_host) = match nodes.get(node) {
        Some(node) => (node.address.clone(), node.kv_address.clone()),
        None => (config.host().to_owned(), config.host().to_owned()),
    };
    Hosts { reach: reach(&host), kv_reach: reach(&kv_host), host, kv_host }
}

/// Variables that point a worker's libraries to the network next to its GPUs.
pub(super) fn network_hints(place: &Place, gpus: &[u32], uses: impl Fn(Path) -> bool) -> BTreeMap<String, String> {
    let mut ports: Vec<&str> = Vec::new();
    for port in gpus.iter().filter_map(|gpu| place.rdma.get(gpu)).flatten() {
        if !ports.contains(&port.as_str()) {
            ports.push(port);
        }
    }
    let mut hints = BTreeMap::new();
    if uses(Path::Nixl) && !ports.is_empty() {
        // UCX needs sockets too: for setting up, and for memory that no device reaches.
        let devices: Vec<&str> = ports.iter().copied().chain(place.kv_interface.as_deref()).collect();
        hints.insert("UCX_NET_DEVICES".to_owned(), devices.join(","));
    }
    if uses(Path::Nccl) {
        if !ports.is_empty() {
            // The sign asks for these names, not for names that begin so: mlx5_1 is not mlx5_10.
            hints.insert("NCCL_IB_HCA".to_owned(), format!("={}", ports.join(",")));
        }
        if let Some(interface) = &place.kv_interface {
            hints.insert("NCCL_SOCKET_IFNAME".to_owned(), format!("={interface}"));
        }
    }
    hints.retain(|name, _| !place.set_by_user.contains(name));
    hints
}

/// The variables that [`network_hints`] may set.
pub const HINTED: [&str; 3] = ["UCX_NET_DEVICES", "NCCL_IB_HCA", "NCCL_SOCKET_IFNAME"];

/// The ranks that share a node's cores.
pub(super) fn ranks_on(spots: &[Spot], node: usize) -> Vec<u32> {
    spots.iter().filter(|spot| spot.node == node).map(|spot| count(spot.gpus.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeConfig;

    fn node(address: &str, prefill: &[u32], decode: &[u32]) -> NodeConfig {
        NodeConfig {
            address: Some(address.to_owned()),
            prefill_gpu_ids: prefill.to_vec(),
            decode_gpu_ids: decode.to_vec(),
            ..NodeConfig::default()
        }
    }

    fn config(nodes: Vec<NodeConfig>, prefill_tp: u32) -> Config {
        let mut config = Config::default();
        (config.pd_disagg.enabled, config.pd_disagg.prefill_tp) = (true, Some(prefill_tp));
        config.hosts.nodes = nodes;
        config
    }

    #[test]
    fn a_worker_is_on_one_node_and_numbers_go_over_all_of_them() {
        let nodes = vec![node("a", &[], &[]), node("b", &[0, 1, 2, 3], &[]), node("c", &[4, 5], &[0, 1])];
        let found = spots(&config(nodes, 2)).expect("places");
        let told: Vec<_> =
            found.iter().map(|spot| (spot.role.name(), spot.index, spot.node, spot.gpus.as_slice())).collect();
        assert_eq!(
            told,
            [
                ("prefill", 0, 1, &[0, 1][..]),
                ("prefill", 1, 1, &[2, 3]),
                ("prefill", 2, 2, &[4, 5]),
                ("decode", 0, 2, &[0]),
                ("decode", 1, 2, &[1]),
            ]
        );
        assert_eq!((ranks_on(&found, 0), ranks_on(&found, 2)), (vec![], vec![2, 1, 1]));
        // Ranks are never made up from two nodes.
        assert!(spots(&config(vec![node("a", &[0], &[1]), node("b", &[0], &[1])], 2)).is_err());
        assert!(spots(&config(vec![node("a", &[0, 1], &[])], 1)).is_err(), "nobody decodes");
    }

    #[test]
    fn kv_has_its_own_address_where_one_is_known() {
        let mut config = config(vec![node("a", &[0], &[]), node("b", &[], &[0])], 1);
        config.hosts.nodes[0].kv_address = Some("ib-a".to_owned());
        let place = Place { node: 1, kv_address: Some("10.1.0.2".to_owned()), ..Place::default() };
        let found = nodes(&config, &place);
        assert_eq!(hosts(&config, &found, 0).kv_host, "ib-a");
        assert_eq!(
            (hosts(&config, &found, 1).host.as_str(), hosts(&config, &found, 1).kv_reach.as_str()),
            ("b", "10.1.0.2")
        );
        assert_eq!(hosts(&config, &nodes(&config, &Place::default()), 1).kv_host, "b");
        assert_eq!(hosts(&Config::default(), &[], 0).kv_host, "127.0.0.1");
    }

    #[test]
    fn hints_name_the_devices_of_a_workers_gpus_and_leave_the_users_word() {
        let rdma = [(0, vec!["mlx5_0:1".to_owned()]), (1, vec!["mlx5_1:1".to_owned(), "mlx5_0:1".to_owned()])];
        let place = Place { rdma: rdma.into(), kv_interface: Some("ib0".to_owned()), ..Place::default() };
        let hints = network_hints(&place, &[0, 1], |_| true);
        assert_eq!(hints["UCX_NET_DEVICES"], "mlx5_0:1,mlx5_1:1,ib0");
        assert_eq!(hints["NCCL_IB_HCA"], "=mlx5_0:1,mlx5_1:1");
        assert_eq!(hints["NCCL_SOCKET_IFNAME"], "=ib0");
        assert!(hints.keys().all(|name| HINTED.contains(&name.as_str())));
        assert_eq!(network_hints(&place, &[1], |path| path == Path::Nixl).len(), 1);
        assert!(network_hints(&place, &[0], |path| path == Path::Tcp).is_empty());
        let spoken = Place { set_by_user: ["NCCL_IB_HCA".to_owned()].into(), ..place };
        assert!(!network_hints(&spoken, &[0], |_| true).contains_key("NCCL_IB_HCA"));
        assert!(network_hints(&Place::default(), &[0], |_| true).is_empty());
    }
}
