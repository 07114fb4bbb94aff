//! What `up` says while it runs: spinners on a terminal, plain lines elsewhere, one JSON object a line for machines.

use std::time::Duration;

use console::{Term, style};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::launcher::exit::Exit;
use crate::launcher::fleet::{Failure, Happening};
use crate::launcher::life::Cause;
use crate::launcher::vllm::progress::{Sign, grouped};
use crate::topology::Plan;

/// How often a spinner turns.
const TURN: Duration = Duration::from_millis(100);

/// Where and how things are said.
pub(super) struct Stage {
    form: Form,
    workers: Vec<String>,
    /// The last sign of each worker's start that was said.
    signs: Vec<Option<Sign>>,
}

enum Form {
    Json,
    Lines,
    Spinners { all: MultiProgress, each: Vec<ProgressBar> },
}

impl Stage {
    /// For the workers of `plan`, in their order.
    pub(super) fn new(plan: &Plan, json: bool) -> Self {
        let workers: Vec<String> = plan.workers.iter().map(|worker| worker.name()).collect();
        let form = match (json, Term::stdout().is_term()) {
            (true, _) => Form::Json,
            (false, false) => Form::Lines,
            (false, true) => Form::Spinners {
                all: MultiProgress::with_draw_target(ProgressDrawTarget::stdout()),
                each: vec![ProgressBar::hidden(); workers.len()],
            },
        };
        let signs = vec![None; workers.len()];
        Self { form, workers, signs }
    }

    fn name(&self, worker: usize) -> &str {
        self.workers.get(worker).map_or("?", String::as_str)
    }

    /// Shows what happened to a worker. Why one was given up is left to the error that ends the run: [`Self::failure`].
    pub(super) fn happening(&mut self, worker: usize, happening: &Happening) {
        if matches!(self.form, Form::Json) {
            emit(&event_of(self.name(worker), happening));
        }
        match happening {
            Happening::Started { pid } => self.started(worker, *pid),
            Happening::Progress(sign) => self.progress(worker, *sign),
            Happening::Ready { took, kv_tokens } => {
                let kv =
                    kv_tokens.map(|tokens| format!(", KV cache of {} tokens", grouped(tokens))).unwrap_or_default();
                let line = format!("{} {} ready after {}{kv}", style("✓").green(), self.name(worker), seconds(*took));
                self.forget(worker);
                self.say(&line);
            }
            Happening::Ended { .. } | Happening::GivenUp { .. } => self.forget(worker),
            Happening::Restarts { failure, pause } => {
                self.forget(worker);
                let text = self.failure(worker, failure);
                self.warn(&format!("{text}\n  starting it again in {}", seconds(*pause)));
            }
        }
    }

    fn started(&mut self, worker: usize, pid: u32) {
        let text = format!("{} starts (process {pid})", self.name(worker));
        match &mut self.form {
            Form::Spinners { all, each } => {
                let spinner = all.add(ProgressBar::new_spinner().with_style(spinner_style()).with_message(text));
                spinner.enable_steady_tick(TURN);
                each[worker] = spinner;
            }
            Form::Lines => line(&format!("  {text}")),
            Form::Json => {}
        }
    }

    /// One line per worker on a terminal; elsewhere a line for each part of the start, not for each step of it.
    fn progress(&mut self, worker: usize, sign: Sign) {
        let text = format!("{} {sign}", self.name(worker));
        let Some(last) = self.signs.get_mut(worker) else { return };
        let is_new_part = last.is_none_or(|last| !last.is_same_part(sign));
        *last = Some(sign);
        match &self.form {
            Form::Spinners { each, .. } => each[worker].set_message(text),
            Form::Lines if is_new_part => line(&format!("  {text}")),
            Form::Lines | Form::Json => {}
        }
    }

    /// Takes a worker's spinner away.
    fn forget(&mut self, worker: usize) {
        if let Some(sign) = self.signs.get_mut(worker) {
            *sign = None;
        }
        if let Form::Spinners { each, .. } = &self.form {
            each[worker].finish_and_clear();
        }
    }

    /// A line for people, above the spinners; machines get events instead.
    pub(super) fn say(&self, text: &str) {
        match &self.form {
            Form::Json => {}
            Form::Lines => line(text),
            // Not `println`, which pads lines with blanks to the width of the terminal.
            Form::Spinners { all, .. } => all.suspend(|| line(text)),
        }
    }

    /// A line on stderr, in every form.
    pub(super) fn warn(&self, text: &str) {
        match &self.form {
            Form::Spinners { all, .. } => all.suspend(|| warn_on_stderr(text)),
            Form::Json | Form::Lines => warn_on_stderr(text),
        }
    }

    /// An event for machines, a line for people.
    pub(super) fn announce(&self, event: &Value, text: &str) {
        match self.form {
            Form::Json => emit(event),
            Form::Lines | Form::Spinners { .. } => self.say(text),
        }
    }

    /// An event for machines; for people a line, or a warning.
    pub(super) fn tell(&self, event: &Value, text: &str, warns: bool) {
        match (&self.form, warns) {
            (Form::Json, _) => emit(event),
            (_, true) => self.warn(text),
            (_, false) => self.say(text),
        }
    }

