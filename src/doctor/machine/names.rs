//! Names of hosts: the one workers listen on, and this machine's own.

use std::net::{IpAddr, TcpListener, ToSocketAddrs};
use std::time::{Duration, Instant};

use anyhow::Context;

use super::super::check::Answer;
use super::super::setting::Setting;
use crate::launcher::ports;

/// A name that takes longer comes from a server that does not answer at first.
const SLOW: Duration = Duration::from_secs(1);

pub(super) fn check(setting: &Setting) -> Answer {
    let own = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut seen = Vec::new();
    for (host, key) in own_hosts(setting) {
        match listening_address(host) {
            Ok(address) => seen.push(format!("{host} is {address}, an address of this machine")),
            Err(error) => {
                let mend = format!("set `{key}` to an address of this machine, or mend /etc/hosts");
                return Answer::fail(format!("workers cannot listen on `{host}`: {error:#}"), mend);
            }
        }
    }
    for (node, host) in others(setting) {
        match resolve(host) {
            Ok(address) => seen.push(format!("node {node} is {host}, {address}")),
            Err(error) => {
                let mend =
                    format!("set `hosts.nodes[{node}].address` (or `hosts.addresses`), or add `{host}` to /etc/hosts");
                return Answer::fail(format!("node {node}, `{host}`, cannot be found from here: {error}"), mend);
            }
        }
    }
    let started = Instant::now();
    let resolved = resolve(&own);
    let took = started.elapsed();
    let mend = format!("add `{own}` to /etc/hosts: vLLM and NCCL look it up when they start");
    match resolved {
        Err(error) => Answer::warn(format!("this machine's own name `{own}` is unknown: {error}"), mend),
        Ok(_) if took > SLOW => Answer::warn(format!("`{own}` took {:.1} s to look up", took.as_secs_f64()), mend),
        Ok(address) => {
            seen.push(format!("this machine is {own}, {address}"));
            Answer::ok(seen.join("; "))
        }
    }
    .with("name", own)
}

/// Where something of this host's part listens, and the setting that says so.
fn own_hosts(setting: &Setting) -> Vec<(&str, &'static str)> {
    let (Some(config), Ok(place)) = (setting.config(), &setting.place) else { return Vec::new() };
    let (http, kv) = place.own_hosts(config);
    let mut hosts = Vec::new();
    if !config.hosts.is_given() || place.node == 0 {
        hosts.push((config.host(), "pd_disagg.host` (or `inference.server.host"));
    }
    if config.hosts.is_given() {
        hosts.extend([(http, "hosts.nodes.address"), (kv, "hosts.nodes.kv_address")]);
    }
    hosts.dedup_by_key(|(host, _)| *host);
    hosts
}

/// The other nodes and their addresses.
fn others(setting: &Setting) -> Vec<(usize, &str)> {
    let Some(hosts) = setting.config().map(|config| &config.hosts) else { return Vec::new() };
    let own = setting.place.as_ref().ok().map(|place| place.node);
    (0..hosts.nodes.len())
        .filter(|node| own != Some(*node))
        .filter_map(|node| Some((node, hosts.address(node)?)))
        .collect()
}

fn resolve(host: &str) -> std::io::Result<IpAddr> {
    let mut addresses = (host, 0).to_socket_addrs()?;
    addresses.next().map(|address| address.ip()).ok_or_else(|| std::io::Error::other("it has no address"))
}

fn listening_address(host: &str) -> anyhow::Result<IpAddr> {
    let address = ports::resolve(host)?;
    TcpListener::bind((address, 0)).with_context(|| format!("binding a port on {address}"))?;
    Ok(address)
}
