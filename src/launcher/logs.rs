//! One log file per worker, and the last lines of it for the terminal.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes read from the end of a log for its last lines.
const TAIL_BYTES_MAX: u64 = 64 * 1024;

/// Characters of one line that are shown.
const LINE_CHARS_MAX: usize = 400;

/// A worker's log file: emptied when the run starts, appended to when the worker is restarted.
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
        read_end(&self.path, position).map_or_else(|_| Vec::new(), |text| last_lines(&text, count))
    }
}

fn read_end(path: &Path, position: u64) -> io::Result<String> {
    let mut file = File::open(path)?;
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(position.max(end.saturating_sub(TAIL_BYTES_MAX)).min(end)))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
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
