//! `pdlink up`: one configuration in, a serving fleet out, and everything ended again.

mod front;
mod member;
mod nodes;
mod pairs;
mod run;
mod show;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::config::{Config, EngineKind, Loaded, Origins};
use crate::launcher::machine;
use crate::launcher::nodes::ports::{CountedPorts, Held, NodePorts};
use crate::launcher::nodes::rank::RankError;
use crate::launcher::nodes::site::{self, Site, SiteError};
use crate::launcher::ports::HeldPorts;
use crate::launcher::run_dir::RunDir;
use crate::launcher::vllm::program::{self, VllmError};
use crate::security::Secret;
use crate::topology::host::{self, Host};
use crate::topology::ports::Ports;
use crate::topology::vllm::{P2P_NCCL_LAST, TESTED, VllmProgram};
use crate::topology::{Place, Plan, PlanError, Surroundings, needs_p2p_nccl, plan};

use super::{Sources, Usage, load_config, print};
use run::Run;
use stage::Stage;

/// Threads for the launcher's own tasks. The proxy has its own.
const THREADS: usize = 2;

/// How long tasks that were left behind may hold up the exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Start nothing; print every command, variable, port and GPU list
    #[arg(long)]
    dry_run: bool,
    /// Which node of [[hosts.nodes]] this is [default: the environment's SLURM_NODEID, GROUP_RANK or NODE_RANK, this host's
    /// addresses, or the number at the end of its name]
    #[arg(long, value_name = "RANK")]
    node: Option<usize>,
    /// Print for machines: one JSON object a line, or with --dry-run the plan as one object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: Args, sources: Sources) -> anyhow::Result<ExitCode> {
    let Loaded { config, origins, .. } = load_config(&sources)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let outcome = runtime.block_on(async {
        let place = place(&config, args.node, args.dry_run).await?;
        let has_workers = config.roles().iter().any(|role| !config.gpu_ids_on(place.node, *role).is_empty());
        let vllm = match find_vllm(&config, args.json).await {
            Err(error @ VllmError::NotFound) if args.dry_run => assumed_vllm(&config, Some(&error)),
            // The proxy alone needs none; the plan of the other nodes is only shown.
            Err(VllmError::NotFound) if !has_workers => assumed_vllm(&config, None),
            found => found?,
        };
        let here = Here { vllm, host: machine::look(config.model_name()).await, origins, place };
        match (args.dry_run, here.place.node) {
            (true, _) => dry_run(&config, &here, args.json),
            (false, 0) => up(&config, &here, args.json).await,
            (false, _) => member::run(&config, &here, args.json).await,
        }
    });
    runtime.shutdown_timeout(EXIT_TIMEOUT);
    outcome.map(|()| ExitCode::SUCCESS)
}

/// This host's place in the run. A dry run may be on any: what it cannot tell, it leaves out and says.
async fn place(config: &Config, flag: Option<usize>, is_dry: bool) -> anyhow::Result<Place> {
    let Site { place, no_network } = match site::look(config, flag).await {
        Ok(site) => site,
        Err(SiteError::Rank(RankError::Unknown { .. })) if is_dry => {
            stage::warn_on_stderr(
                "this host is none of [[hosts.nodes]]: what a node finds out for itself is not shown",
            );
            Site::any()
        }
        Err(error @ SiteError::Interfaces(_)) => return Err(error.into()),
        Err(error) => return Err(Usage::new(error.to_string()).into()),
    };
    match no_network {
        Some(error) if is_dry => stage::warn_on_stderr(&error.to_string()),
        Some(error) => return Err(anyhow::anyhow!("node {}: {error}", place.node)),
        None => {}
    }
    Ok(place)
}

/// What a run finds where it starts.
struct Here {
    /// The `vllm` that workers run; none with another engine.
    vllm: Option<VllmProgram>,
    host: Host,
    /// Where each setting was given.
    origins: Origins,
    /// Which node it is.
    place: Place,
}

/// How long the look for vLLM goes on before it is said that it does.
const LOOK_SILENTLY: Duration = Duration::from_secs(2);

async fn find_vllm(config: &Config, json: bool) -> Result<Option<VllmProgram>, VllmError> {
    if config.inference.engine != EngineKind::Vllm {
        return Ok(None);
    }
    let (pdlink, path) = (std::env::current_exe().unwrap_or_default(), std::env::var_os("PATH"));
    let envs: Vec<_> = config.roles().iter().filter_map(|role| config.pd_disagg.env(*role)).collect();
    let finding = program::find(config.launcher.vllm_program.as_deref(), &pdlink, path.as_deref(), &envs);
    tokio::pin!(finding);
    let found = tokio::select! {
        found = &mut finding => found,
        () = tokio::time::sleep(LOOK_SILENTLY) => {
            stage::looking_for_vllm(json);
            finding.await
        }
    };
    found.map(Some)
}

/// What a dry run shows on a machine without vLLM: commands for the newest version known that has the connector.
fn assumed_vllm(config: &Config, error: Option<&VllmError>) -> Option<VllmProgram> {
    let version = if needs_p2p_nccl(config) { P2P_NCCL_LAST } else { TESTED.1 };
    if let Some(error) = error {
        stage::warn_on_stderr(&format!("{error}; the commands shown are for vLLM {version}"));
    }
    VllmProgram::new(vec!["vllm".to_owned()], &format!("{version}.0"))
}

/// Every port that the run holds.
struct Sockets {
    /// The proxy's, and on one host the workers'.
    run: HeldPorts,
    /// Those of a node's workers.
    _workers: Vec<HeldPorts>,
    /// The one for admin calls, if they come elsewhere.
    admin: Option<(HeldPorts, u16)>,
}

