//! All workers of a run: one task each, one stream of what happens.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::exit::Exit;
use super::guarded::{GuardSetup, Guards};
use super::life::{Cause, Limits};
use super::logs::WorkerLog;
use super::vllm::diagnosis::Diagnosis;
use super::vllm::progress::Sign;
use super::worker::{Ask, WorkerTask};

/// Happenings that wait to be shown before a worker's task waits for the reader.
const EVENTS_MAX: usize = 256;

/// What the launcher needs to know about one worker.
#[derive(Debug, Clone)]
pub struct WorkerSpec {
    /// Names the log file: `prefill_0`.
    pub name: String,
    /// Where it is asked whether it serves.
    pub host: String,
    pub port: u16,
    pub command: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// Whether its log is vLLM's: then it tells how far the start is, and why it failed.
    pub is_vllm: bool,
}

/// How all workers of a run are treated.
#[derive(Debug, Clone)]
pub struct FleetOptions {
    pub guard: GuardSetup,
    pub guards: Guards,
    pub limits: Limits,
    pub log_dir: PathBuf,
    /// Lines of a worker's log that are told with its death.
    pub tail_lines: usize,
}

/// Something happened to the worker with this index.
#[derive(Debug, Clone)]
pub struct FleetEvent {
    pub worker: usize,
    pub happening: Happening,
}

/// What happens to a worker.
#[derive(Debug, Clone)]
pub enum Happening {
    /// Its process runs.
    Started { pid: u32 },
    /// Its start has come so far.
    Progress(Sign),
    /// It serves; the tokens its KV cache holds where its log said so.
    Ready { took: Duration, kv_tokens: Option<u64> },
    /// It ended by itself and is started again after `pause`.
    Restarts { failure: Failure, pause: Duration },
    /// It ended by itself and the run must end for it.
    GivenUp { failure: Failure },
    /// It ended because it was asked to.
    Ended { exit: Exit },
}

/// How a worker failed, as far as is known.
#[derive(Debug, Clone)]
pub struct Failure {
    pub cause: Cause,
    /// What its log says of why.
    pub diagnosis: Option<Diagnosis>,
    /// The last lines of its log.
    pub tail: Vec<String>,
    pub log: PathBuf,
}

/// Why a fleet could not be started.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot make the log of {worker} in {folder}: {source}; set `launcher.log_dir` to a folder that you may write to"
)]
pub struct LogError {
    worker: String,
    folder: PathBuf,
    source: io::Error,
}

/// The running workers. Dropping it ends them all, in order and unwatched: each guard sees its lifeline end.
pub struct Fleet {
    tasks: JoinSet<()>,
    events: mpsc::Receiver<FleetEvent>,
    stop: CancellationToken,
    halt: CancellationToken,
}

impl Fleet {
    /// Starts every worker.
    pub fn start(workers: Vec<WorkerSpec>, options: FleetOptions) -> Result<Self, LogError> {
        let logs = workers.iter().map(|worker| log_of(worker, &options)).collect::<Result<Vec<_>, _>>()?;
        let (sender, events) = mpsc::channel(EVENTS_MAX);
        let (stop, halt) = (CancellationToken::new(), CancellationToken::new());
        let options = Arc::new(options);
        let mut tasks = JoinSet::new();
        for (index, (worker, log)) in workers.into_iter().zip(logs).enumerate() {
            let asks = (Ask::new(stop.clone()), Ask::new(halt.clone()));
            tasks.spawn(WorkerTask::new(index, worker, options.clone(), log, sender.clone(), asks).run());
        }
        Ok(Self { tasks, events, stop, halt })
    }

    /// The next happening; `None` once every worker is gone for good.
    pub async fn event(&mut self) -> Option<FleetEvent> {
        self.events.recv().await
    }

    /// Asks every worker to end; each is killed after its grace period. Nothing is started any more.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Kills every worker now.
    pub fn halt(&self) {
        self.halt.cancel();
    }

    /// Waits until every worker's task has ended.
    pub async fn ended(mut self) {
        self.events.close();
        while self.tasks.join_next().await.is_some() {}
    }
}

fn log_of(worker: &WorkerSpec, options: &FleetOptions) -> Result<WorkerLog, LogError> {
    WorkerLog::create(&options.log_dir, &worker.name).map_err(|source| LogError {
        worker: worker.name.clone(),
        folder: options.log_dir.clone(),
        source,
    })
}
