//! The two ends of a scenario between hosts: `--listen` on one, `--connect` on the other, the run's secret on both.

use std::path::PathBuf;

use crate::bench::partner::{self, Place};
use crate::cli::{Sources, load_config, print};
use crate::security::{SECRET_FILE_ENV, Secret};

#[derive(Debug, clap::Args)]
pub(super) struct Hosts {
    /// Be the other end for whoever connects here with `--connect`, one after the other, until Ctrl-C
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "connect")]
    listen: Option<String>,
    /// End after so many of them
    #[arg(long, value_name = "N", requires = "listen")]
    callers: Option<usize>,
    /// Measure to the host that listens there
    #[arg(long, value_name = "HOST:PORT")]
    connect: Option<String>,
    /// File with the secret that both hosts know, mode 0600 [default: `security.secret_file`, else $PDLINK_SECRET_FILE; none is
    /// for loopback only]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,
}

impl Hosts {
    /// Where the other end is; `None` once we have been it.
    pub(super) fn place(&self, sources: &Sources) -> anyhow::Result<Option<Place>> {
        match (&self.listen, &self.connect) {
            (Some(address), _) => {
                let mut told = Ok(());
                let secret = self.secret(sources)?;
                partner::listen(address, &secret, self.callers, &mut |text| told = print(text))?;
                told?;
                Ok(None)
            }
            (None, Some(address)) => Ok(Some(Place::There { address: address.clone(), secret: self.secret(sources)? })),
            (None, None) => Ok(Some(Place::Here)),
        }
    }

    fn secret(&self, sources: &Sources) -> anyhow::Result<Secret> {
        let named = match &self.secret_file {
            Some(file) => Some(file.clone()),
            None => load_config(sources)?.config.security.secret_file,
        };
        match named.or_else(|| std::env::var_os(SECRET_FILE_ENV).map(PathBuf::from)) {
            Some(file) => Ok(Secret::read_file(&file)?),
            None => Ok(Secret::loopback()),
        }
    }
}
