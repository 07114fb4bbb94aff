//! A worker's queues, off its own `/metrics`: vLLM's names, and those of the reference engine.

use serde::Serialize;

use crate::telemetry::names;

/// What a worker says of its queues.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub(crate) struct Queues {
    pub(crate) running: f64,
    pub(crate) waiting: f64,
    /// 0 to 1, of the KV blocks.
    pub(crate) kv_usage: Option<f64>,
}

/// What a line counts towards.
#[derive(Clone, Copy)]
enum Field {
    Running,
    Waiting,
    Usage,
    Blocks,
    BlocksFree,
}

const FIELDS: &[(&str, Field)] = &[
    ("vllm:num_requests_running", Field::Running),
    ("vllm:num_requests_waiting", Field::Waiting),
    ("vllm:kv_cache_usage_perc", Field::Usage),
    // Up to 0.10.
    ("vllm:gpu_cache_usage_perc", Field::Usage),
    (names::ENGINE_REQUESTS_RUNNING, Field::Running),
    (names::ENGINE_REQUESTS_WAITING, Field::Waiting),
    (names::ENGINE_REQUESTS_LOADING, Field::Waiting),
    (names::ENGINE_BLOCKS, Field::Blocks),
    (names::ENGINE_BLOCKS_FREE, Field::BlocksFree),
];

/// Reads a page in Prometheus' or OpenMetrics' text. `None`: it says nothing of queues. Engines of one server are added up; of
/// their KV the fullest counts.
pub(crate) fn read(page: &[u8]) -> Option<Queues> {
    let mut queues = Queues::default();
    let (mut blocks, mut free) = (None, None);
    let mut said = false;
    for line in page.split(|&byte| byte == b'\n') {
        // Nearly all lines of vLLM's page are others'.
        if !line.starts_with(b"vllm:") && !line.starts_with(b"pdlink_engine_") {
            continue;
        }
        let Some((field, value)) = std::str::from_utf8(line).ok().and_then(field_of) else { continue };
        match field {
            Field::Running => queues.running += value,
            Field::Waiting => queues.waiting += value,
            Field::Usage => queues.kv_usage = Some(queues.kv_usage.map_or(value, |known| known.max(value))),
            Field::Blocks => blocks = Some(value),
            Field::BlocksFree => free = Some(value),
        }
        said |= matches!(field, Field::Running | Field::Waiting);
    }
    if let (Some(blocks), Some(free)) = (blocks.filter(|blocks| *blocks > 0.0), free) {
        queues.kv_usage = Some((1.0 - free / blocks).clamp(0.0, 1.0));
    }
    said.then_some(queues)
}

/// `name{labels} value [time]`.
fn field_of(line: &str) -> Option<(Field, f64)> {
    let end = line.find(['{', ' '])?;
    let (_, field) = FIELDS.iter().find(|(name, _)| *name == &line[..end])?;
    let rest = match line[end..].strip_prefix('{') {
        Some(labelled) => labelled.split_once('}')?.1,
        None => &line[end..],
    };
    let value: f64 = rest.split_ascii_whitespace().next()?.parse().ok()?;
    value.is_finite().then_some((*field, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_engines_are_understood() {
        let vllm = b"# HELP vllm:num_requests_running Number\n# TYPE vllm:num_requests_running gauge\n\
            vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3.0\nvllm:num_requests_running{engine=\"1\"} 2.0\n\
            vllm:num_requests_waiting{engine=\"0\"} 7.0\nvllm:num_requests_waiting_by_reason{reason=\"x\"} 9.0\n\
            vllm:kv_cache_usage_perc{engine=\"0\"} 0.25\nvllm:kv_cache_usage_perc{engine=\"1\"} 0.5\npython_gc 1\n";
        assert_eq!(read(vllm), Some(Queues { running: 5.0, waiting: 7.0, kv_usage: Some(0.5) }));
        let own =
            b"pdlink_engine_requests_running 1\npdlink_engine_requests_waiting 2\npdlink_engine_requests_loading 3\n\
            pdlink_engine_blocks 100\npdlink_engine_blocks_free 40\n";
        assert_eq!(read(own), Some(Queues { running: 1.0, waiting: 5.0, kv_usage: Some(0.6) }));
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        for page in [&b""[..], b"\xff\xfe", b"vllm:num_requests_running", b"vllm:num_requests_running{ 1", b"{\"a\":1}"]
        {
            assert_eq!(read(page), None);
        }
        let nan = b"vllm:num_requests_running NaN\nvllm:num_requests_waiting 1\n";
        assert_eq!(read(nan), Some(Queues { running: 0.0, waiting: 1.0, kv_usage: None }));
    }
}
