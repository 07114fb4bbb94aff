//! NCCL: the `nccl` path, and what vLLM's ranks of one worker talk over.

use std::path::PathBuf;

use super::super::check::Answer;
use super::super::probe::{self, NcclFound, Order};
use super::super::setting::Setting;
use super::{Libraries, OPEN, active_environments};
use crate::config::{Config, ConnectorImpl, EngineKind, KvConnector, Path};

/// Names the library for vLLM, which then looks nowhere else.
const LIBRARY_VARIABLE: &str = "VLLM_NCCL_SO_PATH";

pub(super) fn check(libraries: &Libraries) -> Answer {
    let setting = &libraries.setting;
    let needed = setting.allows(Path::Nccl) || (!setting.on_cpu() && setting.config().is_some_and(is_needed));
    match (look(setting), named(setting)) {
        (Ok(NcclFound { library, version }), _) => Answer::ok(format!("NCCL {version}, {}", library.display()))
            .with("version", version)
            .with("library", library.display().to_string()),
        (Err(error), Some((key, _))) => Answer::fail(
            format!("{key} names no NCCL that can be used: {error:#}"),
            "mend that setting, or take it away",
        ),
        (Err(error), None) => {
            let mend = "install it beside vLLM (`pip install nvidia-nccl-cu13`), or name it in kv.nccl.library";
            Answer::absent(needed, format!("libnccl.so.2 cannot be used: {error:#}"), mend)
        }
    }
}

/// NCCL as workers would open it.
pub(in crate::doctor) fn look(setting: &Setting) -> anyhow::Result<NcclFound> {
    let given = setting.config().and_then(|config| config.kv.nccl.environment.clone());
    let environments = given.map_or_else(|| active_environments(setting), |environment| vec![environment]);
    probe::ask(&Order::Nccl { library: named(setting).map(|(_, library)| library), environments }, &[], OPEN)
}

/// A library that was named, and where.
fn named(setting: &Setting) -> Option<(&'static str, PathBuf)> {
    let own = setting.config().and_then(|config| config.kv.nccl.library.clone());
    let of_vllm = || std::env::var_os(LIBRARY_VARIABLE).map(|library| (LIBRARY_VARIABLE, PathBuf::from(library)));
    own.map(|library| ("kv.nccl.library", library)).or_else(of_vllm)
}

/// Whether ranks talk over it: those of one worker, or with the class that vLLM once shipped all.
fn is_needed(config: &Config) -> bool {
    let wide = config.roles().iter().any(|role| config.tp(*role) > 1);
    let pd = &config.pd_disagg;
    let p2p =
        pd.enabled && pd.connector_impl == ConnectorImpl::Vllm && pd.kv_connector == KvConnector::P2pNcclConnector;
    config.inference.engine == EngineKind::Vllm && (wide || p2p)
}
