//! The name of every metric, in one place. Label values are bounded: worker names, paths, outcomes; never a request id.

// The reference engine.
/// Gauge: all KV blocks.
pub const ENGINE_BLOCKS: &str = "pdlink_engine_blocks";
/// Gauge: blocks that can be taken now, cached ones that nobody uses included.
pub const ENGINE_BLOCKS_FREE: &str = "pdlink_engine_blocks_free";
/// Gauge: free blocks that the prefix cache still finds.
pub const ENGINE_BLOCKS_CACHED: &str = "pdlink_engine_blocks_cached";
/// Gauge: blocks held for decode under a lease. 0 at rest (KV-2).
pub const ENGINE_BLOCKS_HELD: &str = "pdlink_engine_blocks_held";
/// Gauge: blocks out of use because a lost peer may still write into them (KV-7).
pub const ENGINE_BLOCKS_QUARANTINED: &str = "pdlink_engine_blocks_quarantined";
/// Gauge: answers being computed.
pub const ENGINE_REQUESTS_RUNNING: &str = "pdlink_engine_requests_running";
/// Gauge: answers that wait for blocks or for their turn.
pub const ENGINE_REQUESTS_WAITING: &str = "pdlink_engine_requests_waiting";
/// Gauge: answers whose KV is being loaded.
pub const ENGINE_REQUESTS_LOADING: &str = "pdlink_engine_requests_loading";
/// Counter by `source` (`computed`, `loaded`, `cached`): prompt tokens by where their KV came from.
pub const ENGINE_PROMPT_TOKENS: &str = "pdlink_engine_prompt_tokens";
/// Counter: tokens generated.
pub const ENGINE_GENERATED_TOKENS: &str = "pdlink_engine_generated_tokens";
/// Counter: answers that gave their blocks up to older ones, and were computed again.
pub const ENGINE_PREEMPTIONS: &str = "pdlink_engine_preemptions";
/// Counter: answers that ended because their client left or asked for it.
pub const ENGINE_REQUESTS_ABORTED: &str = "pdlink_engine_requests_aborted";
/// Counter: answers that failed because their KV could not be loaded.
pub const ENGINE_LOAD_FAILURES: &str = "pdlink_engine_load_failures";
/// Counter: answers whose prompt was computed here because its KV could not be loaded.
pub const ENGINE_LOAD_RECOMPUTES: &str = "pdlink_engine_load_recomputes";

// The proxy.

/// Requests answered, by `route` and `code`.
pub const PROXY_REQUESTS: &str = "pdlink_proxy_requests";
/// Requests being served now.
pub const PROXY_REQUESTS_INFLIGHT: &str = "pdlink_proxy_requests_inflight";
/// From a request's head to the end of its answer, in seconds.
pub const PROXY_REQUEST_SECONDS: &str = "pdlink_proxy_request_seconds";
/// From sending the prefill leg to its whole answer, in seconds.
pub const PROXY_PREFILL_SECONDS: &str = "pdlink_proxy_prefill_seconds";
/// From sending the decode leg to the first byte of its answer's body, in seconds.
pub const PROXY_FIRST_BYTE_SECONDS: &str = "pdlink_proxy_first_byte_seconds";
/// Legs that failed and were tried on another pair, by `leg`.
pub const PROXY_RETRIES: &str = "pdlink_proxy_retries";
/// Requests that one worker served alone, prefill included, by `reason`.
pub const PROXY_ALONE: &str = "pdlink_proxy_alone";
/// Pairs of legs that were sent out, by `dispatch`: `sequential` or `concurrent`.
pub const PROXY_DISPATCHES: &str = "pdlink_proxy_dispatches";
/// Prefill legs that were answered without transfer parameters: the worker held no KV.
pub const PROXY_PREFILL_WITHOUT_PARAMS: &str = "pdlink_proxy_prefill_without_params";
/// Transfers given up after prefill was asked, by `outcome` of telling its runtime.
pub const PROXY_ABORTS: &str = "pdlink_proxy_aborts";
/// Answers that broke off after they had begun.
pub const PROXY_STREAMS_BROKEN: &str = "pdlink_proxy_streams_broken";
/// Clients that left before their answer was complete.
pub const PROXY_CLIENTS_LEFT: &str = "pdlink_proxy_clients_left";
/// Requests refused because the bound on requests in flight was reached.
pub const PROXY_REFUSED_FULL: &str = "pdlink_proxy_refused_full";
/// 1 while a worker may be given requests, by `worker` and `role`.
pub const PROXY_WORKER_UP: &str = "pdlink_proxy_worker_up";
/// Requests that a worker carries now.
pub const PROXY_WORKER_INFLIGHT: &str = "pdlink_proxy_worker_inflight";
/// Requests that a worker answered.
pub const PROXY_WORKER_SERVED: &str = "pdlink_proxy_worker_served";
/// Requests that failed by a worker's fault.
pub const PROXY_WORKER_FAILED: &str = "pdlink_proxy_worker_failed";
/// Times a worker was quarantined.
pub const PROXY_WORKER_QUARANTINES: &str = "pdlink_proxy_worker_quarantines";

