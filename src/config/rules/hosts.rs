//! Several hosts: every node with an address and GPUs of its own, and a way for KV between them.

use std::collections::BTreeSet;

use crate::config::root::is_loopback;
use crate::config::{NodeConfig, Path, Role};

use super::Bench;

const NODES: &str = "hosts.nodes";

pub(super) fn judge(bench: &mut Bench<'_>) {
    if !bench.config.hosts.is_given() {
        return unused(bench);
    }
    lists_elsewhere(bench);
    addresses(bench);
    for (rank, node) in bench.config.hosts.nodes.iter().enumerate() {
        gpus(bench, rank, node);
    }
    every_role(bench);
    network(bench);
    paths(bench);
}

/// Settings that say nothing without nodes.
fn unused(bench: &mut Bench<'_>) {
    for key in ["addresses", "port", "kv_interface", "rdma_hints", "join_timeout_s", "lost_after_s", "node0_timeout_s"]
    {
        let key = format!("hosts.{key}");
        if bench.has(&key) {
            bench.note(&key, "is not used: there are no [[hosts.nodes]], so all workers run on this host");
        }
    }
}

/// GPU ids belong to a node.
fn lists_elsewhere(bench: &mut Bench<'_>) {
    for key in ["pd_disagg.prefill_gpu_ids", "pd_disagg.decode_gpu_ids", "inference_gpu_ids"] {
        if bench.has(key) {
            let message = "is given beside [[hosts.nodes]]: it does not say on which node these GPUs are";
            bench.refuse(&[key], message, "take it out, and list the GPUs of each node in its [[hosts.nodes]]");
        }
    }
}

fn addresses(bench: &mut Bench<'_>) {
    let hosts = &bench.config.hosts;
    let count = hosts.nodes.len();
    if let Some(given) = hosts.addresses.as_ref().filter(|given| given.len() != count) {
        let message = format!("has {} addresses for {count} nodes", given.len());
        return bench.refuse(&["hosts.addresses", NODES], message, "list one address for each node, in order of rank");
    }
    let mut seen = BTreeSet::new();
    for rank in 0..count {
        let key = if hosts.addresses.is_some() {
            format!("hosts.addresses[{rank}]")
        } else {
            format!("{NODES}[{rank}].address")
        };
        let Some(address) = hosts.address(rank) else {
            let message = format!("is missing: nobody can reach node {rank}");
            bench.refuse(&[&key], message, "give each node an address, or all of them in hosts.addresses");
            continue;
        };
        if address.is_empty() || address.contains(|c: char| c == '/' || c == '*' || c.is_whitespace()) {
            let message = format!("must be a host name or an address, and here is {address:?}");
            bench.refuse(&[&key], message, "write a name or an address alone, as in \"10.0.0.1\"");
        } else if ["0.0.0.0", "::", "[::]"].contains(&address) || hosts.has_several() && is_loopback(address) {
            let message = format!("is {address}, which no other node can reach");
            bench.refuse(&[&key], message, "give the address that the node has in the network between the nodes");
        } else if !seen.insert(address) {
            let message = format!("is {address}, which an earlier node has");
            bench.refuse(&[&key], message, "give each node an address of its own; GPUs of one host go into one node");
        }
    }
}

fn gpus(bench: &mut Bench<'_>, rank: usize, node: &NodeConfig) {
    let with_pd = bench.config.pd_disagg.enabled;
    let of_role = [(Role::Prefill, "prefill_gpu_ids"), (Role::Decode, "decode_gpu_ids"), (Role::Both, "gpu_ids")];
    let mut taken = BTreeSet::new();
    for (role, name) in of_role {
        let (key, ids) = (format!("{NODES}[{rank}].{name}"), node.role_gpu_ids(role));
        if ids.is_empty() {
            continue;
        }
        if with_pd == (role == Role::Both) {
            let (state, mend) = if with_pd {
                ("true", "list its GPUs in prefill_gpu_ids and decode_gpu_ids")
            } else {
                ("false", "list its GPUs in gpu_ids, or set pd_disagg.enabled = true")
            };
            bench.refuse(&[&key], format!("is given, and pd_disagg.enabled is {state}"), mend);
            continue;
        }
        let mut own = BTreeSet::new();
        if let Some(id) = ids.iter().find(|id| !own.insert(**id)) {
            bench.refuse(&[&key], format!("has GPU {id} more than once"), "list each GPU of a node once");
        }
        if let Some(id) = own.iter().find(|id| taken.contains(*id)).filter(|_| !bench.config.pd_disagg.shared_gpus) {
            let message = format!("has GPU {id}, which prefills on node {rank}: a GPU serves one role");
            bench.refuse(&[&key], message, "give each role GPUs of its own, or set pd_disagg.shared_gpus = true");
        }
        taken.extend(own);
        let tp = usize::try_from(bench.config.tp(role)).unwrap_or(usize::MAX);
        if tp != 0 && ids.len() % tp != 0 {
            let message = format!("has {} GPU ids, and a worker takes {tp} of one node", ids.len());
            bench.refuse(&[&key], message, format!("list a multiple of {tp}: a worker's ranks are all on one node"));
        }
    }
}

fn every_role(bench: &mut Bench<'_>) {
    for role in bench.config.roles() {
        if bench.config.gpu_ids(*role).is_empty() {
            let (name, list) = match role {
                Role::Prefill => ("prefill", "prefill_gpu_ids"),
                Role::Decode => ("decode", "decode_gpu_ids"),
                Role::Both => ("plain", "gpu_ids"),
            };
            let message = format!("has no GPU in any {list}: there would be no {name} worker");
            bench.refuse(&[NODES], message, format!("list GPUs in {list} of one node at least"));
        }
    }
}

/// The network of KV must be something that can be looked for.
fn network(bench: &mut Bench<'_>) {
    let Some(wanted) = &bench.config.hosts.kv_interface else { return };
    if let Err(why) = wanted.parse::<crate::config::Network>() {
        let message = format!("is {wanted:?}: {why}");
        bench.refuse(
            &["hosts.kv_interface"],
            message,
            "write an interface (\"ib0\", \"ib*\") or a network (\"10.1.0.0/16\")",
        );
    }
}

/// Paths that end at the host's edge move nothing between nodes.
fn paths(bench: &mut Bench<'_>) {
    let config = bench.config;
    let Some(paths) = config.kv.paths.as_ref().filter(|_| config.pd_disagg.enabled) else { return };
    let on = |role| (0..config.node_count()).filter(move |node| !config.gpu_ids_on(*node, role).is_empty());
    let meets_across = on(Role::Prefill).any(|prefill| on(Role::Decode).any(|decode| prefill != decode));
    if meets_across && !paths.is_empty() && !paths.iter().any(|path| path.crosses_hosts()) {
        let message = "names no path between hosts, and prefill and decode are on different nodes";
        let crossing = Path::list(Path::BEST_FIRST.into_iter().filter(|path| path.crosses_hosts()));
        bench.refuse(&["kv.paths", NODES], message, format!("add one of {crossing}"));
    }
}
