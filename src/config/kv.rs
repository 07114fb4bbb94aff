//! `[kv]`: the link between a prefill and a decode worker.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A way for bytes to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// A peer GPU's region, mapped: one host, peer access.
    CudaIpc,
    /// `ncclSend` and `ncclRecv` through staging.
    Nccl,
    /// Whatever NIXL's backends reach.
    Nixl,
    /// Host memory of one host: a shared mapping, or `process_vm_readv`.
    Shm,
    /// Plain sockets: host memory anywhere.
    Tcp,
}

/// Where KV lies, as far as paths care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvMemory {
    Host,
    Gpu,
}

impl KvMemory {
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host memory",
            Self::Gpu => "GPU memory",
        }
    }
}

impl Path {
    /// Every path that can be named, best first.
    pub const BEST_FIRST: [Self; 5] = [Self::CudaIpc, Self::Nccl, Self::Nixl, Self::Shm, Self::Tcp];

    /// The one table of the paths that this program has, and the memory that each moves. `transport::select` opens them.
    pub fn moves(self, memory: KvMemory) -> bool {
        match self {
            Self::CudaIpc | Self::Nccl => memory == KvMemory::Gpu,
            Self::Nixl => true,
            Self::Shm | Self::Tcp => memory == KvMemory::Host,
        }
    }

    /// Whether it goes from one host to another.
    pub fn crosses_hosts(self) -> bool {
        match self {
            Self::CudaIpc | Self::Shm => false,
            Self::Nccl | Self::Nixl | Self::Tcp => true,
        }
    }

    /// Those that move this memory, best first.
    pub fn that_move(memory: KvMemory) -> impl Iterator<Item = Self> {
        Self::BEST_FIRST.into_iter().filter(move |path| path.moves(memory))
    }

    /// Names in a row, for messages.
    pub fn list(paths: impl IntoIterator<Item = Self>) -> String {
        let names: Vec<&str> = paths.into_iter().map(Self::name).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    }

    /// The name used in configuration, records, metrics and the ready line.
    pub fn name(self) -> &'static str {
        match self {
            Self::CudaIpc => "cuda-ipc",
            Self::Nccl => "nccl",
            Self::Nixl => "nixl",
            Self::Shm => "shm",
            Self::Tcp => "tcp",
        }
    }
}

/// Which transfers carry a digest of their KV (KV-4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DigestPolicy {
    Off,
    /// One transfer in `digest_sample_every`.
    #[default]
    Sampled,
    Every,
}

/// How KV blocks leave a prefill worker and reach a decode worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KvConfig {
    /// Paths allowed, best first. Default: on a GPU `cuda-ipc` and `nccl` with `P2pNcclConnector`, `nixl` with `NixlConnector`;
    /// on a CPU `shm`, and `tcp` between hosts. A path that is not listed is never used, also not as a fall-back. `cuda-ipc` and
    /// `nccl` move GPU memory, `shm` and `tcp` host memory, and `nixl` either, the same on both sides.
    pub paths: Option<Vec<Path>>,
    /// How long prefill holds blocks that nobody claims or renews, in milliseconds. Default 30000. Longer costs blocks
    /// that a vanished decode worker still pins.
    #[schemars(range(min = 1))]
    pub lease_ms: u64,
    /// How long one transfer may take from claim to validation before it is failed, in milliseconds. Default 20000.
    /// Must be shorter than `lease_ms`, or a slow transfer loses its blocks (KV-2).
    #[schemars(range(min = 1))]
    pub transfer_timeout_ms: u64,
    /// How long connecting to a peer and shaking hands may take, in milliseconds. Default 2000.
    #[schemars(range(min = 1))]
    pub connect_timeout_ms: u64,
    /// How often a silent control connection is probed, in milliseconds. Default 250.
    #[schemars(range(min = 1))]
    pub ping_interval_ms: u64,
    /// Silence after which a peer counts as dead, in milliseconds. Default 1000 (KV-8). Must be at least three pings.
    #[schemars(range(min = 1))]
    pub peer_timeout_ms: u64,
    /// Which transfers carry a digest. Default `sampled`. `every` reads all KV once more on both sides, where it lies: on a GPU
    /// by a kernel.
    pub digest: DigestPolicy,
    /// With `digest = "sampled"`: one transfer in this many. Default 16.
    #[schemars(range(min = 1))]
    pub digest_sample_every: u32,
    /// Threads that copy, per worker process. Default: half the cores, 1 to 8. Each is a core while a transfer runs.
    #[schemars(range(min = 1, max = 256))]
    pub copy_threads: Option<usize>,
    /// Sockets per pair of workers on the `tcp` path. Default 2. More help only where one socket cannot fill the link.
    #[schemars(range(min = 1, max = 64))]
    pub tcp_streams: usize,
    /// Most transfers in flight to one peer; more wait in order. Default 64.
    #[schemars(range(min = 1))]
    pub inflight_max: usize,
    /// Concurrent dispatch: prefill pushes what it has computed ahead of its end in parts of at least so many bytes. Default
    /// 262144. Smaller parts hide more of a short prompt's transfer, and cost a post each; there are never more than twice as
    /// many as the model has layers.
    pub part_bytes_min: u64,
    /// The `nccl` path.
    pub nccl: NcclConfig,
    /// The `nixl` path.
    pub nixl: NixlConfig,
    /// What decode does when KV cannot be loaded: `fail` answers 500, `recompute` prefills locally. Default `fail`.
    pub load_failure_policy: LoadFailurePolicy,
}

