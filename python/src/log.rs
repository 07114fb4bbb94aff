//! The runtime's log lines.
//!
//! They go to stderr, in the runtime's own format: vLLM keeps what its processes write there in one log with its own lines.
//! Handing them to Python's logging instead would make the runtime's thread wait for the interpreter, which a forward pass
//! can hold for seconds.

use pdlink::telemetry;
use pyo3::prelude::*;

/// Starts the log. `filter` is in the syntax of `tracing-subscriber`'s `EnvFilter`; false if it runs already.
#[pyfunction]
pub(crate) fn init_log(filter: &str, json: bool) -> bool {
    let format = if json { telemetry::log::LogFormat::Json } else { telemetry::log::LogFormat::Text };
    telemetry::log::init(format, filter)
}