/// Gauge by `worker`, `role` and `queue` (`running`, `waiting`): requests in the worker's own queues, as its metrics page says.
pub const PROXY_WORKER_QUEUE: &str = "pdlink_proxy_worker_queue";
/// Gauge by `worker` and `role`: the part of its KV blocks in use, 0 to 1.
pub const PROXY_WORKER_KV_USAGE: &str = "pdlink_proxy_worker_kv_usage";
/// Gauge by `worker` and `role`: seconds by which the worker's clock is ahead of the proxy's, as well as one question can tell.
pub const PROXY_WORKER_CLOCK_AHEAD: &str = "pdlink_proxy_worker_clock_ahead_seconds";
/// Gauge by `worker` and `role`: version of the weights that it serves.
pub const PROXY_WORKER_WEIGHT_VERSION: &str = "pdlink_proxy_worker_weight_version";
/// 1 for the phase of an update that a worker's first rank is in, by `worker`, `role` and `phase`; `serving` between updates.
pub const PROXY_WORKER_WEIGHTS_PHASE: &str = "pdlink_proxy_worker_weights_phase";
/// Gauge by `role` and `queue` (`running`, `waiting`): requests in a pool's queues, averaged over 30 pictures: half a minute, where `telemetry.watch_interval_s` is 1.
pub const PROXY_POOL_QUEUE: &str = "pdlink_proxy_pool_queue";
/// Gauge by `role`: the part of the time in which prefill workers had a prompt; of decode, the part of its KV blocks in use.
pub const PROXY_POOL_UTILISATION: &str = "pdlink_proxy_pool_utilisation";
/// Gauge by `role`: workers that a pool is short of, as the balance hint says.
pub const PROXY_POOL_SHORTFALL: &str = "pdlink_proxy_pool_shortfall";
/// Gauge: viewers of the page.
pub const PROXY_VIEWERS: &str = "pdlink_proxy_viewers";

// The launcher, on the page of its proxy.

/// Counter by `worker`: processes started, the first included.
pub const LAUNCHER_WORKER_STARTS: &str = "pdlink_launcher_worker_starts";
/// Counter by `worker` and `cause` (`exited`, `late`): workers that ended by themselves, or were not ready in time.
pub const LAUNCHER_WORKER_DEATHS: &str = "pdlink_launcher_worker_deaths";
/// 1 while a worker serves, as the launcher knows it, by `worker`.
pub const LAUNCHER_WORKER_READY: &str = "pdlink_launcher_worker_ready";
/// Gauge by `worker`: seconds from its last start until it served.
pub const LAUNCHER_WORKER_READY_SECONDS: &str = "pdlink_launcher_worker_ready_seconds";

/// Counter by `outcome` (`committed`, `refused`, or the phase that failed): updates of the fleet's weights.
pub const PROXY_WEIGHTS_UPDATES: &str = "pdlink_proxy_weights_updates";
/// Histogram by `part` (`staging`, `paused`), in seconds, of updates that were committed (WT-2).
pub const PROXY_WEIGHTS_SECONDS: &str = "pdlink_proxy_weights_seconds";

// The KV link. `side` is `prefill` or `decode`.
/// Counter by `side`, `path` and `outcome` (`done`, `aborted`, `expired`, or what failed): transfers that ended.
pub const KV_TRANSFERS: &str = "pdlink_kv_transfers";
/// Counter by `side` and `path`: bytes of KV moved by transfers that ended well.
pub const KV_TRANSFER_BYTES: &str = "pdlink_kv_transfer_bytes";
/// Counter by `side` and `path`: requests posted to the path by transfers that ended well.
pub const KV_TRANSFER_POSTS: &str = "pdlink_kv_transfer_posts";
/// Counter: leases that decode renewed, because a request waited there (KV-2).
pub const KV_LEASES_RENEWED: &str = "pdlink_kv_leases_renewed";
/// Counter by `side`: transfers whose digest was compared (KV-4).
pub const KV_DIGESTS_CHECKED: &str = "pdlink_kv_digests_checked";
/// Histogram by `side` and `part` (`wait`, `copy`, `validate`), in seconds, of transfers that ended well.
pub const KV_TRANSFER_SECONDS: &str = "pdlink_kv_transfer_seconds";
/// Gauge: blocks that prefill holds under a lease. 0 at rest (KV-2).
pub const KV_BLOCKS_HELD: &str = "pdlink_kv_blocks_held";
/// GPU memory that the process has taken for itself: staging and lists. Gauge, bytes.
pub const GPU_MEMORY_BYTES: &str = "pdlink_gpu_memory_bytes";
/// Gauge: transfers of either side that have not ended.
pub const KV_TRANSFERS_ACTIVE: &str = "pdlink_kv_transfers_active";
/// Gauge by `side`: connected workers of the other role.
pub const KV_PEERS: &str = "pdlink_kv_peers";
/// Counter by `reason`: control connections between workers that were lost or could not be made.
pub const KV_PEER_FAILURES: &str = "pdlink_kv_peer_failures";

// Weights of one worker.
/// Gauge: version of the weights that serve.
pub const WEIGHTS_VERSION: &str = "pdlink_weights_version";
/// Counter by `outcome` (`committed`, `aborted`): updates that ended here.
pub const WEIGHTS_UPDATES: &str = "pdlink_weights_updates";
/// Histogram: seconds from a pause to the resumption (WT-2).
pub const WEIGHTS_PAUSE_SECONDS: &str = "pdlink_weights_pause_seconds";
