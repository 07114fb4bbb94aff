//! Where a scenario's report goes: the terminal, and files.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;

use crate::bench::environment::Environment;
use crate::bench::html;
use crate::bench::report::{Level, Report};
use crate::cli::print;

#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct Output {
    /// Also write the report to this file, as JSON (`pdlink bench schema`)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Also write it to this file as one page with plots, for a browser or paper
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl Output {
    /// Runs one scenario: says where it runs, what it says while it runs, and what came of it.
    pub(super) fn tell(
        &self,
        run: impl FnOnce(&mut dyn FnMut(&str)) -> anyhow::Result<Level>,
    ) -> anyhow::Result<ExitCode> {
        self.tell_all(|report, tell| {
            let level = run(tell)?;
            tell(&level.to_string());
            report.levels.push(level);
            Ok(())
        })
    }

    /// The same of several. What was measured before an error is written all the same.
    pub(super) fn tell_all(
        &self,
        run: impl FnOnce(&mut Report, &mut dyn FnMut(&str)) -> anyhow::Result<()>,
    ) -> anyhow::Result<ExitCode> {
        let mut report = Report::new(Environment::current());
        print(&format!("{}\n", report.environment))?;
        let mut told = Ok(());
        let ran = run(&mut report, &mut |text| {
            if told.is_ok() {
                told = print(text);
            }
        });
        if ran.is_ok() || !report.levels.is_empty() {
            self.write(&report)?;
        }
        ran?;
        told?;
        Ok(ExitCode::SUCCESS)
    }

    fn write(&self, report: &Report) -> anyhow::Result<()> {
        if let Some(file) = &self.json {
            report.write(file)?;
        }
        if let Some(file) = &self.html {
            write_page(report, file)?;
        }
        Ok(())
    }
}

/// Writes a report as a page.
pub(super) fn write_page(report: &Report, file: &Path) -> anyhow::Result<()> {
    std::fs::write(file, html::page(report)).with_context(|| format!("cannot write {}", file.display()))
}
