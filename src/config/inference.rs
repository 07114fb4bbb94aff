//! `[inference]`: what each worker runs, whichever its role.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{ReferenceConfig, VllmConfig, WeightBroadcastConfig};

/// What a worker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum EngineKind {
    /// `vllm serve`, from the environment that `pdlink` runs in.
    #[default]
    Vllm,
    /// pdlink's own engine: no model, no GPU, every token depends on every KV byte.
    Reference,
}

impl EngineKind {
    /// The name used in configuration and in the plan.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Reference => "reference",
        }
    }
}

/// How experts exchange tokens between GPUs; vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum All2AllBackend {
    #[default]
    AllgatherReducescatter,
    DeepepHighThroughput,
    DeepepLowLatency,
    DeepepV2,
    FlashinferAll2allv,
    FlashinferNvlinkOneSided,
    FlashinferNvlinkTwoSided,
    Moonep,
    Mori,
    MoriHighThroughput,
    MoriLowLatency,
    Naive,
    NixlEp,
    Passthrough,
    Pplx,
}

impl All2AllBackend {
    /// The value of vLLM's `--all2all-backend`.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllgatherReducescatter => "allgather_reducescatter",
            Self::DeepepHighThroughput => "deepep_high_throughput",
            Self::DeepepLowLatency => "deepep_low_latency",
            Self::DeepepV2 => "deepep_v2",
            Self::FlashinferAll2allv => "flashinfer_all2allv",
            Self::FlashinferNvlinkOneSided => "flashinfer_nvlink_one_sided",
            Self::FlashinferNvlinkTwoSided => "flashinfer_nvlink_two_sided",
            Self::Moonep => "moonep",
            Self::Mori => "mori",
            Self::MoriHighThroughput => "mori_high_throughput",
            Self::MoriLowLatency => "mori_low_latency",
            Self::Naive => "naive",
            Self::NixlEp => "nixl_ep",
            Self::Passthrough => "passthrough",
            Self::Pplx => "pplx",
        }
    }

    /// Whether vLLM (0.24 to 0.33) accepts the name and then runs its default instead.
    pub fn is_replaced_by_vllm(self) -> bool {
        matches!(self, Self::Naive | Self::Pplx)
    }
}

/// What each worker runs. Where `[pd_disagg]` has a key of the same name for one role, that one wins for the role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InferenceConfig {
    /// The engine. Default `vllm`. With `reference`, GPU ids are only worker slots: no GPU is touched.
    pub engine: EngineKind,
    /// Whether adapters may be loaded while serving. Default false; it costs GPU memory for `max_loras` adapters.
    pub enable_lora: bool,
    /// Adapters in GPU memory at once, with `enable_lora`. Default 8. Each costs memory at `max_lora_rank`.
    #[schemars(range(min = 1))]
    pub max_loras: u32,
    /// Adapters kept in host memory, with `enable_lora`. Default 100. Each costs host memory; fewer mean reloads.
    #[schemars(range(min = 1))]
    pub max_cpu_loras: u32,
    /// Largest rank an adapter may have, with `enable_lora`. Default: vLLM's. Memory is reserved for that rank.
    #[schemars(range(min = 1))]
    pub max_lora_rank: Option<u32>,
    /// Whether KV of equal beginnings is reused. Default: vLLM's (on for most models).
    pub enable_prefix_caching: Option<bool>,
    /// Share of each GPU's memory that vLLM takes, above 0 and at most 1. Default 0.9. More leaves less for activations,
    /// graphs and other programs on the GPU.
    #[schemars(extend("exclusiveMinimum" = 0, "maximum" = 1))]
    pub gpu_memory_utilization: f64,
    /// HTTP front processes per worker. Default 1. Each is a Python process; more help where tokenizing is the limit.
    #[schemars(range(min = 1))]
    pub api_server_count: u32,
    /// Seed of the sampler. Default 0.
    pub seed: u64,
    /// Whether mixture-of-experts layers are spread over GPUs by expert. Default false.
    pub enable_expert_parallel: bool,
    /// How experts exchange tokens. Default `allgather_reducescatter`. vLLM replaces `pplx` and `naive` by its default.
    /// A value newer than this list goes through `[inference.vllm] all2all_backend`.
    pub all2all_backend: All2AllBackend,
    /// Whether experts are rebalanced while serving. Default false. Needs `enable_expert_parallel`.
    pub enable_eplb: bool,
    /// Where a plain worker would listen; the workers of a PD run have their ports in `[pd_disagg]`.
    pub server: ServerConfig,
    /// The model, and how it is served.
    pub model: InferenceModelConfig,
    /// GPUs per worker.
    pub parallel: ParallelConfig,
    /// Any further `vllm serve` argument.
    pub vllm: VllmConfig,
    /// The reference engine, with `engine = "reference"`.
    pub reference: ReferenceConfig,
    /// PRIME-RL's copy of `[weight_broadcast]` for its inference server. It must not disagree with the others.
    pub weight_broadcast: Option<WeightBroadcastConfig>,
    /// PRIME-RL's hand-written KV transfer settings, a table or JSON text. Used by plain workers; with
    /// `pd_disagg.enabled` pdlink writes its own.
    pub kv_transfer_config: Option<Value>,
}

