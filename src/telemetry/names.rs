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