    /// Why a worker is gone, what to do, and its last lines.
    pub(super) fn failure(&self, worker: usize, failure: &Failure) -> String {
        let Failure { cause, diagnosis, tail, log } = failure;
        let bar = |c: &str| style(c.to_owned()).for_stderr().dim();
        let mut text = format!("{} {}", self.name(worker), cause_text(cause));
        if let Some(diagnosis) = diagnosis {
            text.push_str(&format!(": {}", diagnosis.cause));
        }
        if let Some(mend) = mend(failure) {
            text.push_str(&format!("\n  {} {mend}", style("→").for_stderr().bold()));
        }
        for said in tail {
            text.push_str(&format!("\n  {} {said}", bar("│")));
        }
        let lines = if tail.is_empty() { "it wrote nothing to" } else { "the end of" };
        text.push_str(&format!("\n  {} {lines} {}", bar("└"), log.display()));
        text
    }
}

/// What to do about a failure: what its log tells, else what its end does.
fn mend(failure: &Failure) -> Option<&'static str> {
    let by_log = failure.diagnosis.as_ref().and_then(|diagnosis| diagnosis.mend);
    by_log.or(match failure.cause {
        Cause::Exited { exit: Exit::Signal(libc::SIGKILL), .. } => Some(
            "if nobody sent it, the host or its container was out of memory: `dmesg`, or the container's memory limit",
        ),
        Cause::Exited { exit: Exit::Signal(libc::SIGBUS), .. } => {
            Some("/dev/shm may be full; in a container give it more shared memory (`--shm-size`)")
        }
        Cause::NotReadyInTime { .. } => Some("raise launcher.ready_timeout_s if it was still at work"),
        Cause::Exited { .. } => None,
    })
}

/// A warning, as loading the configuration tells its own.
pub(super) fn warn_on_stderr(text: &str) {
    let label = style("warning:").for_stderr().yellow().bold();
    let _ = Term::stderr().write_line(&format!("{label} {text}"));
}

/// Said by a node before it has joined.
pub(super) fn looking_for_node_0(json: bool, rank: usize, node0: &str) {
    if json {
        emit(&json!({ "event": "joining", "node": rank, "node0": node0 }));
    } else {
        line(&format!("  this is node {rank}; looking for node 0 at {node0}"));
    }
}

/// Said while the look for vLLM takes its time. Machines are not told: it is no event of the run.
pub(super) fn looking_for_vllm(json: bool) {
    if !json {
        line("  looking at vLLM's environment (its first import can take a while)");
    }
}

fn spinner_style() -> ProgressStyle {
    let style = ProgressStyle::with_template("{spinner:.cyan} {msg} {elapsed:.dim}");
    style.unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn line(text: &str) {
    let _ = Term::stdout().write_line(text);
}

/// One JSON object on a line of its own. A reader that is gone is no failure.
fn emit(event: &Value) {
    line(&event.to_string());
}

/// Why a worker failed, in one line.
pub(super) fn why(failure: &Failure) -> String {
    let cause = cause_text(&failure.cause);
    match &failure.diagnosis {
        Some(diagnosis) => format!("it {cause}: {}", diagnosis.cause),
        None => format!("it {cause}"),
    }
}

/// What became of a worker, behind its name.
fn cause_text(cause: &Cause) -> String {
    match cause {
        Cause::Exited { exit, was_ready: true } => exit.to_string(),
        Cause::Exited { exit, was_ready: false } => format!("{exit} before it was ready"),
        Cause::NotReadyInTime { limit } => {
            format!("did not answer /health within {} (launcher.ready_timeout_s)", seconds(*limit))
        }
    }
}

/// `0.24 s`, `75 s`.
pub(super) fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds < 10.0 { format!("{seconds:.2} s") } else { format!("{seconds:.0} s") }
}

fn millis(time: &Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn event_of(name: &str, happening: &Happening) -> Value {
    match happening {
        Happening::Started { pid } => json!({ "event": "started", "worker": name, "pid": pid }),
        Happening::Progress(sign) => {
            json!({ "event": "progress", "worker": name, "part": sign.name(), "percent": sign.percent() })
        }
        Happening::Ready { took, kv_tokens } => {
            json!({ "event": "worker_ready", "worker": name, "took_ms": millis(took), "kv_cache_tokens": kv_tokens })
        }
        Happening::Ended { exit } => json!({ "event": "ended", "worker": name, "how": exit.to_string() }),
        Happening::GivenUp { failure } => failure_event("given_up", name, failure),
        Happening::Restarts { failure, pause } => {
            let mut event = failure_event("restarts", name, failure);
            event["pause_ms"] = json!(millis(pause));
            event
        }
    }
}

fn failure_event(event: &str, name: &str, failure: &Failure) -> Value {
    json!({
        "event": event,
        "worker": name,
        "cause": cause_text(&failure.cause),
        "diagnosis": failure.diagnosis.as_ref().map(|diagnosis| &diagnosis.cause),
        "mend": mend(failure),
        "last_lines": failure.tail,
        "log": failure.log,
    })
}
