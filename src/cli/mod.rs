//! The command line: one file per subcommand.
//!
//! A subcommand is a file with `pub struct Args` (its own flags, a `clap::Args`) and
//! `pub fn run(args: Args, sources: Sources) -> anyhow::Result<ExitCode>`, a variant of [`Command`], and a line in
//! [`dispatch`]. Configuration files and dotted overrides never reach clap: [`argv`] takes them out first and they come to
//! every subcommand as [`Sources`].
#![forbid(unsafe_code)]

mod argv;
mod bench;
mod config;
mod doctor;
mod engine;
mod guard;
mod listen;
mod proxy;
mod render;
mod report;
mod up;
mod weights;

use std::ffi::OsString;
use std::io::Write as _;
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use argv::Sources;
pub use report::remarks;

use crate::config::{LoadError, LoadRequest, Loaded};

/// Exit code of a command line or a configuration that is wrong.
const EXIT_USAGE: u8 = 2;
/// Exit code of a command that failed while it ran.
const EXIT_FAILED: u8 = 1;

/// The link between prefill and decode: moves KV cache between vLLM processes, and runs the fleet around it.
#[derive(Debug, Parser)]
#[command(name = "pdlink", version = VERSION, propagate_version = true, after_help = SOURCES_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure, against what the machine can do.
    Bench(Box<bench::Args>),
    /// Show, check or describe the configuration.
    #[command(after_help = SOURCES_HELP)]
    Config(config::Args),
    /// Check the machine, the libraries, the configuration and the links before a large run.
    #[command(after_help = SOURCES_HELP, override_usage = "pdlink doctor [OPTIONS] [@ FILE]... [--section.key VALUE]...")]
    Doctor(doctor::Args),
    #[command(name = crate::doctor::probe::SUBCOMMAND, hide = true)]
    DoctorProbe(doctor::ProbeArgs),
    /// Run the reference engine: one worker with no model and no GPU.
    #[command(after_help = SOURCES_HELP, override_usage = "pdlink engine --port PORT [OPTIONS] [@ FILE]... [--section.key VALUE]...")]
    Engine(engine::Args),
    /// Start what a configuration describes: workers and the proxy before them.
    #[command(after_help = SOURCES_HELP, override_usage = "pdlink up [OPTIONS] [@ FILE]... [--section.key VALUE]...")]
    Up(up::Args),
    #[command(hide = true)]
    Guard(guard::Args),
    /// Run the front alone, before workers that something else started.
    #[command(after_help = SOURCES_HELP, override_usage = "pdlink proxy --decode URL... [OPTIONS] [@ FILE]... [--section.key VALUE]...")]
    Proxy(proxy::Args),
    /// Write the configuration as a batch script or as manifests, for a scheduler to run.
    #[command(after_help = SOURCES_HELP, override_usage = "pdlink render slurm|k8s [@ FILE]... [--section.key VALUE]...")]
    Render(render::Args),
    /// New weights for a fleet that serves: send a checkpoint, see who has what.
    #[command(after_help = SOURCES_HELP)]
    Weights(weights::Args),
}

fn dispatch(command: Command, sources: Sources) -> anyhow::Result<ExitCode> {
    match command {
        Command::Bench(args) => bench::run(*args, sources),
        Command::Config(args) => config::run(args, sources),
        Command::Doctor(args) => doctor::run(&args, &sources),
        Command::DoctorProbe(_) => doctor::serve_probe(),
        Command::Engine(args) => engine::run(args, sources),
        Command::Up(args) => up::run(args, sources),
        Command::Guard(args) => guard::run(args, sources),
        Command::Proxy(args) => proxy::run(args, sources),
        Command::Render(args) => render::run(args, sources),
        Command::Weights(args) => weights::run(args, sources),
    }
}

const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("PDLINK_COMMIT"), ")");

const SOURCES_HELP: &str = "\
Configuration, in any place and order:
  @ FILE               a TOML file; several compose from left to right
  --section.key VALUE  an override, also as --section.key=VALUE; a flag alone means true";

/// The command line does not make sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Usage(String);

impl Usage {
    /// `message` says what is wrong and what would be right.
    pub fn new(message: impl Into<String>) -> Self {
        Self(message.into())
    }
}

/// Loads the configuration that the command line names, and tells its warnings and notes on stderr.
pub fn load_config(sources: &Sources) -> anyhow::Result<Loaded> {
    let loaded = load_quietly(sources)?;
    remarks(&loaded.warnings, &loaded.notes);
    Ok(loaded)
}

fn load_quietly(sources: &Sources) -> Result<Loaded, LoadError> {
    crate::config::load(&LoadRequest {
        files: &sources.files,
        overrides: &sources.overrides,
        env: &|name| std::env::var(name).ok(),
    })
}

/// Writes to stdout. A reader that has seen enough (`| head`) is no failure.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Runs one command and says how it ended: 0 done, 1 failed at run time, 2 the configuration or command line is wrong.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    match parse(args).and_then(|parsed| parsed.map_or_else(Ok, |(command, sources)| dispatch(command, sources))) {
        Ok(code) => code,
        Err(error) => {
            report::error(&error);
            let wrong = error.is::<LoadError>() || error.is::<Usage>();
            ExitCode::from(if wrong { EXIT_USAGE } else { EXIT_FAILED })
        }
    }
}

/// The command and its sources, or the exit code where the words were for clap alone (help, version, a wrong flag).
fn parse(args: impl IntoIterator<Item = OsString>) -> anyhow::Result<Result<(Command, Sources), ExitCode>> {
    let (own, sources) = argv::split(args)?;
    let matches = Cli::command().try_get_matches_from(own).and_then(|matches| Cli::from_arg_matches(&matches));
    if let Some(file) = matches.as_ref().err().and_then(file_without_at) {
        return Err(Usage::new(format!(
            "`{file}` is no word of this command; a configuration file has an @ before it: write `@ {file}`"
        ))
        .into());
    }
    Ok(matches.map(|cli| (cli.command, sources)).map_err(|error| {
        // Printing fails only when the terminal is gone; the exit code still tells.
        let _ = error.print();
        ExitCode::from(if error.use_stderr() { EXIT_USAGE } else { 0 })
    }))
}

/// The word that was not expected, if it names a file.
fn file_without_at(error: &clap::Error) -> Option<String> {
    let kind = match error.kind() {
        ErrorKind::UnknownArgument => ContextKind::InvalidArg,
        ErrorKind::InvalidSubcommand => ContextKind::InvalidSubcommand,
        _ => return None,
    };
    let Some(ContextValue::String(word)) = error.get(kind) else { return None };
    let is_file = !word.starts_with('-') && (word.ends_with(".toml") || std::path::Path::new(word).is_file());
    is_file.then(|| word.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn own_flags_files_and_overrides_mix_in_any_order() {
        let orders = [
            "pdlink config show --origins @ a.toml --kv.lease_ms 5",
            "pdlink @a.toml config --kv.lease_ms=5 show --origins",
            "pdlink --kv.lease_ms 5 config show @ a.toml --origins",
        ];
        for order in orders {
            let parsed = parse(order.split(' ').map(OsString::from)).expect("splits");
            let (command, sources) = parsed.unwrap_or_else(|code| panic!("{order}: {code:?}"));
            assert!(format!("{command:?}").contains("origins: true"), "{order}: {command:?}");
            assert_eq!((sources.files.len(), sources.overrides.len()), (1, 1), "{order}");
        }
    }
}
