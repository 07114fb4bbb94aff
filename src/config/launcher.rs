//! `[launcher]`: how `up` starts, watches and ends the workers.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What happens when a worker ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Restart {
    /// It is started again with back-off, while the others serve.
    #[default]
    OnFailure,
    /// The run ends with the worker's last log lines.
    Never,
}

/// How `up` starts, watches and ends the workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LauncherConfig {
    /// What happens when a worker ends by itself after it was ready. Default `on-failure`. A worker that never became
    /// ready ends the run either way: a wrong setting does not heal by trying again.
    pub restart: Restart,
    /// Pause before the first restart of a worker, in seconds; doubled after each further failure. Default 1.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub restart_backoff_s: f64,
    /// Longest pause before a restart, in seconds. Default 30. Longer saves work on a broken host and costs serving time
    /// after it has healed.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub restart_backoff_max_s: f64,
    /// How long a worker may take from its start until it answers `/health`, in seconds. Default 1800: large models load from
    /// slow disks and capture graphs. A hung start is noticed that late.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub ready_timeout_s: f64,
    /// How long requests in flight may finish after Ctrl-C or SIGTERM, in seconds. Default 30. Longer keeps the run up that
    /// long behind one slow request.
    #[schemars(range(min = 0))]
    pub drain_s: f64,
    /// How long a worker may take to end after SIGTERM before it is killed, in seconds. Default 10.
    #[schemars(range(min = 0))]
    pub grace_s: f64,
    /// Folder for one log file per worker, made if it is not there. Default `logs`. While another launcher runs that has it,
    /// a folder in it, named by the process, is used instead.
    pub log_dir: PathBuf,
    /// The `vllm` program that workers run, with `engine = "vllm"`, or the Python that has it. Default: the one beside `pdlink`
    /// itself, which is where pdlink's wheel puts it, else the first on the `PATH`.
    pub vllm_program: Option<PathBuf>,
}

impl Default for LauncherConfig {
    fn default() -> Self {
        Self {
            restart: Restart::default(),
            restart_backoff_s: 1.0,
            restart_backoff_max_s: 30.0,
            ready_timeout_s: 1800.0,
            drain_s: 30.0,
            grace_s: 10.0,
            log_dir: PathBuf::from("logs"),
            vllm_program: None,
        }
    }
}
