//! Ports that stay ours from the plan until the worker listens, and again when the worker is restarted.
//!
//! A held port is a socket bound *without* `SO_REUSEADDR`, so that the kernel refuses it where anyone else is bound.
//! Then `SO_REUSEADDR` is set on it, and it never listens: Linux lets a worker that sets `SO_REUSEADDR` itself bind and
//! listen beside such a socket, and refuses everyone who does not. While no worker listens, connects are refused.
//!
//! Connections of an earlier run that linger in `TIME_WAIT` make the first bind fail as well. A second, shared bind then
//! passes them and still fails on a listener. It would not see another launcher's held port, therefore each port is also
//! locked by name, with a socket in the abstract namespace: it has the scope of ports (the network namespace) and goes with
//! its process.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};

use socket2::{Domain, Protocol, Socket, Type};

use crate::topology::ports::{Listener, PortError, PortWish, Ports};

/// Ports tried upwards from the base before giving up.
const SEARCH_MAX: u32 = 2_000;

/// Connections that wait for the proxy to accept them.
const BACKLOG: i32 = 4_096;

/// One port, bound and not listening.
pub struct HeldPort {
    socket: Socket,
    address: SocketAddr,
    // Kept for its name alone; nobody connects to it.
    _lock: UnixListener,
}

impl HeldPort {
    /// Binds `port` on `ip`; `AddrInUse` when somebody else has it.
    pub fn bind(ip: IpAddr, port: u16) -> io::Result<Self> {
        let wanted = SocketAddr::new(ip, port);
        if port == 0 {
            let socket = exclusive(wanted)?;
            return Self::finish(socket);
        }
        let lock = lock_by_name(port)?;
        let socket = match exclusive(wanted) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && has_past_connections(port) => shared(wanted)?,
            other => other?,
        };
        socket.set_reuse_address(true)?;
        Ok(Self { socket, address: wanted, _lock: lock })
    }

    fn finish(socket: Socket) -> io::Result<Self> {
        let address = local_address(&socket)?;
        let lock = lock_by_name(address.port())?;
        socket.set_reuse_address(true)?;
        Ok(Self { socket, address, _lock: lock })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts to listen on the port ourselves, as the proxy does. The listener does not block.
    pub fn listen(self) -> io::Result<TcpListener> {
        self.socket.listen(BACKLOG)?;
        self.socket.set_nonblocking(true)?;
        Ok(self.socket.into())
    }
}

