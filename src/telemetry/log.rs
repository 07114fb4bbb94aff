//! The log of a process: one subscriber, set up once by the command line.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::time::SystemTime;

pub use crate::config::LogFormat;

/// A batch is written when it is this long.
const BATCH_BYTES_MAX: usize = 64 * 1024;

static SINK: OnceLock<Sink> = OnceLock::new();

thread_local! {
    static BATCH: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// Starts logging to stderr. `filter` is in the syntax of `tracing-subscriber`'s `EnvFilter` (`info`,
/// `pdlink::kv=debug`). A second call in one process changes nothing and returns false.
pub fn init(format: LogFormat, filter: &str) -> bool {
    let colour = io::stderr().is_terminal() && console::colors_enabled_stderr();
    init_to(format, filter, Sink::Stderr, colour)
}

/// Starts logging to a file, where the terminal shows something else, as in `pdlink up`. Otherwise like [`init`].
pub fn init_to_file(format: LogFormat, filter: &str, file: File) -> bool {
    init_to(format, filter, Sink::File(file), false)
}

/// Writes all lines that `log` logs on this thread together: one system call for many lines instead of one for each.
pub fn batched(log: impl FnOnce()) {
    BATCH.set(Some(Vec::new()));
    log();
    let batch = BATCH.take().unwrap_or_default();
    if let (false, Some(sink)) = (batch.is_empty(), SINK.get()) {
        // Where the log cannot be written there is nowhere to say so.
        let _ = sink.write(&batch);
    }
}

fn init_to(format: LogFormat, filter: &str, sink: Sink, colour: bool) -> bool {
    if SINK.set(sink).is_err() {
        return false;
    }
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_timer(SystemTime).with_writer(Lines).with_ansi(colour);
    match format {
        LogFormat::Text => builder.try_init().is_ok(),
        LogFormat::Json => builder.json().flatten_event(true).try_init().is_ok(),
    }
}

/// Where the log goes.
enum Sink {
    Stderr,
    File(File),
}

impl Sink {
    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Stderr => io::stderr().write_all(bytes),
            Self::File(file) => (&*file).write_all(bytes),
        }
    }
}

/// Takes whole lines: into the thread's batch while it gathers one, else to the sink.
struct Lines;

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self::Writer {
        Self
    }
}

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let Some(sink) = SINK.get() else { return Ok(line.len()) };
        BATCH.with_borrow_mut(|batch| match batch {
            Some(batch) => {
                batch.extend_from_slice(line);
                if batch.len() >= BATCH_BYTES_MAX {
                    sink.write(batch)?;
                    batch.clear();
                }
                Ok(())
            }
            None => sink.write(line),
        })?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
