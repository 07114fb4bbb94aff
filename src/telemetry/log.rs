//! The log of a process: one subscriber, set up once by the command line.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::SystemTime;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

pub use crate::config::LogFormat;

/// A batch is written when it is this long.
const BATCH_BYTES_MAX: usize = 64 * 1024;

static SINK: OnceLock<Sink> = OnceLock::new();

thread_local! {
    static BATCH: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
    /// When that happened which is being logged, if not now.
    static HAPPENED: Cell<Option<SystemTime>> = const { Cell::new(None) };
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

/// Logs with the time at which it happened, where that is told later.
pub fn of_time(happened: SystemTime, log: impl FnOnce()) {
    HAPPENED.set(Some(happened));
    log();
    HAPPENED.set(None);
}

fn init_to(format: LogFormat, filter: &str, sink: Sink, colour: bool) -> bool {
    if SINK.set(sink).is_err() {
        return false;
    }
    let filter = EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder =
        tracing_subscriber::fmt().with_env_filter(filter).with_timer(Clock).with_writer(Lines).with_ansi(colour);
    match format {
        LogFormat::Text => builder.try_init().is_ok(),
        LogFormat::Json => builder.json().flatten_event(true).try_init().is_ok(),
    }
}

/// The time at the beginning of a line.
struct Clock;

impl FormatTime for Clock {
    fn format_time(&self, out: &mut Writer<'_>) -> fmt::Result {
        write!(out, "{}", humantime::format_rfc3339_micros(HAPPENED.get().unwrap_or_else(SystemTime::now)))
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

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;

    #[test]
    fn a_line_that_is_told_later_has_its_own_time() {
        let happened = UNIX_EPOCH + Duration::from_secs(86_400);
        let time = || {
            let mut text = String::new();
            Clock.format_time(&mut Writer::new(&mut text)).expect("a string takes all");
            text
        };
        of_time(happened, || assert_eq!(time(), "1970-01-02T00:00:00.000000Z"));
        assert!(time().as_str() > "2026", "and the next one has the time of now");
    }
}
