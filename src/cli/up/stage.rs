//! What `up` says while it runs: spinners on a terminal, plain lines elsewhere, one JSON object a line for machines.

use std::path::Path;
use std::time::Duration;

use console::{Term, style};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use crate::launcher::fleet::Happening;
use crate::launcher::life::Cause;
use crate::topology::Plan;

/// How often a spinner turns.
const TURN: Duration = Duration::from_millis(100);

/// Where and how things are said.
pub(super) struct Stage {
    form: Form,
    workers: Vec<String>,
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
        Self { form, workers }
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
            Happening::Ready { took } => {
                let line = format!("{} {} ready after {}", style("✓").green(), self.name(worker), seconds(*took));
                self.forget(worker);
                self.say(&line);
            }
            Happening::Ended { .. } | Happening::GivenUp { .. } => self.forget(worker),
            Happening::Restarts { cause, pause, tail, log } => {
                self.forget(worker);
                let text = self.failure(worker, cause, tail, log);
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

    /// Takes a worker's spinner away.
    fn forget(&mut self, worker: usize) {
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

    /// Why a worker is gone, with its last lines.
    pub(super) fn failure(&self, worker: usize, cause: &Cause, tail: &[String], log: &Path) -> String {
        let bar = |c: &str| style(c.to_owned()).for_stderr().dim();
        let mut text = format!("{} {}", self.name(worker), cause_text(cause));
        for said in tail {
            text.push_str(&format!("\n  {} {said}", bar("│")));
        }
        let lines = if tail.is_empty() { "it wrote nothing to" } else { "the end of" };
        text.push_str(&format!("\n  {} {lines} {}", bar("└"), log.display()));
        text
    }
}

/// A warning, as loading the configuration tells its own.
pub(super) fn warn_on_stderr(text: &str) {
    let label = style("warning:").for_stderr().yellow().bold();
    let _ = Term::stderr().write_line(&format!("{label} {text}"));
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
    let failure = |event: &str, cause: &Cause, tail: &[String], log: &Path| json!({ "event": event, "worker": name, "cause": cause_text(cause), "last_lines": tail, "log": log });
    match happening {
        Happening::Started { pid } => json!({ "event": "started", "worker": name, "pid": pid }),
        Happening::Ready { took } => json!({ "event": "worker_ready", "worker": name, "took_ms": millis(took) }),
        Happening::Ended { exit } => json!({ "event": "ended", "worker": name, "how": exit.to_string() }),
        Happening::GivenUp { cause, tail, log } => failure("given_up", cause, tail, log),
        Happening::Restarts { cause, pause, tail, log } => {
            let mut event = failure("restarts", cause, tail, log);
            event["pause_ms"] = json!(millis(pause));
            event
        }
    }
}
