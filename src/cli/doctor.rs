//! `pdlink doctor`.

use std::process::ExitCode;

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{EXIT_FAILED, Sources, load_quietly, print};
use crate::config::Path;
use crate::doctor::{self, Progress, Setting};

/// Columns where the output is no terminal.
const COLUMNS: usize = 120;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print for machines: one JSON object
    #[arg(long)]
    json: bool,
    /// Turn one run of this path's canary round on its way: the doctor must find it
    #[arg(long, hide = true, value_name = "PATH", value_parser = path_named)]
    corrupt: Option<Path>,
}

fn path_named(name: &str) -> Result<Path, String> {
    let named = Path::BEST_FIRST.into_iter().find(|path| path.name() == name);
    named.ok_or_else(|| format!("paths are {}", Path::list(Path::BEST_FIRST)))
}

/// The process beside the doctor's own, in which it tries things.
#[derive(Debug, clap::Args)]
pub(super) struct ProbeArgs {}

pub(super) fn run(args: &Args, sources: &Sources) -> anyhow::Result<ExitCode> {
    let given = !sources.files.is_empty() || !sources.overrides.is_empty();
    let setting = Setting::new(given.then(|| load_quietly(sources)), false)?.corrupting(args.corrupt);
    let bar = bar();
    let report = doctor::run(setting, &|progress| show(&bar, progress));
    bar.finish_and_clear();
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        let columns = Term::stdout().size_checked().map_or(COLUMNS, |(_, columns)| usize::from(columns));
        print(&report.in_words(columns))?;
    }
    Ok(ExitCode::from(if report.failed() { EXIT_FAILED } else { 0 }))
}

pub(super) fn serve_probe() -> anyhow::Result<ExitCode> {
    doctor::probe::serve().map(|()| ExitCode::SUCCESS)
}

/// On a terminal alone; elsewhere the report says it all.
fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{spinner} {pos}/{len} {wide_msg}");
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()).with_style(style)
}

fn show(bar: &ProgressBar, progress: &Progress<'_>) {
    let number = |count: usize| u64::try_from(count).unwrap_or(u64::MAX);
    bar.set_length(number(progress.of));
    bar.set_position(number(progress.answered));
    bar.set_message(progress.asking.join(", "));
    bar.tick();
}
