//! pdlink's connector in the workers' own Python: imported as vLLM imports it, and taken for a connector by vLLM.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::super::check::Answer;
use super::super::setting::Setting;
use super::why_none;
use crate::config::{Config, ConnectorImpl, EngineKind, Role};

/// Importing vLLM imports PyTorch: some seconds, from a cold disk more.
const IMPORT_MAX: Duration = Duration::from_secs(22);
pub(super) const WITHIN: Duration = Duration::from_secs(25);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// What is shown of what Python said.
const SAID_CHARS: usize = 400;

/// Loads the class by vLLM's own factory, makes sure that it is one that vLLM can make, and makes one as a scheduler does, with the
/// settings of the plan and a cache of one layer. A worker's would start a runtime.
const QUESTION: &str = r#"
import json, sys
sys.path[:] = [entry for entry in sys.path if entry]
settings = json.loads(sys.argv[1])
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
transfer = KVTransferConfig(**settings)
found = KVConnectorFactory.get_connector_class(transfer)
lacks = sorted(getattr(found, "__abstractmethods__", ()))
if lacks:
    raise TypeError(f"{found.__name__} lacks {', '.join(lacks)}, which this vLLM wants")
import torch
from types import SimpleNamespace
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.kv_cache_interface import FullAttentionSpec
spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.bfloat16)
vllm = SimpleNamespace(
    kv_transfer_config=transfer,
    parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=int(sys.argv[2]), data_parallel_index=0),
    model_config=SimpleNamespace(model=sys.argv[3], revision=None, dtype=torch.bfloat16),
)
cache = SimpleNamespace(num_blocks=1, kv_cache_groups=[SimpleNamespace(layer_names=["layer"], kv_cache_spec=spec)])
found(vllm, KVConnectorRole.SCHEDULER, cache)
print("pdlink-connector", found.__module__ + "." + found.__name__)
"#;
const MARK: &str = "pdlink-connector ";

pub(super) fn check(setting: &Setting) -> Answer {
    let Some(config) = setting.config() else { return Answer::skipped(why_none(setting)) };
    let pd = &config.pd_disagg;
    if config.inference.engine != EngineKind::Vllm || !pd.enabled || pd.connector_impl != ConnectorImpl::Native {
        return Answer::skipped("no worker runs pdlink's connector inside vLLM");
    }
    let python = setting.vllm.as_ref().and_then(|vllm| vllm.as_ref().ok()?.python.clone());
    let Some(python) = python else { return Answer::skipped("no Python of vLLM's can be asked; see vllm") };
    let Some(settings) = transfer_settings(setting) else { return Answer::skipped("there is no plan; see plan") };
    match ask(Path::new(&python), config, &settings) {
        Ok(class) => Answer::ok(format!("vLLM finds {class} by {python}, and makes one with the settings of the plan")),
        Err(Silent) => Answer::warn(
            format!("{python} did not import vLLM within {} s", IMPORT_MAX.as_secs()),
            "run it once by hand (`python -c 'import pdlink.vllm'`), and `pdlink doctor` again once the disk is warm",
        ),
        Err(Refused(said)) => Answer::fail(
            format!("vLLM cannot use pdlink's connector: {said}"),
            format!(
                "install the wheel beside vLLM again: `{python} -m pip install --force-reinstall --no-deps pdlink-*.whl`"
            ),
        ),
    }
}

/// `--kv-transfer-config` of a prefill worker.
fn transfer_settings(setting: &Setting) -> Option<String> {
    let plan = setting.plan.as_ref()?.as_ref().ok()?;
    let command = &plan.of_role(Role::Prefill).next()?.command;
    let at = command.iter().position(|word| word == "--kv-transfer-config")?;
    command.get(at + 1).cloned()
}

enum Fault {
    Silent,
    Refused(String),
}
use Fault::{Refused, Silent};

fn ask(python: &Path, config: &Config, settings: &str) -> Result<String, Fault> {
    let refused = |error: std::io::Error| Refused(error.to_string());
    let tp = config.tp(Role::Prefill).to_string();
    let mut child = Command::new(python)
        .args(["-c", QUESTION, settings, &tp, config.model_name()])
        .envs(config.pd_disagg.env(Role::Prefill).into_iter().flatten())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(refused)?;
    let (stdout, stderr) = (reader(child.stdout.take()), reader(child.stderr.take()));
    let until = Instant::now() + IMPORT_MAX;
    while child.try_wait().map_err(refused)?.is_none() {
        if Instant::now() >= until {
            let _ = child.kill();
            let _ = child.wait();
            return Err(Silent);
        }
        std::thread::sleep(LOOK_EVERY);
    }
    let (stdout, stderr) = (stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default());
    if let Some(class) = stdout.lines().find_map(|line| line.strip_prefix(MARK)) {
        return Ok(class.to_owned());
    }
    let last = stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
    Err(Refused(last.chars().take(SAID_CHARS).collect()))
}

/// Reads on its own thread, so that neither pipe fills.
fn reader(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut said = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut said);
        }
        String::from_utf8_lossy(&said).into_owned()
    })
}