fn exclusive(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn shared(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    socket.local_addr()?.as_socket().ok_or_else(|| io::Error::other("the socket has no internet address"))
}

/// One name per port whatever the address: two launchers that hold one port on different addresses would be rare, and
/// a wildcard address overlaps all others.
fn lock_by_name(port: u16) -> io::Result<UnixListener> {
    UnixListener::bind_addr(&UnixAddr::from_abstract_name(format!("pdlink/port/{port}"))?)
}

/// Whether sockets of this port exist that are neither listening nor merely bound: connections, mostly in `TIME_WAIT`.
fn has_past_connections(port: u16) -> bool {
    ["/proc/self/net/tcp", "/proc/self/net/tcp6"].iter().any(|table| {
        std::fs::read_to_string(table).is_ok_and(|text| text.lines().skip(1).any(|line| is_connection_of(line, port)))
    })
}

/// One line of `/proc/net/tcp`: `sl local_address rem_address st …`, addresses as `HEX:PORT`, state 0A is `LISTEN`.
fn is_connection_of(line: &str, port: u16) -> bool {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local =
        fields.next().and_then(|address| address.rsplit_once(':')).map(|(_, port)| u16::from_str_radix(port, 16));
    let state = fields.nth(1);
    local == Some(Ok(port)) && state.is_some_and(|state| state != "0A")
}

/// Every port that one run holds.
pub struct HeldPorts {
    host: String,
    ip: IpAddr,
    held: BTreeMap<u16, HeldPort>,
}

impl HeldPorts {
    /// Holds ports on `host`, a name or an address.
    pub fn on(host: &str) -> Result<Self, PortError> {
        Ok(Self { host: host.to_owned(), ip: resolve(host)?, held: BTreeMap::new() })
    }

    /// Holds the one port of `proxy.admin_listen`, a `host:port`.
    pub fn for_admin(listen: &str) -> Result<(Self, u16), PortError> {
        let (host, port) = listen.rsplit_once(':').unwrap_or((listen, ""));
        let base = port.parse().map_err(|_| {
            let source = io::Error::new(ErrorKind::InvalidInput, "proxy.admin_listen is HOST:PORT");
            PortError::Host { host: listen.to_owned(), source }
        })?;
        let mut ports = Self::on(host)?;
        let purpose = "admin port of the proxy";
        let port = ports.take(PortWish {
            purpose,
            key: "proxy.admin_listen",
            base,
            count: 1,
            search: false,
            node: 0,
            of: Listener::Front,
        })?;
        Ok((ports, port))
    }

    /// Starts to listen on a held port ourselves.
    pub fn listen(&mut self, port: u16) -> io::Result<TcpListener> {
        let held = self.held.remove(&port);
        held.ok_or_else(|| io::Error::other(format!("port {port} is not held")))?.listen()
    }

    fn try_row(&self, base: u16, count: u16) -> io::Result<Vec<HeldPort>> {
        (0..count)
            .map(|offset| {
                let port = if base == 0 { Some(0) } else { base.checked_add(offset) };
                HeldPort::bind(self.ip, port.ok_or_else(|| io::Error::from(ErrorKind::AddrInUse))?)
            })
            .collect()
    }

    fn keep(&mut self, row: Vec<HeldPort>) -> u16 {
        let first = row.first().map_or(0, |held| held.address.port());
        self.held.extend(row.into_iter().map(|held| (held.address.port(), held)));
        first
    }
}

impl Ports for HeldPorts {
    fn take(&mut self, wish: PortWish<'_>) -> Result<u16, PortError> {
        let mut tried = 0;
        let mut base = wish.base;
        loop {
            tried += 1;
            let error = match self.try_row(base, wish.count) {
                Ok(row) => return Ok(self.keep(row)),
                Err(error) => error,
            };
            if error.kind() != ErrorKind::AddrInUse {
                let (purpose, host) = (wish.purpose.to_owned(), self.host.clone());
                return Err(PortError::Bind { purpose, host, port: base, source: error });
            }
            let next = base.checked_add(1).filter(|_| wish.search && tried < SEARCH_MAX);
            match next {
                Some(next) => base = next,
                None => return Err(self.refusal(wish, tried)),
            }
        }
    }
}

impl HeldPorts {
    fn refusal(&self, wish: PortWish<'_>, tried: u32) -> PortError {
        let (purpose, key, host) = (wish.purpose.to_owned(), wish.key.to_owned(), self.host.clone());
        if wish.search {
            return PortError::NoneFree { purpose, key, host, base: wish.base, count: wish.count, tried };
        }
        let is_taken = |port: &u16| !self.held.contains_key(port) && HeldPort::bind(self.ip, *port).is_err();
        let row = wish.base..wish.base.saturating_add(wish.count);
        let port = row.into_iter().find(is_taken).unwrap_or(wish.base);
        PortError::Taken { purpose, key, host, port }
    }
}

/// The address to listen on of a host, by name or by number.
pub fn resolve(host: &str) -> Result<IpAddr, PortError> {
    let failed = |source| PortError::Host { host: host.to_owned(), source };
    match host.trim_matches(['[', ']']) {
        "" | "*" => Ok(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        "::" => Ok(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        name => {
            let mut found =
                (name, 0).to_socket_addrs().map_err(failed)?.map(|address| address.ip()).collect::<Vec<_>>();
            // `localhost` gives both families; workers are told the name and mostly take the first IPv4 one.
            found.sort_by_key(|ip| !ip.is_ipv4());
            found.first().copied().ok_or_else(|| failed(io::Error::from(ErrorKind::NotFound)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::*;

    const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn wish(base: u16, count: u16, search: bool) -> PortWish<'static> {
        PortWish {
            purpose: "HTTP port of prefill 0",
            key: "pd_disagg.prefill_port",
            base,
            count,
            search,
            node: 0,
            of: Listener::Http,
        }
    }

    /// A port that was free a moment ago, away from the range in which the kernel picks ports for connections.
    fn free_port() -> u16 {
        let seed = u16::try_from(std::process::id() % 10_000).expect("below 10,000");
        let mut ports = HeldPorts::on("127.0.0.1").expect("loopback");
        ports.take(wish(20_000 + seed, 1, true)).expect("some port is free")
    }

    fn listen_as_a_worker(address: SocketAddr) -> io::Result<Socket> {
        let socket = shared(address)?;
        socket.listen(8)?;
        Ok(socket)
    }

    #[test]
    fn a_worker_listens_beside_the_holder_and_nobody_else_gets_in() {
        let held = HeldPort::bind(LOOPBACK, 0).expect("bind");
        let address = held.address();
        assert!(TcpStream::connect(address).is_err(), "a held port refuses connections");
        assert_eq!(exclusive(address).expect_err("held").kind(), ErrorKind::AddrInUse);
        assert_eq!(HeldPort::bind(LOOPBACK, address.port()).err().map(|e| e.kind()), Some(ErrorKind::AddrInUse));

        let worker = listen_as_a_worker(address).expect("the worker binds and listens");
        assert!(TcpStream::connect(address).is_ok());
        assert!(listen_as_a_worker(address).is_err(), "one listener only");
        drop(worker);
        assert!(TcpStream::connect(address).is_err(), "refused again once the worker is gone");
        assert!(listen_as_a_worker(address).is_ok(), "and its successor listens");
    }

    #[test]
    fn a_worker_that_also_shares_its_port_gets_in_too() {
        let held = HeldPort::bind(LOOPBACK, 0).expect("bind");
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).expect("socket");
        // vLLM sets both on its HTTP socket.
        socket.set_reuse_address(true).expect("option");
        socket.set_reuse_port(true).expect("option");
        socket.bind(&held.address().into()).expect("bind beside the holder");
        socket.listen(8).expect("listen");
        assert!(TcpStream::connect(held.address()).is_ok());
    }

    #[test]
    fn lingering_connections_do_not_keep_a_fixed_port_from_us() {
        let held = HeldPort::bind(LOOPBACK, 0).expect("bind");
        let address = held.address();
        let server: TcpListener = listen_as_a_worker(address).expect("listen").into();
        let mut client = TcpStream::connect(address).expect("connect");
        let (mut accepted, _) = server.accept().expect("accept");
        accepted.write_all(b"x").expect("write");
        let mut byte = [0];
        client.read_exact(&mut byte).expect("read");
        // The side that closes first keeps TIME_WAIT: the server's.
        drop(accepted);
        assert_eq!(client.read(&mut byte).expect("end"), 0);
        drop((client, server, held));
        assert!(exclusive(address).is_err(), "an exclusive bind alone would fail here");
        let again = HeldPort::bind(LOOPBACK, address.port()).expect("held in spite of TIME_WAIT");
        assert!(HeldPort::bind(LOOPBACK, address.port()).is_err(), "a second holder is refused all the same");
        drop(again);
    }

    #[test]
    fn a_listener_without_reuse_blocks_a_fixed_port_and_is_skipped_by_a_search() {
        let base = free_port();
        let _other = TcpListener::bind((LOOPBACK, base)).expect("bind");
        let mut ports = HeldPorts::on("localhost").expect("resolve");
        let error = ports.take(wish(base, 1, false)).expect_err("taken").to_string();
        assert!(error.contains(&format!("port {base} (HTTP port of prefill 0) is taken")), "{error}");
        assert!(error.contains("pd_disagg.prefill_port"), "{error}");
        assert!(ports.take(wish(base, 1, true)).expect("searched") > base);
    }

    #[test]
    fn rows_are_consecutive_and_never_given_twice() {
        let base = free_port();
        let mut ports = HeldPorts::on("127.0.0.1").expect("loopback");
        let first = ports.take(wish(base, 3, true)).expect("three");
        let second = ports.take(wish(base, 2, true)).expect("two more");
        assert!(second >= first + 3);
        for port in [first, first + 1, first + 2, second, second + 1] {
            assert!(ports.listen(port).is_ok(), "{port} is held");
        }
    }

    #[test]
    fn connections_are_told_from_listeners_in_the_kernels_table() {
        let line = |state: &str| format!("   3: 0100007F:1F90 00000000:0000 {state} 00000000:00000000 00:00000000");
        let cases =
            [(line("06"), 8080, true), (line("0A"), 8080, false), (line("06"), 8081, false), (String::new(), 0, false)];
        for (text, port, want) in cases {
            assert_eq!(is_connection_of(&text, port), want, "case: {text} {port}");
        }
    }
}
