//! `kv_transfer_params` of a request, as the scheduler meets them.

use pdlink::kv::{KvRequest as Parsed, TransferId};
use pyo3::prelude::*;

use crate::errors;

/// What a request asks of the link: `kind` is `plain`, `prefill` (hold the KV under `transfer_id`), `decode` (load it) or `early`
/// (load it, as prefill computes it).
#[pyclass(frozen, get_all, module = "pdlink")]
pub(crate) struct KvRequest {
    kind: &'static str,
    transfer_id: Option<String>,
    /// Prefill: decode claims the KV while it is computed.
    early: bool,
    /// Decode: tokens whose KV prefill holds, and prefill's own id of the request.
    tokens: Option<u32>,
    remote_request_id: Option<String>,
}

/// Reads the JSON text of `kv_transfer_params`. The seal is checked where the KV is claimed, by `Link.expect`.
#[pyfunction]
pub(crate) fn parse_request(text: &str) -> PyResult<KvRequest> {
    let value = serde_json::from_str(text)
        .map_err(|error| errors::MalformedParamsError::new_err(format!("kv_transfer_params are malformed: {error}")))?;
    let parsed = Parsed::parse(Some(&value)).map_err(|error| errors::params(&error))?;
    let plain = KvRequest { kind: "plain", transfer_id: None, early: false, tokens: None, remote_request_id: None };
    Ok(match parsed {
        Parsed::Plain => plain,
        Parsed::Prefill { transfer_id, early } => {
            KvRequest { kind: "prefill", transfer_id: Some(transfer_id.to_string()), early, ..plain }
        }
        Parsed::Early(params) => {
            KvRequest { kind: "early", transfer_id: Some(params.transfer_id.to_string()), early: true, ..plain }
        }
        Parsed::Decode(params) => KvRequest {
            kind: "decode",
            transfer_id: Some(params.pdlink.transfer_id.to_string()),
            tokens: Some(params.remote_num_tokens),
            remote_request_id: Some(params.remote_request_id.clone()),
            ..plain
        },
    })
}

/// A fresh transfer id, for requests whose router gave none.
#[pyfunction]
pub(crate) fn new_transfer_id() -> String {
    TransferId::random().to_string()
}

/// The id that `text` names.
pub(crate) fn transfer_id(text: &str) -> PyResult<TransferId> {
    text.parse().map_err(|error| errors::MalformedParamsError::new_err(format!("{error}")))
}
