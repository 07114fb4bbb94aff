//! The settings of one link, as the package's own code writes them: one JSON text.

use std::net::TcpListener;
use std::path::PathBuf;

use pdlink::config::{KvConfig, KvSendType, Role};
use pdlink::kv::{Geometry, LayerPlacement};
use pdlink::security::Secret;
use pyo3::PyResult;
use serde::Deserialize;

use crate::errors;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LinkSettings {
    pub(crate) kv: KvConfig,
    pub(crate) engine_id: String,
    pub(crate) role: Role,
    pub(crate) send_type: KvSendType,
    pub(crate) geometry: Geometry,
    pub(crate) rank: u32,
    /// `host:port` of the worker's other ranks.
    pub(crate) siblings: Vec<String>,
    pub(crate) layers: Vec<LayerPlacement>,
    pub(crate) num_blocks: u32,
    pub(crate) bind_host: String,
    pub(crate) advertise_host: String,
    /// 0 takes a free one, which the card then names.
    pub(crate) port: u16,
    /// None: the well-known secret, for loopback only.
    pub(crate) secret_file: Option<PathBuf>,
    pub(crate) weight_version: u64,
}

impl LinkSettings {
    pub(crate) fn parse(text: &str) -> PyResult<Self> {
        serde_json::from_str(text).map_err(|error| errors::settings("the link's settings", &error))
    }

    /// Listens beside whoever holds the port for this process: both set SO_REUSEADDR, as the standard library does.
    pub(crate) fn listen(&self) -> PyResult<TcpListener> {
        let (host, port) = (self.bind_host.as_str(), self.port);
        TcpListener::bind((host, port)).map_err(|error| {
            errors::AddressError::new_err(format!(
                "cannot listen for KV peers on {host}:{port}: {error}; set `kv_host` and `kv_ports` in \
                 kv_connector_extra_config to an address of this host and a free port for each rank"
            ))
        })
    }
}

/// The run's secret.
pub(crate) fn secret(file: Option<&PathBuf>) -> PyResult<Secret> {
    file.map_or_else(|| Ok(Secret::loopback()), |path| Secret::read_file(path).map_err(|error| errors::secret(&error)))
}
