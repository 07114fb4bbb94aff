//! What a plan asks of a host's ports. `launcher::ports` answers by holding real ones.

/// A wish for one port, or for several in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortWish<'a> {
    /// What the port is for, as in errors: `HTTP port of prefill 0`.
    pub purpose: &'a str,
    /// The setting that names it: `pd_disagg.prefill_port`.
    pub key: &'a str,
    /// The first port to try; 0 lets the system choose.
    pub base: u16,
    /// How many consecutive ports are taken, at least 1.
    pub count: u16,
    /// Whether later ports may be taken when `base` is not free (`auto_ports`).
    pub search: bool,
    /// The node whose port it is, and which of its addresses.
    pub node: usize,
    pub of: Listener,
}

/// What listens on a port. On several hosts each may have an address of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    /// The proxy.
    Front,
    /// A worker's HTTP server.
    Http,
    /// A worker's KV runtime.
    Kv,
}

/// Why a wish could not be met.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    #[error(
        "port {port} ({purpose}) is taken on {host}; end what uses it, or set `{key}` to a free port{}",
        if key.starts_with("proxy.") { "" } else { ", or `pd_disagg.auto_ports = true`" }
    )]
    Taken { purpose: String, key: String, host: String, port: u16 },
    #[error(
        "no {count} free port(s) in a row from {base} on {host} for {purpose} ({tried} tried); set `{key}` elsewhere"
    )]
    NoneFree { purpose: String, key: String, host: String, base: u16, count: u16, tried: u32 },
    #[error("cannot bind port {port} ({purpose}) on {host}: {source}; check that {host} is an address of this host")]
    Bind { purpose: String, host: String, port: u16, source: std::io::Error },
    #[error("cannot resolve host `{host}` to an address: {source}")]
    Host { host: String, source: std::io::Error },
}

/// Where ports come from.
pub trait Ports {
    /// Takes what is wished for and returns the first port of the row. A port once given is not given again.
    fn take(&mut self, wish: PortWish<'_>) -> Result<u16, PortError>;
}
