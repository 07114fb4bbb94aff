//! Who descends from a process, by the parent field of `/proc/PID/stat`.
//!
//! Process groups and sessions do not do: a worker's child may leave both. With `PR_SET_CHILD_SUBREAPER` a descendant whose
//! parent ended becomes our child, so walking parents finds all of them.

use std::collections::BTreeMap;

use rustix::process::{Pid, Signal, kill_process};

/// All living descendants of `root`, parents before children. Zombies are left out: they only wait to be reaped.
pub(super) fn descendants(root: Pid) -> Vec<Pid> {
    let children = children_by_parent();
    let mut found = Vec::new();
    let mut next = vec![root.as_raw_pid()];
    while let Some(parent) = next.pop() {
        for &(pid, alive) in children.get(&parent).into_iter().flatten() {
            next.push(pid);
            if alive {
                found.extend(Pid::from_raw(pid));
            }
        }
    }
    found
}

/// The direct children of `parent`, ended ones that wait to be reaped included.
pub(super) fn children(parent: Pid) -> Vec<Pid> {
    let children = children_by_parent();
    let own = children.get(&parent.as_raw_pid()).into_iter().flatten();
    own.filter_map(|(pid, _)| Pid::from_raw(*pid)).collect()
}

/// Signals each process; one that ended meanwhile is no error.
pub(super) fn signal_all(pids: &[Pid], signal: Signal) {
    for pid in pids {
        let _ = kill_process(*pid, signal);
    }
}

fn children_by_parent() -> BTreeMap<i32, Vec<(i32, bool)>> {
    let mut children = BTreeMap::<i32, Vec<(i32, bool)>>::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        if let Some((parent, alive)) = parent_and_life(&stat) {
            children.entry(parent).or_default().push((pid, alive));
        }
    }
    children
}

/// `PID (NAME) STATE PPID …`; the name may hold spaces and brackets, so fields are counted from its last bracket.
fn parent_and_life(stat: &str) -> Option<(i32, bool)> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    Some((parent, !matches!(state, "Z" | "X")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parent_is_found_behind_any_process_name() {
        let cases = [
            ("12 (vllm) S 7 12 12 0", Some((7, true))),
            ("12 (a ) S 9 (b) R 7 12", Some((7, true))),
            ("12 (gone) Z 7 12", Some((7, false))),
            ("12 broken", None),
        ];
        for (stat, want) in cases {
            assert_eq!(parent_and_life(stat), want, "case: {stat}");
        }
    }

    #[test]
    fn a_child_is_a_descendant_until_it_ends() {
        let mut child = std::process::Command::new("sleep").arg("30").spawn().expect("sleep");
        let pid = Pid::from_child(&child);
        assert!(descendants(rustix::process::getpid()).contains(&pid));
        signal_all(&[pid], Signal::KILL);
        child.wait().expect("wait");
        assert!(!descendants(rustix::process::getpid()).contains(&pid));
    }
}
