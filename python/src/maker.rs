//! `kv_transfer_params` where there is no runtime: vLLM's scheduler process.

use std::path::PathBuf;

use pdlink::kv::{BlockId, EarlyParams, ParamsMaker as Maker, RankCard};
use pyo3::prelude::*;

use crate::{errors, request, settings};

/// Makes parameters out of the cards of all ranks.
#[pyclass(frozen, module = "pdlink")]
pub(crate) struct ParamsMaker(Maker);

#[pymethods]
impl ParamsMaker {
    /// `cards` are the JSON texts that the ranks' `Link.card()` gave.
    #[new]
    #[pyo3(signature = (cards, secret_file=None))]
    fn new(cards: Vec<String>, secret_file: Option<PathBuf>) -> PyResult<Self> {
        let read = |text: &String| serde_json::from_str::<RankCard>(text);
        let cards = cards.iter().map(read).collect::<Result<_, _>>();
        let cards = cards.map_err(|error| errors::settings("a rank's card", &error))?;
        let maker = Maker::new(cards, settings::secret(secret_file.as_ref())?);
        maker.map(Self).map_err(|error| errors::params(&error))
    }

    /// The JSON text of the parameters of one transfer; `blocks` has one list for each KV group.
    fn params(&self, transfer_id: &str, request_id: String, blocks: Vec<Vec<u32>>, tokens: u32) -> PyResult<String> {
        let transfer_id = request::transfer_id(transfer_id)?;
        let params = self.0.params(transfer_id, request_id, block_ids(blocks), tokens);
        Ok(params.to_json().to_string())
    }
}

/// The JSON text of parameters for decode's leg of a request that prefill is yet to compute; `endpoints` are those of prefill's
/// ranks, in order. For routers: `pdlink proxy` makes the same.
#[pyfunction]
#[pyo3(signature = (transfer_id, endpoints, secret_file=None))]
pub(crate) fn early_params(
    transfer_id: &str,
    endpoints: Vec<String>,
    secret_file: Option<PathBuf>,
) -> PyResult<String> {
    let transfer_id = request::transfer_id(transfer_id)?;
    let secret = settings::secret(secret_file.as_ref())?;
    Ok(EarlyParams::sealed(transfer_id, endpoints, &secret).to_json().to_string())
}

/// Block ids in the runtime's words.
pub(crate) fn block_ids(blocks: Vec<Vec<u32>>) -> Vec<Vec<BlockId>> {
    blocks.into_iter().map(|group| group.into_iter().map(BlockId).collect()).collect()
}
