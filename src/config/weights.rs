//! `[weights]`: how new weights are taken over by workers that serve.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Path;

/// Where new weights lie until every worker has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Staging {
    /// In host memory, whole. The old weights serve until all workers have the new ones (WT-1).
    #[default]
    Host,
    /// In the GPU's own memory, whole, while an update is under way; once it serves, they are brought to host memory and kept
    /// there. As safe as `host`, and loaded several times as fast; vLLM must have left room for them on the GPU.
    Device,
    /// Nowhere: bytes go on as they come. Gives WT-1 up: an update that fails half-way leaves neither version.
    None,
}

impl Staging {
    /// As in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Device => "device",
            Self::None => "none",
        }
    }

    /// Whether the old weights serve on whatever fails before all have the new ones (WT-1).
    pub fn keeps_the_old(self) -> bool {
        self != Self::None
    }
}

/// What happens to answers in flight when the weights change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InFlight {
    /// They go on under the new weights: what was said stays, its KV is computed anew. What RL with rollouts in flight
    /// wants. Nothing waits. The response names the version that it began with.
    #[default]
    Continue,
    /// They begin again under the new weights. A stream that has begun ends with an error, for its words cannot be taken
    /// back; any other answer is wholly of the new version.
    Restart,
    /// They end under the old weights, and new requests wait for them: no answer mixes versions and none is lost, but the
    /// pause lasts as long as the longest answer, and is given up after `pause_timeout_s`.
    Finish,
}

/// How an update of the whole fleet goes, and how long each phase may take. A phase that takes longer is an error that
/// names the worker, and the old weights serve on (WT-4).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct WeightsConfig {
    /// Whether vLLM's workers take new weights from pdlink. That needs vLLM's development routes, with which whoever reaches a
    /// worker's own HTTP port can pause it and call into it. Default: with pdlink's own connector, where that port is on loopback, and
    /// `[inference.vllm] worker_extension_cls` names no other class. With true and a class of your own, derive it from
    /// `pdlink.vllm.weights.WeightsExtension`.
    pub vllm_workers: Option<bool>,
    /// Where new weights lie until every worker has them. Default `host`: costs each worker the size of the model in host
    /// memory while an update is under way.
    pub staging: Staging,
    /// Most bytes that one rank may stage of an update, wherever that is. Default: what is free there.
    #[schemars(range(min = 1))]
    pub staging_bytes_max: Option<u64>,
    /// What happens to answers in flight when the weights change. Default `continue`.
    pub in_flight: InFlight,
    /// Whether a worker keeps what it staged, so that one that was restarted can have it from there. Default true: costs
    /// each worker the size of the model in host memory all the time. Without it, such a worker waits for the next update. With
    /// `staging = "host"` a worker holds on to as much again, which the next update is staged in.
    /// vLLM's workers keep it in any case: what they cannot load is taken back from there.
    pub keep: bool,
    /// Ways for weights to go, best first. Default `["cuda-ipc", "shm", "tcp"]`: GPU to GPU from a trainer's tensors on the same
    /// host, host memory to host memory there, then any other. With `nccl` in front a trainer broadcasts each bucket once to all
    /// workers on other GPUs, one rank on each, on any host that NCCL reaches; the others take the next path.
    pub paths: Vec<Path>,
    /// Bytes that are packed and sent as one. Default 64 MiB. A sender holds two such buckets in memory.
    #[schemars(range(min = 4096, max = 1_073_741_824))]
    pub bucket_bytes: u64,
    /// How long a worker may take until it has all bytes and has checked them, in seconds. Default 600. Nothing is paused
    /// meanwhile.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub stage_timeout_s: f64,
    /// How long requests on their way from prefill to decode may take to land once new ones are held back, in seconds.
    /// Default 5. What is left then is recomputed under the new weights.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub drain_timeout_s: f64,
    /// How long a worker may take to pause between two steps, in seconds. Default 30. With `in_flight = "finish"` that is the
    /// longest answer that is waited for.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub pause_timeout_s: f64,
    /// How long the flip itself may take, in seconds. Default 60: vLLM's workers load from host memory meanwhile.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub commit_timeout_s: f64,
    /// How long a worker that hears nothing more waits in each phase before it gives the update up and serves on, in
    /// seconds. Default 120. Must exceed the three times above (`drain_timeout_s`, `pause_timeout_s`,
    /// `commit_timeout_s`), or slow workers would make others give up.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub hold_timeout_s: f64,
}

impl WeightsConfig {
    /// The longest that an update of the whole fleet may take: its phases, and a worker that is still loading after the last of them
    /// is waited for as long as one holds.
    pub fn update_max_s(&self) -> f64 {
        let phases = [self.stage_timeout_s, self.drain_timeout_s, self.pause_timeout_s, self.commit_timeout_s];
        phases.iter().sum::<f64>() + self.hold_timeout_s
    }
}

impl Default for WeightsConfig {
    fn default() -> Self {
        Self {
            vllm_workers: None,
            staging: Staging::default(),
            staging_bytes_max: None,
            in_flight: InFlight::default(),
            keep: true,
            paths: vec![Path::CudaIpc, Path::Shm, Path::Tcp],
            bucket_bytes: 64 << 20,
            stage_timeout_s: 600.0,
            drain_timeout_s: 5.0,
            pause_timeout_s: 30.0,
            commit_timeout_s: 60.0,
            hold_timeout_s: 120.0,
        }
    }
}
