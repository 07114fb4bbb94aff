//! Where, when and with what something was measured: the first lines of every report.

use std::collections::BTreeMap;
use std::fs;
use std::time::SystemTime;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::ffi::cuda::survey;

/// Variables that change what is measured, by how their names begin.
const TELLING: [&str; 7] = ["PDLINK_", "UCX_", "NCCL_", "NIXL_", "CUDA_", "VIRTUAL_ENV", "TOKIO_WORKER_THREADS"];

/// The machine and the build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Environment {
    /// As it was given, but for secrets.
    pub command: String,
    /// When it was started, in UTC: `2026-11-23T10:00:00Z`.
    pub at: String,
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
    /// Of the last minute, before anything was measured: what else the machine did.
    pub load_average: f64,
    pub kernel: String,
    /// Name of each, where the driver shows any.
    pub gpus: Vec<String>,
    /// Those that change what is measured.
    pub variables: BTreeMap<String, String>,
    pub version: String,
    pub commit: String,
    /// Unoptimised builds measure nothing worth keeping.
    pub optimised: bool,
}

impl Environment {
    /// This process on this machine.
    pub fn current() -> Self {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let (cpu_info, load) = (read("/proc/cpuinfo"), read("/proc/loadavg"));
        let model = cpu_info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Self {
            command: command(std::env::args().skip(1)),
            at: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            cpu: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: Self::memory_bytes(),
            load_average: load.split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            // No driver, no GPUs.
            gpus: survey().map(|found| found.gpus.into_iter().map(|gpu| gpu.name).collect()).unwrap_or_default(),
            variables: std::env::vars().filter(|(name, _)| is_telling(name)).collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            commit: env!("PDLINK_COMMIT").to_owned(),
            optimised: !cfg!(debug_assertions),
        }
    }

    /// What takes worth from everything that was measured.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.optimised {
            warnings
                .push("An unoptimised build: its figures are worth nothing. Measure with a release build.".to_owned());
        }
        if self.load_average > self.cores as f64 / 2.0 {
            let Self { load_average, cores, .. } = self;
            warnings.push(format!("The machine was busy before this began: load {load_average:.1} on {cores} cores."));
        }
        warnings
    }

    /// This host's memory.
    pub(super) fn memory_bytes() -> u64 {
        let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
        kib.and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
    }
}

fn is_telling(name: &str) -> bool {
    TELLING.iter().any(|start| name.starts_with(start)) && !is_secret(name)
}

/// Whether a flag or a variable of this name holds what a report must not show.
fn is_secret(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    ["token", "secret", "password"].iter().any(|word| name.ends_with(word))
}

/// The command line as one would type it, with dots where a secret stood.
fn command(arguments: impl Iterator<Item = String>) -> String {
    let (mut words, mut hide) = (vec!["pdlink".to_owned()], false);
    for word in arguments {
        let flag = word.strip_prefix("--").map(|flag| flag.split_once('=').unwrap_or((flag, "")).0.to_owned());
        let secret = flag.as_deref().is_some_and(is_secret);
        words.push(match flag {
            Some(flag) if secret && word.contains('=') => format!("--{flag}=…"),
            None if hide => "…".to_owned(),
            _ if word.contains(' ') => format!("'{word}'"),
            _ => word.clone(),
        });
        hide = secret && !word.contains('=');
    }
    words.join(" ")
}

impl std::fmt::Display for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, at, cpu, cores, kernel, version, commit, optimised, .. } = self;
        let build = if *optimised { "" } else { ", UNOPTIMISED BUILD" };
        write!(f, "{command}  # {at}, {cpu}, {cores} cores, load {:.1}", self.load_average)?;
        if !self.gpus.is_empty() {
            write!(f, ", {}", self.gpus.join(" + "))?;
        }
        write!(f, ", Linux {kernel}, pdlink {version} ({commit}{build})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_shows_no_secret() {
        let words = "bench serve --admin-token sesame --proxy.admin_token=sesame --prompt-tokens 20 --text";
        let shown = command(words.split(' ').map(str::to_owned));
        assert_eq!(shown, "pdlink bench serve --admin-token … --proxy.admin_token=… --prompt-tokens 20 --text");
        assert!(is_telling("UCX_TLS") && is_telling("PDLINK_SECRET_FILE"));
        assert!(!is_telling("PDLINK_ADMIN_TOKEN") && !is_telling("HOME"));
    }
}
