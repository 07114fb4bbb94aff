//! What a worker's page of metrics says, of vLLM and of the reference engine.

use crate::telemetry::names;

/// Counters of prompt tokens whose KV came from another worker: name and label.
const LOADED: [(&str, &str); 2] = [
    ("vllm:prompt_tokens_by_source", "source=\"external_kv_transfer\""),
    (names::ENGINE_PROMPT_TOKENS, "source=\"loaded\""),
];

/// Gauges that are 0 when nothing runs, by what they mean.
const BUSY: [(&str, &str); 5] = [
    ("vllm:num_requests_running", "requests running"),
    ("vllm:num_requests_waiting", "requests waiting"),
    (names::ENGINE_REQUESTS_RUNNING, "requests running"),
    (names::ENGINE_REQUESTS_WAITING, "requests waiting"),
    (names::ENGINE_REQUESTS_LOADING, "requests loading"),
];
const HELD: [(&str, &str); 5] = [
    ("vllm:kv_cache_usage_perc", "share of KV blocks in use"),
    (names::ENGINE_BLOCKS_HELD, "blocks held for decode"),
    (names::ENGINE_BLOCKS_QUARANTINED, "blocks out of use"),
    (names::KV_BLOCKS_HELD, "blocks held under a lease"),
    (names::KV_TRANSFERS_ACTIVE, "transfers that have not ended"),
];

/// Prompt tokens that were loaded so far; `None` where they are not counted.
pub(super) fn loaded(page: &str) -> Option<u64> {
    let of = |(name, label): &(&str, &str)| sum(page, name, label);
    LOADED.iter().find_map(of).map(whole)
}

/// What is not at rest, and whether requests are among it.
pub(super) fn unrest(page: &str) -> (Vec<String>, bool) {
    let of = |(name, what): &(&str, &str)| {
        let value = sum(page, name, "")?;
        (value > 0.0).then(|| format!("{value} {what}"))
    };
    let busy: Vec<String> = BUSY.iter().filter_map(of).collect();
    let is_busy = !busy.is_empty();
    (busy.into_iter().chain(HELD.iter().filter_map(of)).collect(), is_busy)
}

/// The sum over the series of `name` whose labels hold `label`. `None` without any series of that name.
fn sum(page: &str, name: &str, label: &str) -> Option<f64> {
    let mut found = None;
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let Some((series, value)) = line.rsplit_once(' ') else { continue };
        let (own, labels) = series.split_once('{').unwrap_or((series, ""));
        if own.trim_end_matches("_total") == name {
            let counts = labels.contains(label);
            *found.get_or_insert(0.0) += value.parse::<f64>().ok().filter(|_| counts).unwrap_or(0.0);
        }
    }
    found
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a counter of tokens, held to its range")]
fn whole(value: f64) -> u64 {
    value.clamp(0.0, 9e15) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_both_engines_are_read() {
        let vllm = "# HELP x\nvllm:prompt_tokens_by_source_total{engine=\"0\",source=\"external_kv_transfer\"} 32.0\n\
                    vllm:prompt_tokens_by_source_total{engine=\"0\",source=\"local_compute\"} 7.0\n\
                    vllm:num_requests_running{engine=\"0\"} 0.0\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.25\n";
        assert_eq!(loaded(vllm), Some(32));
        assert_eq!(unrest(vllm), (vec!["0.25 share of KV blocks in use".to_owned()], false));
        let ours = "pdlink_engine_prompt_tokens_total{source=\"computed\"} 9\npdlink_engine_requests_running 2\n";
        assert_eq!(loaded(ours), Some(0));
        assert_eq!(unrest(ours), (vec!["2 requests running".to_owned()], true));
        assert_eq!((loaded("x 1\n"), unrest("x 1\n")), (None, (Vec::new(), false)));
    }
}
