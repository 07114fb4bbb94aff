//! Which node this is, and what only it knows of its networks.

use std::net::IpAddr;

use super::interfaces::{self, InterfaceAddress, NoAddress};
use super::rank::{RankError, Signs, rank};
use super::rdma;
use crate::config::Config;
use crate::launcher::ports::resolve;
use crate::topology::{HINTED, Place};

/// Why a host cannot take its place in a run.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    #[error("--node needs [[hosts.nodes]] in the configuration")]
    NoNodes,
    #[error(transparent)]
    Rank(#[from] RankError),
    #[error("this host's interfaces cannot be listed: {0}")]
    Interfaces(#[from] std::io::Error),
}

/// What was found: the place, and why its KV network is not known where it is not.
pub struct Site {
    pub place: Place,
    pub no_network: Option<NoAddress>,
}

impl Site {
    /// The one host of a run that names none, or that stands for any.
    pub fn any() -> Self {
        Self { place: Place::default(), no_network: None }
    }
}

/// Looks at this host. `flag` is what the command line says.
pub async fn look(config: &Config, flag: Option<usize>) -> Result<Site, SiteError> {
    if !config.hosts.is_given() {
        return if flag.is_some() { Err(SiteError::NoNodes) } else { Ok(Site::any()) };
    }
    let seen = interfaces::addresses()?;
    let node = which(config, flag, &seen)?;
    let (kv, no_network) = match network(config, node, &seen) {
        Ok(kv) => (kv, None),
        Err(error) => (None, Some(error)),
    };
    let set_by_user = HINTED.iter().filter(|name| std::env::var_os(name).is_some());
    let place = Place {
        node,
        kv_interface: kv.as_ref().map(|kv| kv.interface.clone()).filter(|_| config.hosts.rdma_hints),
        // A node's own address stays as it was given, as a name perhaps.
        kv_address: kv.filter(|_| config.hosts.kv_interface.is_some()).map(|kv| kv.address.to_string()),
        rdma: if config.hosts.rdma_hints { rdma::near_gpus().await } else { Default::default() },
        set_by_user: set_by_user.map(|name| (*name).to_owned()).collect(),
    };
    Ok(Site { place, no_network })
}

fn which(config: &Config, flag: Option<usize>, seen: &[InterfaceAddress]) -> Result<usize, RankError> {
    let host_name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let addresses: Vec<IpAddr> = seen.iter().map(|seen| seen.address).collect();
    let env = |name: &str| std::env::var(name).ok();
    rank(&config.hosts, &Signs { flag, env: &env, host_name: &host_name, addresses: &addresses })
}

/// The address that KV takes on this node, if it is another than the node's own or its interface is known.
fn network(config: &Config, node: usize, seen: &[InterfaceAddress]) -> Result<Option<InterfaceAddress>, NoAddress> {
    let named = config.hosts.nodes.get(node).and_then(|node| node.kv_address.as_deref());
    if let (None, Some(wanted)) = (named, &config.hosts.kv_interface) {
        return interfaces::choose(wanted, seen).map(Some);
    }
    let Some(host) = named.or_else(|| config.hosts.address(node)) else { return Ok(None) };
    // A name that cannot be looked up is told when its port is bound, with the key to change.
    let Ok(address) = resolve(host) else { return Ok(None) };
    Ok(interfaces::interface_of(address, seen).map(|interface| InterfaceAddress { interface, address }))
}
