//! The log of a process: one subscriber, set up once by the command line.

use std::fs::File;
use std::io::IsTerminal;
use std::sync::Arc;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::SystemTime;

pub use crate::config::LogFormat;

/// Starts logging to stderr. `filter` is in the syntax of `tracing-subscriber`'s `EnvFilter` (`info`,
/// `pdlink::kv=debug`). A second call in one process changes nothing and returns false.
pub fn init(format: LogFormat, filter: &str) -> bool {
    let colour = std::io::stderr().is_terminal() && console::colors_enabled_stderr();
    init_to(format, filter, std::io::stderr, colour)
}

/// Starts logging to a file, where the terminal shows something else, as in `pdlink up`. Otherwise like [`init`].
pub fn init_to_file(format: LogFormat, filter: &str, file: File) -> bool {
    init_to(format, filter, Arc::new(file), false)
}

fn init_to<W>(format: LogFormat, filter: &str, writer: W, colour: bool) -> bool
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_timer(SystemTime).with_writer(writer).with_ansi(colour);
    match format {
        LogFormat::Text => builder.try_init().is_ok(),
        LogFormat::Json => builder.json().flatten_event(true).try_init().is_ok(),
    }
}
