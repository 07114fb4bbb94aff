//! `[inference.vllm]`: arguments of `vllm serve` that pdlink passes on unread.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Role;

/// Arguments by name, with underscores: `max_num_seqs = 64` becomes `--max-num-seqs 64`. `true` becomes the bare flag and
/// `false` its `--no-` form; tables and lists become JSON text.
pub type VllmArgs = Map<String, Value>;

/// Any `vllm serve` argument. One given here wins over the setting of ours that writes the same argument.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VllmConfig {
    /// For prefill workers only; wins over the arguments for all.
    pub prefill: VllmArgs,
    /// For decode workers only; wins over the arguments for all.
    pub decode: VllmArgs,
    /// For every worker.
    #[serde(flatten)]
    pub all: VllmArgs,
}

/// Secrets that vLLM also reads from the environment, where other users cannot read them: argument and variable.
pub const SECRET_ARGUMENTS: &[(&str, &str)] = &[("api_key", "VLLM_API_KEY"), ("hf_token", "HF_TOKEN")];

impl VllmConfig {
    /// The arguments of one role: those for all, overridden by the role's own. A plain worker takes those for all.
    pub fn args(&self, role: Role) -> VllmArgs {
        let mut args = self.all.clone();
        let own = match role {
            Role::Prefill => &self.prefill,
            Role::Decode => &self.decode,
            Role::Both => return args,
        };
        args.extend(own.iter().map(|(name, value)| (name.clone(), value.clone())));
        args
    }

    /// One of them, by its name with underscores, however it is written.
    pub fn arg(&self, role: Role, name: &str) -> Option<Value> {
        self.args(role).into_iter().find(|(own, _)| own.replace('-', "_") == name).map(|(_, value)| value)
    }
}
