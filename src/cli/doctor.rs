//! `pdlink doctor`.

use std::process::ExitCode;

use console::Term;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{EXIT_FAILED, Sources, Usage, load_quietly, print};
use crate::bench::serve::address_of;
use crate::config::{LoadError, Loaded, Path};
use crate::doctor::{self, Group, Progress, Setting, Target};

/// Columns where the output is no terminal.
const COLUMNS: usize = 120;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print for machines: one JSON object
    #[arg(long)]
    json: bool,
    /// Ask the checks of these groups alone
    #[arg(long, value_enum, value_delimiter = ',', value_name = "GROUP")]
    only: Vec<Group>,
    /// Which node of [[hosts.nodes]] this is [default: as `pdlink up` finds it]
    #[arg(long, value_name = "RANK")]
    node: Option<usize>,
    /// The proxy of a deployment that runs, to look at that too
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// Where its admin routes are [default: `proxy.admin_listen`, else where requests go]
    #[arg(long, value_name = "URL", requires = "url")]
    admin_url: Option<String>,
    /// The token that they ask for [default: `proxy.admin_token`]
    #[arg(long, value_name = "TOKEN", env = "PDLINK_ADMIN_TOKEN", hide_env_values = true)]
    admin_token: Option<String>,
    /// The model that requests name [default: the first that it lists]
    #[arg(long, requires = "url")]
    model: Option<String>,
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
    let loaded = given.then(|| load_quietly(sources));
    let target = args.url.as_deref().map(|url| target(url, args, loaded.as_ref())).transpose()?;
    let setting = Setting::new(loaded, args.node, target)?.corrupting(args.corrupt);
    let bar = bar();
    let groups = if args.only.is_empty() { &Group::ALL } else { args.only.as_slice() };
    let report = doctor::run(setting, groups, &|progress| show(&bar, progress));
    bar.finish_and_clear();
    if args.json {
        print(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        let columns = Term::stdout().size_checked().map_or(COLUMNS, |(_, columns)| usize::from(columns));
        print(&report.in_words(columns))?;
    }
    Ok(ExitCode::from(if report.failed() { EXIT_FAILED } else { 0 }))
}

/// Where the deployment is; what is not said comes from its configuration.
fn target(url: &str, args: &Args, loaded: Option<&Result<Loaded, LoadError>>) -> anyhow::Result<Target> {
    let address = |url: &str| address_of(url).map_err(|error| Usage::new(error.to_string()));
    let own = loaded.and_then(|loaded| loaded.as_ref().ok()).map(|loaded| &loaded.config.proxy);
    let admin = args.admin_url.as_deref().or_else(|| own?.admin_listen.as_deref()).unwrap_or(url);
    Ok(Target {
        proxy: address(url)?,
        admin: address(admin)?,
        admin_token: args.admin_token.clone().or_else(|| own?.admin_token.clone()),
        model: args.model.clone(),
    })
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
