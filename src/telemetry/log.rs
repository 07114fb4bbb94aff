//! The log of a process: one subscriber, set up once by the command line.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::SystemTime;

pub use crate::config::LogFormat;

/// Starts logging to stderr. `filter` is in the syntax of `tracing-subscriber`'s `EnvFilter` (`info`,
/// `pdlink::kv=debug`). A second call in one process changes nothing and returns false.
pub fn init(format: LogFormat, filter: &str) -> bool {
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let colour = std::io::stderr().is_terminal() && console::colors_enabled_stderr();
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(SystemTime)
        .with_writer(std::io::stderr)
        .with_ansi(colour);
    match format {
        LogFormat::Text => builder.try_init().is_ok(),
        LogFormat::Json => builder.json().flatten_event(true).try_init().is_ok(),
    }
}