/// What decode does with a request whose KV could not be loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LoadFailurePolicy {
    #[default]
    Fail,
    Recompute,
}

impl Default for KvConfig {
    fn default() -> Self {
        Self {
            paths: None,
            lease_ms: 30_000,
            transfer_timeout_ms: 20_000,
            connect_timeout_ms: 2_000,
            ping_interval_ms: 250,
            peer_timeout_ms: 1_000,
            digest: DigestPolicy::default(),
            digest_sample_every: 16,
            copy_threads: None,
            tcp_streams: 2,
            inflight_max: 64,
            part_bytes_min: 256 * 1024,
            nccl: NcclConfig::default(),
            nixl: NixlConfig::default(),
            load_failure_policy: LoadFailurePolicy::default(),
        }
    }
}

/// NCCL, whose library PyTorch brings along, and which is opened where it is found. It moves KV between GPUs of one host or of
/// several, and refuses two ranks on one GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NcclConfig {
    /// The library itself, `libnccl.so.2`, from version 2.18 on. Default: the one that the process has loaded already, else that of
    /// the wheel in `environment`, else what the dynamic loader finds.
    pub library: Option<PathBuf>,
    /// The Python environment that has the wheel. Default: the one that is active (`VIRTUAL_ENV`).
    pub environment: Option<PathBuf>,
    /// GPU memory for packing scattered blocks, per worker process, in MiB. Default 256, taken when a peer first moves KV. Half of
    /// it sends and half receives; less makes the pieces smaller than the link likes.
    #[schemars(range(min = 32))]
    pub staging_mib: u64,
    /// Most multiprocessors that one send or receive takes from the engine. Default 24, which fill NVLink; 16 move
    /// three quarters as much.
    #[schemars(range(min = 1, max = 64))]
    pub multiprocessors: u32,
    /// How long making a communicator with a peer may take, in milliseconds. Default 20000: the first one in a process loads
    /// NCCL's kernels.
    #[schemars(range(min = 1))]
    pub connect_timeout_ms: u64,
}

impl Default for NcclConfig {
    fn default() -> Self {
        Self { library: None, environment: None, staging_mib: 256, multiprocessors: 24, connect_timeout_ms: 20_000 }
    }
}

/// NIXL, whose library comes with its Python wheels (`pip install nixl-cu13`, or `nixl-cu12`) and is opened where it is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NixlConfig {
    /// The library itself, `libnixl_capi.so`, from version 0.9.0 on. Default: that of the wheel in `environment`, else what the
    /// dynamic loader finds.
    pub library: Option<PathBuf>,
    /// The Python environment that has the wheel. Default: the one that is active (`VIRTUAL_ENV`).
    pub environment: Option<PathBuf>,
    /// Which of NIXL's backends carries the bytes. Default `UCX`. It must reach memory on both sides; the plugins are those
    /// of the wheel.
    pub backend: String,
    /// What the backend is told, by NIXL's names. For `UCX` that is, for example, `engine_config` (`"TLS=rc,cuda,tcp"`),
    /// `device_list` or `num_workers`. Default: nothing. Leave UCX a transport that reads without the other side's help (RDMA,
    /// shared memory, CUDA): over sockets alone a reader that dies in the middle makes UCX abort the process it reads from, and
    /// the `tcp` path is faster.
    pub parameters: BTreeMap<String, String>,
    /// Environment variables that NIXL and its backends read when a worker starts, such as `UCX_TLS = "rc,sm,cuda,tcp"` or
    /// `UCX_NET_DEVICES`. Default: none. `pdlink up` gives them to every worker that uses NIXL, also to those with the connector
    /// that vLLM ships; a worker that something else started says in its log where its own differ. Names begin with `UCX_`,
    /// `NIXL_`, `FI_`, `MC_`, `CUFILE_`, `IBV_`, `RDMAV_`, `MLX4_` or `MLX5_`; secrets are refused. `UCX_TLS` must leave `tcp`
    /// in, over which UCX makes its connections, and something faster beside it.
    pub env: BTreeMap<String, String>,
    /// Memory for packing short runs, per worker process and of the same kind as its KV, in MiB: half for what it submits, half
    /// lent to peers of its host, 4 MiB (64 on a GPU) to each. Default 256 on a GPU, else 0: runs go one by one. Host memory is
    /// shared among `kv.copy_threads` threads of UCX instead, which is faster wherever there is more than one core.
    pub staging_mb: Option<u64>,
    /// Transfers whose runs have at most this length on average, in KiB, go packed. Default 32, on a GPU 512; and only where
    /// there are at least 16 runs, on a GPU 8. Longer ones are faster one by one.
    pub pack_run_kb: Option<u64>,
}

impl Default for NixlConfig {
    fn default() -> Self {
        Self {
            library: None,
            environment: None,
            backend: "UCX".to_owned(),
            parameters: BTreeMap::new(),
            env: BTreeMap::new(),
            staging_mb: None,
            pack_run_kb: None,
        }
    }
}