impl Default for InferenceConfig {
    fn default() -> Self {
        Self {
            engine: EngineKind::default(),
            enable_lora: false,
            max_loras: 8,
            max_cpu_loras: 100,
            max_lora_rank: None,
            enable_prefix_caching: None,
            gpu_memory_utilization: 0.9,
            api_server_count: 1,
            seed: 0,
            enable_expert_parallel: false,
            all2all_backend: All2AllBackend::default(),
            enable_eplb: false,
            server: ServerConfig::default(),
            model: InferenceModelConfig::default(),
            parallel: ParallelConfig::default(),
            vllm: VllmConfig::default(),
            reference: ReferenceConfig::default(),
            weight_broadcast: None,
            kv_transfer_config: None,
        }
    }
}

/// `[inference.server]`: the address that clients of a run without PD know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ServerConfig {
    /// Host that listeners bind to, and the host of every worker's address. Default `127.0.0.1`. `[pd_disagg] host` wins
    /// with PD on.
    pub host: Option<String>,
    /// Port of the front when `pd_disagg.enabled = false`. Default 8000. With PD on, `pd_disagg.proxy_port` is the front.
    #[schemars(range(min = 1))]
    pub port: u16,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self { host: None, port: 8000 }
    }
}

/// Element type of weights and activations; vLLM's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    #[default]
    Auto,
    Bfloat16,
    Float,
    Float16,
    Float32,
    Half,
}

impl Dtype {
    /// The value of vLLM's `--dtype`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Bfloat16 => "bfloat16",
            Self::Float => "float",
            Self::Float16 => "float16",
            Self::Float32 => "float32",
            Self::Half => "half",
        }
    }
}

/// `[inference.model]`: the model, and how it is served.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InferenceModelConfig {
    /// Name on the Hugging Face hub, or a folder. Default: `[model] name`.
    pub name: Option<String>,
    /// Element type. Default `auto`: the model's own.
    pub dtype: Dtype,
    /// Longest prompt plus answer, in tokens. Default: the model's own. Longer costs KV blocks per request.
    #[schemars(range(min = 1))]
    pub max_model_len: Option<u32>,
    /// Whether CUDA graphs are left out. Default false; true starts faster and decodes slower.
    pub enforce_eager: bool,
    /// Whether Python code that comes with the model may run. Default false: it is code from the hub.
    pub trust_remote_code: bool,
    /// Whether the model may choose tools by itself. Default false.
    pub enable_auto_tool_choice: bool,
    /// Parser of tool calls, with `enable_auto_tool_choice`. Default `hermes`.
    pub tool_call_parser: String,
    /// Parser of reasoning parts. Default none.
    pub reasoning_parser: Option<String>,
    /// Rope scaling, a table or JSON text, as vLLM takes it. Default none: the model's own.
    pub rope_scaling: Option<Value>,
}

impl Default for InferenceModelConfig {
    fn default() -> Self {
        Self {
            name: None,
            dtype: Dtype::default(),
            max_model_len: None,
            enforce_eager: false,
            trust_remote_code: false,
            enable_auto_tool_choice: false,
            tool_call_parser: "hermes".to_owned(),
            reasoning_parser: None,
            rope_scaling: None,
        }
    }
}

/// `[inference.parallel]`: GPUs per worker, and plain workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ParallelConfig {
    /// Tensor-parallel ranks of one worker. Default 1. `[pd_disagg] prefill_tp` and `decode_tp` win for their role.
    #[schemars(range(min = 1, max = 1024))]
    pub tp: u32,
    /// Plain workers when PD is off and no `inference_gpu_ids` are given. Default 1. Every worker itself runs with 1: the
    /// proxy spreads requests, and a worker that fails takes only itself down.
    #[schemars(range(min = 1, max = 1024))]
    pub dp: u32,
}

impl Default for ParallelConfig {
    fn default() -> Self {
        Self { tp: 1, dp: 1 }
    }
}
