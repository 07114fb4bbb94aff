//! The log of a process: one subscriber, set up once by the command line.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

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
        write_utc(out, HAPPENED.get().unwrap_or_else(SystemTime::now))
    }
}

/// Writes a time after 1970 as `2026-11-23T01:02:03.000004Z`.
fn write_utc(out: &mut impl fmt::Write, time: SystemTime) -> fmt::Result {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years are counted from March, so that a leap day is the last of its year; eras of 400 years all have the same days.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, later) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year + later;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    write!(out, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", since.subsec_micros())
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
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_in_utc() {
        for (micros, want) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399_999_999, "2000-02-28T23:59:59.999999Z"),
            (951_782_400_000_000, "2000-02-29T00:00:00.000000Z"),
            (951_868_800_000_001, "2000-03-01T00:00:00.000001Z"),
            (1_735_689_599_500_000, "2024-12-31T23:59:59.500000Z"),
            (1_735_689_600_000_000, "2025-01-01T00:00:00.000000Z"),
            (4_107_542_400_000_000, "2100-03-01T00:00:00.000000Z"),
        ] {
            let mut text = String::new();
            write_utc(&mut text, UNIX_EPOCH + Duration::from_micros(micros)).expect("a string takes all");
            assert_eq!(text, want);
        }
    }

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
