//! Where and with what something was measured: the first line of every report.

use std::fs;

use serde::Serialize;

/// The machine and the build.
#[derive(Debug, Clone, Serialize)]
pub struct Environment {
    pub command: String,
    pub cpu: String,
    pub cores: usize,
    pub kernel: String,
    pub version: &'static str,
    pub commit: &'static str,
    /// Unoptimised builds measure nothing worth keeping.
    pub optimised: bool,
}

impl Environment {
    /// This process on this machine.
    pub fn current() -> Self {
        let cpu_info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu_info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let own = std::env::args().skip(1).map(|word| if word.contains(' ') { format!("'{word}'") } else { word });
        Self {
            command: std::iter::once("pdlink".to_owned()).chain(own).collect::<Vec<_>>().join(" "),
            cpu: model.map_or("unknown", |(_, name)| name.trim()).to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            kernel: release.trim().to_owned(),
            version: env!("CARGO_PKG_VERSION"),
            commit: env!("PDLINK_COMMIT"),
            optimised: !cfg!(debug_assertions),
        }
    }
}

impl std::fmt::Display for Environment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, cpu, cores, kernel, version, commit, optimised } = self;
        let build = if *optimised { "" } else { ", UNOPTIMISED BUILD" };
        write!(f, "{command}  # {cpu}, {cores} cores, Linux {kernel}, pdlink {version} ({commit}{build})")
    }
}
