//! The fleet that a scenario starts: what a configuration describes, or one prefill and one decode reference engine.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::cli::{Sources, load_config};
use crate::config::{Config, EngineKind, Override};

/// One worker of each role, on any machine.
const SMALL: [(&str, &str); 4] = [
    ("inference.engine", "reference"),
    ("pd_disagg.enabled", "true"),
    ("pd_disagg.prefill_gpu_ids", "[0]"),
    ("pd_disagg.decode_gpu_ids", "[1]"),
];

/// What to start, and what is known of it.
pub(super) struct Fleet {
    pub(super) arguments: Vec<OsString>,
    pub(super) config: Config,
    /// How long it may take to be ready.
    pub(super) within: Duration,
    /// Its logs, where they are ours to remove.
    logs: Option<PathBuf>,
}

impl Fleet {
    pub(super) fn of(sources: &Sources) -> anyhow::Result<Self> {
        let mut sources = sources.clone();
        if sources.files.is_empty() {
            let small = SMALL.iter().map(|&(key, value)| Override::new(key, value));
            // What the command line says comes after, and wins.
            sources.overrides = small.chain(sources.overrides).collect();
        }
        let mut config = load_config(&sources)?.config;
        let mut logs = None;
        if sources.files.is_empty() && !sources.overrides.iter().any(|given| given.name.ends_with("log_dir")) {
            let folder = std::env::temp_dir().join(format!("pdlink-bench-logs-{}", std::process::id()));
            sources.overrides.push(Override::new("launcher.log_dir", folder.display().to_string()));
            config = load_config(&sources)?.config;
            logs = Some(folder);
        }
        let within = Duration::try_from_secs_f64(config.launcher.ready_timeout_s).unwrap_or(Duration::MAX);
        // Looking at the environment and meeting the peers come on top of what each worker may take.
        let within = within.saturating_add(Duration::from_secs(180));
        Ok(Self { arguments: sources.to_arguments(), config, within, logs })
    }

    pub(super) fn is_reference(&self) -> bool {
        self.config.inference.engine == EngineKind::Reference
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        if let Some(logs) = &self.logs {
            // Nobody needs them once the figures are there; none is as it should be.
            let _ = std::fs::remove_dir_all(logs);
        }
    }
}
