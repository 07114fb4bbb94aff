//! A network, as people name it: an interface, the beginning of one's name, or a range of addresses. And a port of a host.

use std::net::IpAddr;
use std::str::FromStr;

/// `host:port`, with brackets round an IPv6 address.
pub fn host_port(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// Which addresses of a host are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Network {
    /// Those of the interface with this name.
    Interface(String),
    /// Those of interfaces whose names begin so.
    Interfaces(String),
    /// Those whose first bits are these.
    Range { base: IpAddr, bits: u8 },
}

impl FromStr for Network {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some((base, bits)) = text.split_once('/') {
            let base: IpAddr = base.parse().map_err(|_| "what stands before the slash is no address")?;
            let most = if base.is_ipv4() { 32 } else { 128 };
            let bits = bits.parse().ok().filter(|bits| *bits <= most);
            return Ok(Self::Range { base, bits: bits.ok_or("what stands behind the slash is no number of bits")? });
        }
        let (name, is_beginning) = text.strip_suffix('*').map_or((text, false), |name| (name, true));
        if name.is_empty() || !name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.@:".contains(c)) {
            return Err("that is no name of an interface");
        }
        if name.parse::<IpAddr>().is_ok() {
            return Err("that is one address; a node's own goes into its kv_address");
        }
        Ok(if is_beginning { Self::Interfaces(name.to_owned()) } else { Self::Interface(name.to_owned()) })
    }
}

impl Network {
    /// Whether an address of an interface is meant.
    pub fn has(&self, interface: &str, address: IpAddr) -> bool {
        match self {
            Self::Interface(name) => interface == name,
            Self::Interfaces(beginning) => interface.starts_with(beginning.as_str()),
            Self::Range { base, bits } => match (bits_of(*base), bits_of(address)) {
                ((base, width), (address, same)) if width == same => {
                    let rest = u32::from(width - bits);
                    base.checked_shr(rest).unwrap_or(0) == address.checked_shr(rest).unwrap_or(0)
                }
                _ => false,
            },
        }
    }
}

fn bits_of(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u32::from(address).into(), 32),
        IpAddr::V6(address) => (address.into(), 128),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_a_name_a_beginning_or_a_range() {
        let cases = [
            ("ib0", "ib0", "10.0.0.1", true),
            ("ib0", "ib00", "10.0.0.1", false),
            ("ib*", "ib7", "10.0.0.1", true),
            ("ib*", "eth0", "10.0.0.1", false),
            ("10.1.0.0/16", "eth0", "10.1.255.1", true),
            ("10.1.0.0/16", "eth0", "10.2.0.1", false),
            ("10.1.2.3/32", "eth0", "10.1.2.3", true),
            ("0.0.0.0/0", "eth0", "10.2.0.1", true),
            ("0.0.0.0/0", "eth0", "fd00::1", false),
            ("::/0", "eth0", "fd00::1", true),
            ("fd00:1::/32", "eth0", "fd00:1::9", true),
            ("fd00:1::/32", "eth0", "fd00:2::9", false),
        ];
        for (network, interface, address, want) in cases {
            let network: Network = network.parse().unwrap();
            assert_eq!(network.has(interface, address.parse().unwrap()), want, "{network:?}, {interface} {address}");
        }
        for wrong in ["", "*", "10.0.0.1", "10.0.0.0/33", "10.0.0/8", "a b", "::/129"] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }
}
