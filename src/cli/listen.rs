//! Listeners of programs that the launcher may have started.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};

use anyhow::Context;
use socket2::{Domain, Protocol, Socket, Type};

/// Connections that may wait to be accepted. Enough for a fleet of clients that come back at once; the kernel caps it.
const BACKLOG: i32 = 4096;

/// Listens beside whoever holds the port for us: a holder has bound it without listening, and both set the option.
pub(super) fn listen(host: &str, port: u16) -> anyhow::Result<TcpListener> {
    let addresses = (host, port).to_socket_addrs().with_context(|| format!("cannot resolve the host `{host}`"))?;
    let mut last = anyhow::anyhow!("the host `{host}` has no address");
    for address in addresses {
        match bind(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = anyhow::Error::new(error).context(format!("cannot listen on {address}")),
        }
    }
    Err(last)
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}
