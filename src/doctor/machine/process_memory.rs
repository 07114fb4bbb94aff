//! Whether one worker's process may read another's memory: what the `shm` path does with an engine's own tensors, and UCX by
//! its `cma` transport. Tried for real between two processes of ours that are neither's parent, as workers are.

use super::super::check::Answer;
use super::super::probe::{self, Order};
use super::super::setting::Setting;
use crate::config::{EngineKind, Path};

pub(super) fn check(setting: &Setting) -> Answer {
    let tensors = setting.config().is_some_and(|config| config.inference.engine == EngineKind::Vllm);
    let needed = tensors && setting.allows(Path::Shm);
    let limits = Limits::read();
    let answer = match tried() {
        Ok(()) => Answer::ok(format!("a process reads another's memory (process_vm_readv); {}", limits.in_words())),
        Err(error) => Answer::fault(
            needed,
            format!("a process may not read another's memory: {error:#}; {}", limits.in_words()),
            limits.mend(),
        ),
    };
    answer
        .with("yama_ptrace_scope", limits.yama)
        .with("seccomp", limits.seccomp)
        .with("own_user_namespace", limits.own_user_namespace)
}

fn tried() -> anyhow::Result<()> {
    let holder = probe::Held::start()?;
    probe::ask::<()>(&Order::ReadMemory { pid: holder.pid, address: holder.address }, &[], probe::SHORT)?;
    Ok(())
}

/// What may stand in the way.
#[derive(Debug, Clone, Copy)]
struct Limits {
    yama: Option<u8>,
    /// 0 none, 1 strict, 2 filtered.
    seccomp: Option<u8>,
    own_user_namespace: bool,
}

impl Limits {
    fn read() -> Self {
        let text = |file: &str| std::fs::read_to_string(file).unwrap_or_default();
        let status = text("/proc/self/status");
        let seccomp = status.lines().find_map(|line| line.strip_prefix("Seccomp:"));
        // The first user namespace maps all ids to themselves.
        let map: Vec<u64> =
            text("/proc/self/uid_map").split_whitespace().filter_map(|word| word.parse().ok()).collect();
        Self {
            yama: text("/proc/sys/kernel/yama/ptrace_scope").trim().parse().ok(),
            seccomp: seccomp.and_then(|value| value.trim().parse().ok()),
            own_user_namespace: !map.is_empty() && map != [0, 0, u64::from(u32::MAX)],
        }
    }

    fn in_words(self) -> String {
        let yama = self.yama.map_or_else(|| "no Yama".to_owned(), |scope| format!("Yama's ptrace_scope is {scope}"));
        let seccomp = match self.seccomp {
            Some(0) => "no seccomp filter",
            Some(_) => "a seccomp filter",
            None => "seccomp unknown",
        };
        let namespace = if self.own_user_namespace { ", a user namespace of its own" } else { "" };
        format!("{yama}, {seccomp}{namespace}")
    }

    fn mend(self) -> String {
        let mut ways = Vec::new();
        if self.yama.is_some_and(|scope| scope > 0) {
            ways.push("`sysctl kernel.yama.ptrace_scope=0` on the host");
        }
        if self.seccomp != Some(0) {
            ways.push("--cap-add SYS_PTRACE (docker), or a seccomp profile that allows process_vm_readv");
        }
        if self.own_user_namespace {
            ways.push("run all workers in one user namespace");
        }
        ways.push("leave shm out of kv.paths, and cma out of UCX_TLS");
        ways.join("; or ")
    }
}
