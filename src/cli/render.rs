//! `pdlink render`: the configuration as a batch script or as manifests. Prints, and does nothing else.

use std::process::ExitCode;

use super::{Sources, Usage, load_config, print, report};
use crate::config::Config;
use crate::render::{RenderError, manifests, script};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What to write
    #[arg(value_enum)]
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    /// A batch script for Slurm's sbatch
    Slurm,
    /// Manifests for kubectl apply
    K8s,
}

pub(super) fn run(args: Args, sources: Sources) -> anyhow::Result<ExitCode> {
    let config = load_config(&sources)?.config;
    let text = match args.kind {
        Kind::Slurm => script(&config),
        Kind::K8s => manifests(&config),
    };
    let text = text.map_err(|error| match error {
        RenderError::Toml(_) => anyhow::Error::new(error),
        error => Usage::new(error.to_string()).into(),
    })?;
    for note in notes(args.kind, &config) {
        report::note(&note);
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// What whoever uses the text has to know beside it.
fn notes(kind: Kind, config: &Config) -> Vec<String> {
    let mut notes = Vec::new();
    match kind {
        Kind::Slurm if config.proxy.admin_token.is_some() => {
            notes.push("proxy.admin_token is left out; have PDLINK_ADMIN_TOKEN set where you call sbatch".to_owned())
        }
        Kind::K8s if config.kubernetes.secret.is_none() => notes.push(
            "a new secret is in the manifests; for one that stays, make it yourself and name it in kubernetes.secret"
                .to_owned(),
        ),
        _ => {}
    }
    if config.security.secret_file.is_some() {
        notes.push("security.secret_file is left out: the run has a secret of its own".to_owned());
    }
    notes
}
