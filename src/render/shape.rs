//! On how many nodes a run is, and what each of them has.

use crate::config::{Config, EngineKind};

/// One node of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node {
    /// GPUs that must be there: the highest id in use and one. None with the reference engine.
    pub(super) gpus: u32,
}

/// The nodes in order of rank. One, where the configuration names none.
pub(super) fn nodes(config: &Config) -> Vec<Node> {
    let node = |highest: Option<u32>| match config.inference.engine {
        EngineKind::Reference => Node { gpus: 0 },
        EngineKind::Vllm => Node { gpus: highest.map_or(0, |highest| highest + 1) },
    };
    let roles = config.roles();
    if !config.hosts.is_given() {
        return vec![node(roles.iter().flat_map(|role| config.gpu_ids(*role)).max())];
    }
    let highest =
        |one: &crate::config::NodeConfig| roles.iter().flat_map(|role| one.role_gpu_ids(*role).iter().copied()).max();
    config.hosts.nodes.iter().map(|one| node(highest(one))).collect()
}
