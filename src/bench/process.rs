//! Processes that a scenario started: found under a parent, measured, ended by pid.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// A process as `/proc` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub command: Vec<String>,
}

fn proc_file(pid: i32, name: &str) -> Option<Vec<u8>> {
    std::fs::read(PathBuf::from(format!("/proc/{pid}/{name}"))).ok()
}

/// The fields of `/proc/PID/stat` after the command, which may hold spaces: `[0]` is the state, `[1]` the parent.
fn stat_fields(pid: i32) -> Option<Vec<String>> {
    let text = String::from_utf8_lossy(&proc_file(pid, "stat")?).into_owned();
    let after_command = &text[text.rfind(')')? + 1..];
    Some(after_command.split_whitespace().map(str::to_owned).collect())
}

/// All living descendants of `root`.
pub fn descendants(root: i32) -> Vec<Process> {
    let mut children: BTreeMap<i32, Vec<i32>> = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Some(fields) = stat_fields(pid) else { continue };
        if let (true, Some(Ok(parent))) = (fields[0] != "Z", fields.get(1).map(|parent| parent.parse())) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let (mut found, mut open) = (Vec::new(), vec![root]);
    while let Some(pid) = open.pop() {
        for &child in children.get(&pid).map_or(&[][..], Vec::as_slice) {
            let command = proc_file(child, "cmdline").unwrap_or_default();
            let command =
                command.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
            found.push(Process { pid: child, command });
            open.push(child);
        }
    }
    found
}

/// Resident memory in bytes; `None` once the process is gone.
pub fn resident_bytes(pid: i32) -> Option<u64> {
    status_bytes(pid, "VmRSS:")
}

/// The same without files and memory files: what the process took for itself. KV lies in memory files, whose pages come in one
/// by one as blocks are used for the first time, in the worker that owns them and in its peers.
pub fn anonymous_bytes(pid: i32) -> Option<u64> {
    status_bytes(pid, "RssAnon:")
}

fn status_bytes(pid: i32, name: &str) -> Option<u64> {
    let text = String::from_utf8(proc_file(pid, "status")?).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Processor time used so far by all threads, user and system: by those that live in nanoseconds where the system counts them,
/// else in its clock's ticks.
pub fn cpu_time(pid: i32) -> Option<Duration> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let counted = threads.map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse().ok().map(Duration::from_nanos)
    });
    let nanos: Option<Duration> = counted.sum();
    nanos.filter(|spent| !spent.is_zero()).or_else(|| cpu_ticks(pid))
}

fn cpu_ticks(pid: i32) -> Option<Duration> {
    let fields = stat_fields(pid)?;
    let ticks: u64 = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second()).ok()?)
}

/// The same of a process and all its living descendants.
pub fn tree_cpu_time(root: i32) -> Duration {
    let pids = std::iter::once(root).chain(descendants(root).into_iter().map(|process| process.pid));
    pids.filter_map(cpu_time).sum()
}

/// Sends a signal to one process of ours. False if it is gone already.
pub fn signal(pid: i32, signal: rustix::process::Signal) -> bool {
    rustix::process::Pid::from_raw(pid).is_some_and(|pid| rustix::process::kill_process(pid, signal).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_found_measured_and_ended() {
        let own = i32::try_from(std::process::id()).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        // Between fork and exec the child still shows our own command line.
        let found = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(5));
            descendants(own).iter().any(|process| process.pid == pid && process.command[0] == "sleep")
        });
        assert!(found);
        assert!(resident_bytes(pid).unwrap() >= anonymous_bytes(pid).unwrap() && cpu_time(pid).is_some());
        assert!(anonymous_bytes(pid).unwrap() > 0);
        assert!(signal(pid, rustix::process::Signal::KILL));
        child.wait().unwrap();
        assert!(resident_bytes(pid).is_none());
    }
}
