//! Which node this is, and what only it knows of its networks.

use std::net::IpAddr;

use super::stage::warn_on_stderr;
use crate::cli::Usage;
use crate::config::Config;
use crate::launcher::nodes::interfaces::{self, InterfaceAddress};
use crate::launcher::nodes::rank::{RankError, Signs, rank};
use crate::launcher::nodes::rdma;
use crate::launcher::ports::resolve;
use crate::topology::{HINTED, Place};

/// Looks at this host. A dry run may be on any: what it cannot tell, it leaves out and says.
pub(super) async fn look(config: &Config, flag: Option<usize>, is_dry: bool) -> anyhow::Result<Place> {
    if !config.hosts.is_given() {
        return match flag {
            Some(_) => Err(Usage::new("--node needs [[hosts.nodes]] in the configuration").into()),
            None => Ok(Place::default()),
        };
    }
    let seen = interfaces::addresses()?;
    let node = match which(config, flag, &seen) {
        Ok(node) => node,
        Err(RankError::Unknown { .. }) if is_dry => {
            warn_on_stderr("this host is none of [[hosts.nodes]]: what a node finds out for itself is not shown");
            return Ok(Place::default());
        }
        Err(error) => return Err(Usage::new(error.to_string()).into()),
    };
    let kv = match network(config, node, &seen) {
        Ok(kv) => kv,
        Err(error) if is_dry => {
            warn_on_stderr(&error.to_string());
            None
        }
        Err(error) => return Err(error),
    };
    let set_by_user = HINTED.iter().filter(|name| std::env::var_os(name).is_some());
    Ok(Place {
        node,
        kv_interface: kv.as_ref().map(|kv| kv.interface.clone()).filter(|_| config.hosts.rdma_hints),
        // A node's own address stays as it was given, as a name perhaps.
        kv_address: kv.filter(|_| config.hosts.kv_interface.is_some()).map(|kv| kv.address.to_string()),
        rdma: if config.hosts.rdma_hints { rdma::near_gpus().await } else { Default::default() },
        set_by_user: set_by_user.map(|name| (*name).to_owned()).collect(),
    })
}

fn which(config: &Config, flag: Option<usize>, seen: &[InterfaceAddress]) -> Result<usize, RankError> {
    let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let addresses: Vec<IpAddr> = seen.iter().map(|seen| seen.address).collect();
    let env = |name: &str| std::env::var(name).ok();
    rank(&config.hosts, &Signs { flag, env: &env, host_name: &host_name, addresses: &addresses })
}

/// The address that KV takes on this node, if it is another than the node's own or its interface is known.
fn network(config: &Config, node: usize, seen: &[InterfaceAddress]) -> anyhow::Result<Option<InterfaceAddress>> {
    let named = config.hosts.nodes.get(node).and_then(|node| node.kv_address.as_deref());
    if let (None, Some(wanted)) = (named, &config.hosts.kv_interface) {
        let chosen = interfaces::choose(wanted, seen);
        return Ok(Some(chosen.map_err(|error| anyhow::anyhow!("node {node}: {error}"))?));
    }
    let Some(host) = named.or_else(|| config.hosts.address(node)) else { return Ok(None) };
    // A name that cannot be looked up is told when its port is bound, with the key to change.
    let Ok(address) = resolve(host) else { return Ok(None) };
    Ok(interfaces::interface_of(address, seen).map(|interface| InterfaceAddress { interface, address }))
}
