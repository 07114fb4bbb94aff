//! `kv_transfer_params` where there is no runtime: vLLM's scheduler process.

use std::path::PathBuf;

use pdlink::kv::{BlockId, PARAMS_VERSION, PdlinkParams, TransferParams};
use pdlink::security::Secret;
use pyo3::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{errors, request, settings};

/// What a rank tells its scheduler.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RankCard {
    pub(crate) engine_id: String,
    pub(crate) rank: u32,
    pub(crate) tp_size: u32,
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) incarnation: u64,
    pub(crate) geometry_digest: u64,
    pub(crate) weight_version: u64,
}

/// Makes parameters out of the cards of all ranks.
#[pyclass(frozen, module = "pdlink")]
pub(crate) struct ParamsMaker {
    card: RankCard,
    secret: Secret,
}

#[pymethods]
impl ParamsMaker {
    /// `cards` are the JSON texts that the ranks' `Link.card()` gave, in the order of ranks.
    #[new]
    #[pyo3(signature = (cards, secret_file=None))]
    fn new(cards: Vec<String>, secret_file: Option<PathBuf>) -> PyResult<Self> {
        let [card] = &cards[..] else {
            return Err(errors::settings("the ranks' cards", &format!("{} were given, 1 is expected", cards.len())));
        };
        let card = serde_json::from_str(card).map_err(|error| errors::settings("a rank's card", &error))?;
        Ok(Self { card, secret: settings::secret(secret_file.as_ref())? })
    }

    /// The JSON text of the parameters of one transfer; `blocks` has one list for each KV group.
    fn params(&self, transfer_id: &str, request_id: String, blocks: Vec<Vec<u32>>, tokens: u32) -> PyResult<String> {
        let card = &self.card;
        let params = TransferParams {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_engine_id: card.engine_id.clone(),
            remote_request_id: request_id,
            remote_host: card.host.clone(),
            remote_port: card.port,
            remote_block_ids: blocks.into_iter().map(|group| group.into_iter().map(BlockId).collect()).collect(),
            tp_size: card.tp_size,
            remote_num_tokens: tokens,
            pdlink: PdlinkParams {
                version: PARAMS_VERSION,
                transfer_id: request::transfer_id(transfer_id)?,
                incarnation: card.incarnation,
                endpoints: vec![format!("{}:{}", card.host, card.port)],
                geometry_digest: card.geometry_digest,
                weight_version: card.weight_version,
                seal: String::new(),
            },
        };
        Ok(params.sealed(&self.secret).to_json().to_string())
    }
}
