//! One log file per worker and one of the proxy, and the last lines of it for the terminal.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes read from the end of a log for its last lines.
const TAIL_BYTES_MAX: u64 = 64 * 1024;

/// Bytes read from the end of a log to find what went wrong: every rank of a worker writes tracebacks of its own.
const CAUSE_BYTES_MAX: u64 = 1024 * 1024;

/// Bytes of a log that are followed at a time. A worker that writes faster is followed from its end.
const FOLLOW_BYTES_MAX: u64 = 256 * 1024;

/// Characters of one line that are shown.
const LINE_CHARS_MAX: usize = 400;

/// A log file: emptied when the run starts, appended to when the worker is restarted.
#[derive(Debug, Clone)]
pub struct WorkerLog {
    path: PathBuf,
}

impl WorkerLog {
    /// Makes the folder and an empty `NAME.log` in it.
    pub fn create(folder: &Path, name: &str) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let path = folder.join(format!("{name}.log"));
        File::create(&path)?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens the file for one start of the worker. The position marks where that start's lines begin.
    pub fn open(&self, attempt: u32) -> io::Result<(File, u64)> {
        let mut file = OpenOptions::new().create(true).append(true).open(&self.path)?;
        if attempt > 1 {
            writeln!(file, "---- start {attempt} ----")?;
        }
        let position = file.seek(SeekFrom::End(0))?;
        Ok((file, position))
    }

    /// The last `count` lines written since `position`, oldest first.
    pub fn tail(&self, position: u64, count: usize) -> Vec<String> {
        read_end(&self.path, position, TAIL_BYTES_MAX).map_or_else(|_| Vec::new(), |text| last_lines(&text, count))
    }

    /// What was written since `position`, as far back as a cause is looked for.
    pub fn end(&self, position: u64) -> String {
        let text = read_end(&self.path, position, CAUSE_BYTES_MAX).unwrap_or_default();
        console::strip_ansi_codes(&text).into_owned()
    }

    /// Follows what is written from `position` on.
    pub fn follow(&self, position: u64) -> Follower {
        Follower { path: self.path.clone(), position, rest: String::new() }
    }
}

/// Reads a log while it grows.
#[derive(Debug)]
pub struct Follower {
    path: PathBuf,
    position: u64,
    /// A line that has not ended yet.
    rest: String,
}

impl Follower {
    /// The lines that have come since the last call. A progress bar writes its states over each other: each is a line.
    pub fn lines(&mut self) -> Vec<String> {
        let Ok((bytes, position)) = read_from(&self.path, self.position, FOLLOW_BYTES_MAX) else { return Vec::new() };
        self.position = position;
        self.rest.push_str(&String::from_utf8_lossy(&bytes));
        let Some(end) = self.rest.rfind(['\n', '\r']) else {
            // A line without end is none: it must not grow for ever.
            if self.rest.len() > LINE_CHARS_MAX * 64 {
                self.rest.clear();
            }
            return Vec::new();
        };
        let rest = self.rest.split_off(end + 1);
        let whole = std::mem::replace(&mut self.rest, rest);
        let lines = whole.split(['\n', '\r']).filter(|line| !line.trim().is_empty());
        lines.map(|line| console::strip_ansi_codes(line).into_owned()).collect()
    }
}

fn read_end(path: &Path, position: u64, bytes_max: u64) -> io::Result<String> {
    let (bytes, _) = read_from(path, position, bytes_max)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// What stands behind `position`, of which at most the last `bytes_max`; and where that ends.
fn read_from(path: &Path, position: u64, bytes_max: u64) -> io::Result<(Vec<u8>, u64)> {
    let mut file = File::open(path)?;
    let end = file.seek(SeekFrom::End(0))?;
    let start = position.max(end.saturating_sub(bytes_max)).min(end);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(end - start).read_to_end(&mut bytes)?;
    let read = u64::try_from(bytes.len()).unwrap_or(0);
    Ok((bytes, start + read))
}

/// Lines without terminal control codes: a worker's colours must not repaint the terminal of the launcher.
fn last_lines(text: &str, count: usize) -> Vec<String> {
    let printable = |line: &str| {
        let plain = console::strip_ansi_codes(line);
        plain.chars().filter(|c| !c.is_control() || *c == '\t').take(LINE_CHARS_MAX).collect::<String>()
    };
    let mut lines: Vec<String> = text.lines().map(printable).filter(|line| !line.trim().is_empty()).collect();
    lines.split_off(lines.len().saturating_sub(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_of_this_start_only_and_plain() {
        let folder = tempfile::tempdir().expect("folder");
        let log = WorkerLog::create(&folder.path().join("deep/logs"), "prefill_0").expect("create");
        let (mut file, first) = log.open(1).expect("open");
        writeln!(file, "one\n\n\x1b[31mtwo\x1b[0m\nthree").expect("write");
        assert_eq!(log.tail(first, 2), ["two", "three"]);
        let (mut file, second) = log.open(2).expect("open");
        assert!(log.tail(second, 5).is_empty());
        writeln!(file, "four").expect("write");
        assert_eq!(log.tail(second, 5), ["four"]);
        assert_eq!(log.tail(0, 2), ["---- start 2 ----", "four"]);
    }

    #[test]
    fn a_log_is_followed_line_by_line_bars_included() {
        let folder = tempfile::tempdir().expect("folder");
        let log = WorkerLog::create(folder.path(), "prefill_0").expect("create");
        let (mut file, start) = log.open(1).expect("open");
        let mut follower = log.follow(start);
        assert!(follower.lines().is_empty());
        write!(file, "one\nhalf").expect("write");
        assert_eq!(follower.lines(), ["one"]);
        write!(file, " a line\r\x1b[32mbar 10%\x1b[0m\rbar 20%").expect("write");
        assert_eq!(follower.lines(), ["half a line", "bar 10%"]);
        writeln!(file).expect("write");
        assert_eq!(follower.lines(), ["bar 20%"]);
        assert!(follower.lines().is_empty());
    }

    #[test]
    fn a_long_log_is_read_from_its_end() {
        let folder = tempfile::tempdir().expect("folder");
        let log = WorkerLog::create(folder.path(), "decode_0").expect("create");
        let (mut file, start) = log.open(1).expect("open");
        for number in 0..20_000 {
            writeln!(file, "line {number}").expect("write");
        }
        assert_eq!(log.tail(start, 1), ["line 19999"]);
    }
}
