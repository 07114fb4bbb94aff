//! The addresses of this host, and the one that KV takes.

use std::io;
use std::net::IpAddr;

use crate::config::Network;

/// One address of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceAddress {
    pub interface: String,
    pub address: IpAddr,
}

/// Why no address was chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "no address of this host is in `hosts.kv_interface` = {wanted:?}; it has {seen}: name one of these, or give the node a kv_address"
)]
pub struct NoAddress {
    wanted: String,
    seen: String,
}

/// Every address of every interface that is up, but those that only this host or this link knows.
pub fn addresses() -> io::Result<Vec<InterfaceAddress>> {
    let found = if_addrs::get_if_addrs()?;
    let usable = |address: &IpAddr| match address {
        IpAddr::V4(address) => !address.is_loopback() && !address.is_link_local(),
        // What begins so needs an interface beside it wherever it is used.
        IpAddr::V6(address) => !address.is_loopback() && (address.segments()[0] & 0xffc0) != 0xfe80,
    };
    let all = found.into_iter().map(|found| (found.ip(), found.name));
    Ok(all
        .filter(|(address, _)| usable(address))
        .map(|(address, interface)| InterfaceAddress { interface, address })
        .collect())
}

/// The first address in the network that is wanted, IPv4 before IPv6.
pub fn choose(wanted: &str, seen: &[InterfaceAddress]) -> Result<InterfaceAddress, NoAddress> {
    let none = || {
        let named: Vec<String> = seen.iter().map(|seen| format!("{} ({})", seen.address, seen.interface)).collect();
        let seen = if named.is_empty() { "none".to_owned() } else { named.join(", ") };
        NoAddress { wanted: wanted.to_owned(), seen }
    };
    let network: Network = wanted.parse().map_err(|_| none())?;
    let mut fitting: Vec<&InterfaceAddress> =
        seen.iter().filter(|seen| network.has(&seen.interface, seen.address)).collect();
    fitting.sort_by_key(|found| !found.address.is_ipv4());
    fitting.first().map(|found| (*found).clone()).ok_or_else(none)
}

/// The interface that has an address.
pub fn interface_of(address: IpAddr, seen: &[InterfaceAddress]) -> Option<String> {
    seen.iter().find(|seen| seen.address == address).map(|seen| seen.interface.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_decides_and_a_miss_names_what_is_there() {
        let at = |interface: &str, address: &str| InterfaceAddress {
            interface: interface.to_owned(),
            address: address.parse().expect("an address"),
        };
        let seen = [at("eth0", "10.0.0.1"), at("ib0", "fd00::1"), at("ib0", "10.1.0.1"), at("ib1", "10.2.0.1")];
        let chosen = |wanted: &str| choose(wanted, &seen).map(|found| found.address.to_string());
        assert_eq!(chosen("ib0").as_deref(), Ok("10.1.0.1"));
        assert_eq!(chosen("10.2.0.0/16").as_deref(), Ok("10.2.0.1"));
        assert_eq!(chosen("fd00::/8").as_deref(), Ok("fd00::1"));
        assert_eq!(interface_of(seen[3].address, &seen).as_deref(), Some("ib1"));
        let told = chosen("ib7").expect_err("there is none").to_string();
        assert!(told.contains("\"ib7\"") && told.contains("10.0.0.1 (eth0), fd00::1 (ib0)"), "{told}");
        assert!(addresses().is_ok());
    }
}
