//! The ports of a run on several hosts: this node's are held, each on its own address; the others' are only counted.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use tokio::time::Instant;

use crate::launcher::ports::{HeldPort, HeldPorts, resolve};
use crate::topology::ports::{Listener, PortError, PortWish, Ports};

/// Where counting begins for a port that its node's system chooses.
const COUNTED_FROM: u16 = 40_000;

/// How often it is looked whether a port is free again.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Counts the ports of nodes from their bases, and holds none.
#[derive(Default)]
pub struct CountedPorts {
    given: BTreeMap<usize, BTreeSet<u16>>,
}

impl Ports for CountedPorts {
    fn take(&mut self, wish: PortWish<'_>) -> Result<u16, PortError> {
        let given = self.given.entry(wish.node).or_default();
        let mut base = if wish.base == 0 { COUNTED_FROM } else { wish.base };
        while (base..base.saturating_add(wish.count)).any(|port| given.contains(&port)) && base < u16::MAX {
            base += 1;
        }
        given.extend(base..base.saturating_add(wish.count));
        Ok(base)
    }
}

/// Holds this node's ports and counts the others'.
pub struct NodePorts {
    node: usize,
    front: HeldPorts,
    http: HeldPorts,
    kv: HeldPorts,
    others: CountedPorts,
    /// What this node had when it was here last.
    before: BTreeMap<String, VecDeque<u16>>,
    taken: Vec<(String, u16)>,
}

/// What stays held while the run lives.
pub struct Held {
    pub front: HeldPorts,
    pub workers: [HeldPorts; 2],
}

impl NodePorts {
    /// Ports of a node whose workers listen on `host` and `kv_host`, the proxy on `front`; `before`: by purpose, in order.
    pub fn on(
        node: usize,
        front: &str,
        host: &str,
        kv_host: &str,
        before: Vec<(String, u16)>,
    ) -> Result<Self, PortError> {
        let mut by_purpose: BTreeMap<String, VecDeque<u16>> = BTreeMap::new();
        for (purpose, port) in before {
            by_purpose.entry(purpose).or_default().push_back(port);
        }
        Ok(Self {
            node,
            front: HeldPorts::on(front)?,
            http: HeldPorts::on(host)?,
            kv: HeldPorts::on(kv_host)?,
            others: CountedPorts::default(),
            before: by_purpose,
            taken: Vec::new(),
        })
    }

    /// Waits until the ports this node had are free again, within a bound: the workers of a launcher that was killed may still be
    /// ending. What is not free by then is told when it is taken.
    pub async fn until_free(before: &[(String, u16)], hosts: [&str; 2], within: Duration) {
        let addresses: Vec<IpAddr> = hosts.iter().filter_map(|host| resolve(host).ok()).collect();
        let is_free = |port: u16| addresses.iter().all(|address| HeldPort::bind(*address, port).is_ok());
        let until = Instant::now() + within;
        while Instant::now() < until && !before.iter().all(|(_, port)| is_free(*port)) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// What this node took, by purpose and in order.
    pub fn taken(&self) -> &[(String, u16)] {
        &self.taken
    }

    /// What must stay held.
    pub fn held(self) -> Held {
        Held { front: self.front, workers: [self.http, self.kv] }
    }
}

impl Ports for NodePorts {
    fn take(&mut self, wish: PortWish<'_>) -> Result<u16, PortError> {
        if wish.node != self.node {
            return self.others.take(wish);
        }
        let held = match wish.of {
            Listener::Front => return self.front.take(wish),
            Listener::Http => &mut self.http,
            Listener::Kv => &mut self.kv,
        };
        // The others know this node by the ports it had: it takes the same, or none.
        let port = match self.before.get_mut(wish.purpose).and_then(VecDeque::pop_front) {
            Some(port) => held.take(PortWish { base: port, search: false, ..wish })?,
            None => held.take(wish)?,
        };
        self.taken.push((wish.purpose.to_owned(), port));
        Ok(port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(node: usize, purpose: &str, base: u16, of: Listener) -> PortWish<'_> {
        PortWish { purpose, key: "pd_disagg.decode_port", base, count: 1, search: true, node, of }
    }

    #[tokio::test]
    async fn ports_of_workers_that_are_still_ending_are_waited_for() {
        let held = HeldPort::bind(IpAddr::from([127, 0, 0, 1]), 0).expect("a port");
        let before = [("HTTP port of decode 0".to_owned(), held.address().port())];
        let waited = NodePorts::until_free(&before, ["127.0.0.1", "127.0.0.1"], Duration::from_secs(60));
        let freed = async {
            tokio::time::sleep(LOOK_EVERY).await;
            drop(held);
        };
        tokio::join!(waited, freed);
        assert!(HeldPort::bind(IpAddr::from([127, 0, 0, 1]), before[0].1).is_ok());
    }

    #[test]
    fn other_nodes_ports_are_counted_and_own_ones_are_held_and_come_again() {
        let mut ports = NodePorts::on(1, "127.0.0.1", "127.0.0.1", "127.0.0.1", Vec::new()).expect("loopback");
        assert_eq!(ports.take(wish(0, "proxy", 8000, Listener::Front)).expect("counted"), 8000);
        assert_eq!(ports.take(wish(0, "a", 8000, Listener::Http)).expect("counted"), 8001);
        assert_eq!(ports.take(wish(2, "a", 8000, Listener::Http)).expect("counted"), 8000);
        let http = ports.take(wish(1, "HTTP port of decode 0", 0, Listener::Http)).expect("held");
        let kv: Vec<u16> =
            (0..2).map(|_| ports.take(wish(1, "KV port of decode 0", 0, Listener::Kv)).expect("held")).collect();
        assert!(kv[0] != kv[1] && http != kv[0]);
        let taken = ports.taken().to_vec();

        let again = |ports: &mut NodePorts| ports.take(wish(1, "KV port of decode 0", 0, Listener::Kv));
        let mut second = NodePorts::on(1, "127.0.0.1", "127.0.0.1", "127.0.0.1", taken.clone()).expect("loopback");
        let refused = again(&mut second).expect_err("the first still holds it").to_string();
        assert!(refused.contains(&kv[0].to_string()), "{refused}");
        drop((ports, second));
        let mut back = NodePorts::on(1, "127.0.0.1", "127.0.0.1", "127.0.0.1", taken).expect("loopback");
        assert_eq!((again(&mut back).expect("free"), again(&mut back).expect("free")), (kv[0], kv[1]));
    }
}
