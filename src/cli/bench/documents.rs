//! `pdlink bench compare`, `render` and `schema`: what is done with reports that are written already.

use std::path::PathBuf;
use std::process::ExitCode;

use super::output::write_page;
use crate::bench::compare::{Verdict, compare};
use crate::bench::report::Report;
use crate::cli::{Usage, print};

#[derive(Debug, clap::Args)]
pub(super) struct CompareArgs {
    /// The report of before
    #[arg(value_name = "BEFORE.json")]
    before: PathBuf,
    /// The report of after
    #[arg(value_name = "AFTER.json")]
    after: PathBuf,
    /// Another report of what BEFORE measured; several may be given. What they differ by is noise
    #[arg(long, value_name = "FILE")]
    again: Vec<PathBuf>,
    /// Changes of a median up to this are noise, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0)]
    tolerance: f64,
    /// Also fail where a figure of BEFORE is missing from AFTER
    #[arg(long)]
    all_figures: bool,
    /// Print for machines: one JSON object with every figure
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct RenderArgs {
    /// A report that `--json` wrote
    #[arg(value_name = "REPORT.json")]
    report: PathBuf,
    /// The page to write
    #[arg(long, value_name = "FILE")]
    html: PathBuf,
}

/// Writes a report that there is already as a page.
pub(super) fn run_render(args: &RenderArgs) -> anyhow::Result<ExitCode> {
    let report = Report::read(&args.report).map_err(|error| Usage::new(format!("{error:#}")))?;
    write_page(&report, &args.html)?;
    Ok(ExitCode::SUCCESS)
}

/// 0 where nothing got slower, 1 where something did.
pub(super) fn run_compare(args: &CompareArgs) -> anyhow::Result<ExitCode> {
    if !(0.0..100.0).contains(&args.tolerance) {
        return Err(Usage::new("--tolerance is a percentage from 0 to below 100").into());
    }
    let read = |file: &PathBuf| Report::read(file).map_err(|error| Usage::new(format!("{error:#}")));
    let (before, after) = (read(&args.before)?, read(&args.after)?);
    let again = args.again.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let comparison = compare(&before, &again, &after, args.tolerance / 100.0);
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&comparison)?))?;
    } else {
        print(&comparison.to_string())?;
    }
    if comparison.lines.is_empty() {
        return Err(Usage::new("the two reports have no figure in common: measure both by the same command").into());
    }
    let lost = args.all_figures && !comparison.gone.is_empty();
    Ok(if comparison.count(Verdict::Slower) > 0 || lost { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Prints the form of reports.
pub(super) fn run_schema() -> anyhow::Result<ExitCode> {
    print(&format!("{}\n", serde_json::to_string_pretty(&Report::schema())?))?;
    Ok(ExitCode::SUCCESS)
}
