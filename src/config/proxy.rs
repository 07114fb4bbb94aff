//! `[proxy]`: the HTTP front before the workers.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a worker is picked among the healthy ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Fewest requests in flight; a request that carries `X-Session-ID` keeps its worker.
    #[default]
    LeastLoaded,
    RoundRobin,
    /// By a hash of `X-Session-ID` (rendezvous hashing), least loaded without one.
    Session,
    /// The worker that last saw the longest equal beginning of the prompt, within a load bound.
    Prefix,
}

/// Which leg is sent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dispatch {
    /// Prefill, then decode with what prefill answered.
    #[default]
    Sequential,
    /// Both at once: decode names its blocks while prefill computes, and prefill pushes each layer into them as it is done.
    Concurrent,
}

impl Dispatch {
    /// The name used in configuration, records and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Concurrent => "concurrent",
        }
    }
}

/// The proxy's limits and habits. All times are upper bounds: no wait is longer (PX-3).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ProxyConfig {
    /// How a worker is picked. Default `least_loaded`.
    pub policy: Policy,
    /// Which leg goes first. Default `sequential`.
    pub dispatch: Dispatch,
    /// Failures in a row after which a worker is quarantined. Default 3.
    #[schemars(range(min = 1))]
    pub quarantine_after_failures: u32,
    /// How long a quarantined worker gets no request, in seconds; then one is tried (half open). Default 5.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub quarantine_s: f64,
    /// How often each worker's `/health` is asked, in seconds. Default 5.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub health_interval_s: f64,
    /// How long a health answer may take, in seconds. Default 5.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub health_timeout_s: f64,
    /// How long connecting to a worker may take, in seconds. Default 2.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub connect_timeout_s: f64,
    /// How long the host of a worker may leave bytes or probes unanswered before its connections count as dead, in seconds.
    /// Default 5. The kernels of both hosts see to it: a worker that computes is not silent. Workers on loopback need none.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub dead_after_s: f64,
    /// How long the whole prefill leg may take, in seconds. Default 600.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub prefill_timeout_s: f64,
    /// How long decode may take to its first byte, in seconds. Default 600.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub first_byte_timeout_s: f64,
    /// How long a started stream may stay silent, in seconds. Default 600.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub idle_timeout_s: f64,
    /// How long a whole request may take, in seconds. Default 21600, PRIME-RL's own.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub request_timeout_s: f64,
    /// How long a client may take to send its body, in seconds. Default 60.
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub body_timeout_s: f64,
    /// Largest request body, in bytes. Default 64 MiB. Each request in flight may hold that much.
    #[schemars(range(min = 1))]
    pub body_bytes_max: u64,
    /// Requests in flight before new ones get 503 with `Retry-After`. Default 16384.
    #[schemars(range(min = 1))]
    pub inflight_max: usize,
    /// Pairs tried for one request before its error goes to the client. Default 2.
    #[schemars(range(min = 1))]
    pub attempts_max: u32,
    /// Whether decode may prefill by itself when no prefill worker can serve (PX-5). Default false.
    pub local_prefill: bool,
    /// Prompts shorter than this many bytes of body go to decode alone. Default 0: none do.
    pub local_prefill_below_bytes: u64,
    /// Threads that serve. Default: half the cores, 1 to 4.
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<usize>,
    /// Where admin routes listen, `host:port`. Default: on the proxy's own port, for loopback clients or token holders.
    pub admin_listen: Option<String>,
    /// Token that admin routes ask for as `Authorization: Bearer`. Default none: then only loopback may call them.
    pub admin_token: Option<String>,
    /// Write one line per request to the log. Default true.
    pub access_log: bool,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            dispatch: Dispatch::default(),
            quarantine_after_failures: 3,
            quarantine_s: 5.0,
            health_interval_s: 5.0,
            health_timeout_s: 5.0,
            connect_timeout_s: 2.0,
            dead_after_s: 5.0,
            prefill_timeout_s: 600.0,
            first_byte_timeout_s: 600.0,
            idle_timeout_s: 600.0,
            request_timeout_s: 21_600.0,
            body_timeout_s: 60.0,
            body_bytes_max: 64 << 20,
            inflight_max: 16_384,
            attempts_max: 2,
            local_prefill: false,
            local_prefill_below_bytes: 0,
            threads: None,
            admin_listen: None,
            admin_token: None,
            access_log: true,
        }
    }
}