/// Makes the plan and holds its ports; says on stderr what should be changed.
fn planned(config: &Config, here: &Here, secret_file: &str) -> anyhow::Result<(Plan, Sockets)> {
    let admin = config.proxy.admin_listen.as_deref().map(HeldPorts::for_admin).transpose()?;
    if !config.hosts.is_given() {
        let mut run = HeldPorts::on(config.host())?;
        let plan = planned_with(config, here, secret_file, &mut run)?;
        return Ok((plan, Sockets { run, _workers: Vec::new(), admin }));
    }
    let mut ports = node_ports(config, here, Vec::new())?;
    let plan = planned_with(config, here, secret_file, &mut ports)?;
    let Held { front, workers } = ports.held();
    Ok((plan, Sockets { run: front, _workers: workers.into(), admin }))
}

/// Holds this node's ports; `before` are those it had, by purpose.
fn node_ports(config: &Config, here: &Here, before: Vec<(String, u16)>) -> anyhow::Result<NodePorts> {
    let node = here.place.node;
    let (host, kv_host) = here.place.own_hosts(config);
    let front = if node == 0 { config.host() } else { host };
    Ok(NodePorts::on(node, front, host, kv_host, before)?)
}

fn planned_with(config: &Config, here: &Here, secret_file: &str, ports: &mut dyn Ports) -> anyhow::Result<Plan> {
    let pdlink = std::env::current_exe()?.to_string_lossy().into_owned();
    let around = Surroundings {
        pdlink: &pdlink,
        vllm: here.vllm.as_ref(),
        cores: &here.host.cores,
        secret_file,
        place: &here.place,
    };
    let plan = plan(config, &around, ports).map_err(|error| no_plan(error, &here.origins))?;
    let doubts = host::doubts(config, &plan.share(here.place.node), &here.host, here.vllm.as_ref());
    for warning in plan.warnings.iter().chain(&doubts) {
        stage::warn_on_stderr(warning);
    }
    Ok(plan)
}

/// Refuses a share that this host cannot run.
fn refuse_faults(config: &Config, here: &Here, share: &Plan) -> anyhow::Result<()> {
    if share.workers.is_empty() {
        return Ok(());
    }
    let faults = host::faults(config, share, &here.host, here.vllm.as_ref());
    if !faults.is_empty() {
        anyhow::bail!(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"));
    }
    Ok(())
}

/// The error, with the place of the setting that it is about.
fn no_plan(error: PlanError, origins: &Origins) -> anyhow::Error {
    let given = error.keys().into_iter().find_map(|key| origins.get(key));
    match (given, error.is_configuration()) {
        (Some(origin), true) => Usage::new(format!("{origin}: {error}")).into(),
        (None, true) => Usage::new(error.to_string()).into(),
        (Some(origin), false) => anyhow::anyhow!("{origin}: {error}"),
        (None, false) => error.into(),
    }
}

fn dry_run(config: &Config, here: &Here, json: bool) -> anyhow::Result<()> {
    let secret_file = match &config.security.secret_file {
        Some(path) => path.to_string_lossy().into_owned(),
        None => std::env::temp_dir().join("pdlink-RUN/secret").to_string_lossy().into_owned(),
    };
    let plan = if config.hosts.is_given() {
        planned_with(config, here, &secret_file, &mut CountedPorts::default())?
    } else {
        planned(config, here, &secret_file)?.0
    };
    if config.hosts.has_several() && config.security.secret_file.is_none() {
        stage::warn_on_stderr(NO_SECRET);
    }
    // The plan may be for another host than the one it is looked at.
    for fault in host::faults(config, &plan.share(here.place.node), &here.host, here.vllm.as_ref()) {
        stage::warn_on_stderr(&fault.to_string());
    }
    let text = if json {
        format!("{:#}\n", plan.to_json())
    } else {
        format!("{}\n\n{}{}", show::table(&plan), show::commands(&plan), notes(&plan))
    };
    Ok(print(&text)?)
}

fn notes(plan: &Plan) -> String {
    plan.notes.iter().map(|note| format!("\n{} {note}\n", console::style("note:").cyan())).collect()
}

const NO_SECRET: &str = "several nodes need one secret, and none is given: write the same 64 hexadecimal digits into a file of mode \
    0600 on every node (`openssl rand -hex 32`), and name it in `security.secret_file` or PDLINK_SECRET_FILE";

/// The secret of this run, and the file that workers read it from.
struct RunSecret {
    secret: Secret,
    file: PathBuf,
    /// Made for this run, and removed with it; none with a secret that was given.
    folder: Option<RunDir>,
}

impl RunSecret {
    fn new(config: &Config) -> anyhow::Result<Self> {
        if let Some(file) = &config.security.secret_file {
            return Ok(Self { secret: Secret::read_file(file)?, file: std::path::absolute(file)?, folder: None });
        }
        if config.hosts.has_several() {
            return Err(Usage::new(NO_SECRET).into());
        }
        let folder = RunDir::create(&std::env::temp_dir())?;
        Ok(Self { secret: folder.secret().clone(), file: folder.secret_file(), folder: Some(folder) })
    }
}

async fn up(config: &Config, here: &Here, json: bool) -> anyhow::Result<()> {
    let secret = RunSecret::new(config)?;
    let (plan, sockets) = planned(config, here, &secret.file.to_string_lossy())?;
    let share = plan.share(here.place.node);
    refuse_faults(config, here, &share)?;
    let stage = Stage::new(&share, json);
    stage.announce(
        &serde_json::json!({ "event": "plan", "plan": plan.to_json() }),
        &format!("{}{}", show::table(&plan), notes(&plan)),
    );
    Run::start(config, plan, sockets, &secret, stage).await?.live_and_end().await
}
