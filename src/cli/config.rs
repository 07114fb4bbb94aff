//! `pdlink config`: what the files and overrides amount to.

use std::process::ExitCode;

use clap::Subcommand;

use crate::config;

use super::{Sources, load_config, print};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print the effective configuration as TOML, defaults too; secrets are hidden.
    #[command(override_usage = "pdlink config show [OPTIONS] [@ FILE]... [--section.key VALUE]...")]
    Show {
        /// Say behind each value where it came from: file and line, command line, environment or default.
        #[arg(long)]
        origins: bool,
    },
    /// Say whether the configuration can be used, or everything that is wrong with it (exit code 2).
    #[command(override_usage = "pdlink config check [@ FILE]... [--section.key VALUE]...")]
    Check,
    /// Print the JSON Schema of the configuration, for editors.
    Schema {
        /// Print a manual page of all settings instead.
        #[arg(long)]
        markdown: bool,
    },
}

pub(super) fn run(args: Args, sources: Sources) -> anyhow::Result<ExitCode> {
    let text = match args.action {
        Action::Show { origins } => {
            let loaded = load_config(&sources)?;
            config::to_toml(&loaded.config, origins.then_some(&loaded.origins))
        }
        Action::Check => {
            load_config(&sources)?;
            "ok\n".to_owned()
        }
        Action::Schema { markdown: true } => config::markdown(),
        Action::Schema { markdown: false } => format!("{:#}\n", config::schema()),
    };
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}
