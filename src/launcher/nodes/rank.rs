//! Which node this is: said on the command line, by what started us, or by our own addresses.

use std::net::IpAddr;

use crate::config::HostsConfig;

/// Variables that give the rank, in the order they are looked at, and what sets them.
const VARIABLES: [(&str, &str); 5] = [
    ("PDLINK_NODE", "by hand"),
    ("SLURM_NODEID", "Slurm"),
    ("SLURM_PROCID", "Slurm"),
    ("GROUP_RANK", "torchrun"),
    ("NODE_RANK", "launchers of PyTorch"),
];

/// What a process can see of where it is.
pub struct Signs<'a> {
    /// `--node`
    pub flag: Option<usize>,
    pub env: &'a dyn Fn(&str) -> Option<String>,
    pub host_name: &'a str,
    pub addresses: &'a [IpAddr],
}

/// Why it is not known which node this is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RankError {
    #[error("{source_name} says that this is node {rank}, and there are nodes 0 to {last} in [[hosts.nodes]]")]
    Beyond { source_name: String, rank: usize, last: usize },
    #[error("the environment variable {variable} must be a node's number, and is {value:?}")]
    NoNumber { variable: &'static str, value: String },
    #[error(
        "which of the {nodes} nodes of [[hosts.nodes]] is this? say --node RANK; neither {}, nor this host's addresses, nor the \
         number at the end of its name ({host_name}) tell", VARIABLES.map(|(name, _)| name).join(", ")
    )]
    Unknown { nodes: usize, host_name: String },
    #[error("this host has the addresses of nodes {first} and {second}; say --node RANK")]
    Ambiguous { first: usize, second: usize },
}

/// The rank of this node.
pub fn rank(hosts: &HostsConfig, signs: &Signs<'_>) -> Result<usize, RankError> {
    let count = hosts.nodes.len();
    let within = |rank: usize, source_name: &str| {
        let beyond = || RankError::Beyond { source_name: source_name.to_owned(), rank, last: count.saturating_sub(1) };
        if rank < count { Ok(rank) } else { Err(beyond()) }
    };
    if let Some(rank) = signs.flag {
        return within(rank, "--node");
    }
    for (variable, _) in VARIABLES {
        let Some(value) = (signs.env)(variable).filter(|value| !value.is_empty()) else { continue };
        let rank = value.parse().map_err(|_| RankError::NoNumber { variable, value })?;
        return within(rank, variable);
    }
    if let Some(rank) = by_address(hosts, signs)? {
        return Ok(rank);
    }
    // A pod of a StatefulSet: `pdlink-0`.
    let ordinal = signs.host_name.split('.').next().and_then(|name| name.rsplit_once('-')?.1.parse().ok());
    match ordinal {
        Some(rank) if rank < count => Ok(rank),
        _ => Err(RankError::Unknown { nodes: count, host_name: signs.host_name.to_owned() }),
    }
}

/// The node whose address, or name, is this host's. Names of others are not looked up: that may take long, and lie.
fn by_address(hosts: &HostsConfig, signs: &Signs<'_>) -> Result<Option<usize>, RankError> {
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_lowercase();
    let is_ours = |address: &str| match address.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => signs.addresses.contains(&address),
        Err(_) => short(address) == short(signs.host_name),
    };
    let mut ours = (0..hosts.nodes.len()).filter(|rank| hosts.address(*rank).is_some_and(is_ours));
    match (ours.next(), ours.next()) {
        (Some(first), Some(second)) => Err(RankError::Ambiguous { first, second }),
        (first, _) => Ok(first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NodeConfig;

    fn hosts(addresses: &[&str]) -> HostsConfig {
        HostsConfig {
            nodes: vec![NodeConfig::default(); addresses.len()],
            addresses: Some(addresses.iter().map(|address| (*address).to_owned()).collect()),
            ..HostsConfig::default()
        }
    }

    fn found(flag: Option<usize>, env: &[(&str, &str)], host_name: &str, own: &[&str]) -> Result<usize, String> {
        let env = |name: &str| env.iter().find(|(own, _)| *own == name).map(|(_, value)| (*value).to_owned());
        let addresses: Vec<IpAddr> = own.iter().map(|address| address.parse().expect("an address")).collect();
        let signs = Signs { flag, env: &env, host_name, addresses: &addresses };
        rank(&hosts(&["10.0.0.1", "10.0.0.2", "gpu-c"]), &signs).map_err(|error| error.to_string())
    }

    #[test]
    fn the_nearest_word_counts() {
        let slurm = [("SLURM_NODEID", "1"), ("SLURM_PROCID", "7")];
        assert_eq!(found(Some(2), &slurm, "x", &["10.0.0.1"]), Ok(2));
        assert_eq!(found(None, &slurm, "x-0", &["10.0.0.1"]), Ok(1));
        assert_eq!(found(None, &[("PDLINK_NODE", ""), ("GROUP_RANK", "2")], "x", &[]), Ok(2));
        assert_eq!(found(None, &[], "x-2", &["127.0.0.1", "10.0.0.2"]), Ok(1));
        assert_eq!(found(None, &[], "GPU-c.rack.example", &[]), Ok(2));
        assert_eq!(found(None, &[], "pdlink-1.pdlink.default.svc", &[]), Ok(1));
    }

    #[test]
    fn what_cannot_be_told_is_asked() {
        for (refused, want) in [
            (found(Some(3), &[], "x", &[]), "--node says that this is node 3, and there are nodes 0 to 2"),
            (found(None, &[("NODE_RANK", "one")], "x", &[]), "NODE_RANK must be a node's number, and is \"one\""),
            (found(None, &[("SLURM_NODEID", "9")], "x", &[]), "SLURM_NODEID says that this is node 9"),
            (found(None, &[], "pod-7", &["10.9.9.9"]), "say --node RANK"),
            (found(None, &[], "x", &["10.0.0.1", "10.0.0.2"]), "the addresses of nodes 0 and 1"),
        ] {
            let told = refused.expect_err("refused");
            assert!(told.contains(want), "{told}");
        }
    }
}
