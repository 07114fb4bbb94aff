//! Ports that collide. With `auto_ports` the launcher moves out of the way; without, the file must be right.

use crate::config::{EngineKind, Role};

use super::Bench;

/// The ports that one key takes: its value and those that follow, for all workers.
struct Range {
    key: &'static str,
    whose: String,
    first: u32,
    count: u32,
}

impl Range {
    fn last(&self) -> u32 {
        self.first.saturating_add(self.count.saturating_sub(1))
    }

    fn collides(&self, other: &Self) -> bool {
        self.count > 0 && other.count > 0 && self.first <= other.last() && other.first <= self.last()
    }

    fn shown(&self) -> String {
        if self.count == 1 {
            format!("port {}", self.first)
        } else {
            format!("ports {} to {}", self.first, self.last())
        }
    }
}

pub(super) fn judge(bench: &mut Bench<'_>) {
    if bench.config.pd_disagg.auto_ports {
        return;
    }
    let ranges = ranges(bench);
    for (index, range) in ranges.iter().enumerate() {
        if range.last() > u32::from(u16::MAX) {
            let message = format!("needs {} for {}, and the last port is 65535", range.shown(), range.whose);
            bench.refuse(&[range.key], message, format!("set {} lower", range.key));
        }
        for earlier in ranges[..index].iter().filter(|earlier| earlier.collides(range)) {
            collision(bench, earlier, range);
        }
    }
}

fn ranges(bench: &Bench<'_>) -> Vec<Range> {
    let config = bench.config;
    let pd = &config.pd_disagg;
    let workers = |role: Role| {
        let ids = u32::try_from(config.gpu_ids(role).len()).unwrap_or(u32::MAX);
        ids / config.tp(role).max(1)
    };
    let range =
        |key, whose: &str, first: u16, count| Range { key, whose: whose.to_owned(), first: first.into(), count };
    let nodes = bench.config.hosts.has_several();
    let control = nodes.then(|| range("hosts.port", "the nodes' control connection", config.hosts.port, 1));
    if !pd.enabled {
        let plain = workers(Role::Both);
        let mut ranges = vec![
            range("inference.server.port", "the proxy", config.proxy_port(), 1),
            range("pd_disagg.decode_port", "HTTP of the workers", pd.decode_port, plain),
        ];
        if config.inference.engine == EngineKind::Reference {
            ranges.push(range("pd_disagg.decode_kv_port", "control of the workers", pd.decode_kv_port, plain));
        }
        ranges.extend(control);
        return ranges;
    }
    let (prefill, decode) = (workers(Role::Prefill), workers(Role::Decode));
    let kv = |role, count: u32| count.saturating_mul(config.fixed_kv_ports(role).into());
    let mut ranges = vec![
        range("pd_disagg.proxy_port", "the proxy", pd.proxy_port, 1),
        range("pd_disagg.prefill_port", "HTTP of the prefill workers", pd.prefill_port, prefill),
        range("pd_disagg.decode_port", "HTTP of the decode workers", pd.decode_port, decode),
        range("pd_disagg.prefill_kv_port", "KV of the prefill workers", pd.prefill_kv_port, kv(Role::Prefill, prefill)),
        range("pd_disagg.decode_kv_port", "KV of the decode workers", pd.decode_kv_port, kv(Role::Decode, decode)),
    ];
    ranges.extend(control);
    ranges
}

fn collision(bench: &mut Bench<'_>, earlier: &Range, later: &Range) {
    let message = format!(
        "{} ({}) and {} ({}, {}) collide, and auto_ports is false",
        later.whose,
        later.shown(),
        earlier.whose,
        earlier.shown(),
        earlier.key,
    );
    let free = earlier.last() + 1;
    let mend = format!("set {} to {free} or more, or pd_disagg.auto_ports = true", later.key);
    bench.refuse(&[later.key, earlier.key, "pd_disagg.auto_ports"], message, mend);
}
