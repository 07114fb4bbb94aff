//! The native module of the Python package: `pdlink._native`.
//!
//! Converts between Python's words and the runtime's and decides nothing. A call that may wait for another thread lets go
//! of the interpreter first; all others return at once. Every refusal is an exception class of its own (`errors`).

mod errors;
mod link;
mod log;
mod maker;
mod regions;
mod request;
mod sender;
mod settings;
mod weights;

use pyo3::prelude::*;

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("PARAMS_VERSION", pdlink::kv::PARAMS_VERSION)?;
    module.add("METRICS", link::metric_names(module.py())?)?;
    module.add_class::<link::Figures>()?;
    module.add_class::<link::Link>()?;
    module.add_class::<link::Report>()?;
    module.add_class::<maker::ParamsMaker>()?;
    module.add_class::<request::KvRequest>()?;
    module.add_class::<sender::WeightSender>()?;
    module.add_class::<weights::Order>()?;
    module.add_class::<weights::StagedMemory>()?;
    module.add_class::<weights::WeightReceiver>()?;
    module.add_function(wrap_pyfunction!(request::parse_request, module)?)?;
    module.add_function(wrap_pyfunction!(request::new_transfer_id, module)?)?;
    module.add_function(wrap_pyfunction!(maker::early_params, module)?)?;
    module.add_function(wrap_pyfunction!(log::init_log, module)?)?;
    errors::register(module)
}
