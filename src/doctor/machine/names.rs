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
    if let Some(config) = setting.config() {
        let host = config.host();
        match listening_address(host) {
            Ok(address) => seen.push(format!("{host} is {address}, an address of this machine")),
            Err(error) => {
                return Answer::fail(
                    format!("workers cannot listen on `{host}`: {error:#}"),
                    "set `pd_disagg.host` (or `inference.server.host`) to an address of this machine, or mend /etc/hosts",
                );
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

fn resolve(host: &str) -> std::io::Result<IpAddr> {
    let mut addresses = (host, 0).to_socket_addrs()?;
    addresses.next().map(|address| address.ip()).ok_or_else(|| std::io::Error::other("it has no address"))
}

fn listening_address(host: &str) -> anyhow::Result<IpAddr> {
    let address = ports::resolve(host)?;
    TcpListener::bind((address, 0)).with_context(|| format!("binding a port on {address}"))?;
    Ok(address)
}
