//! The lists of GPU ids: each run of `tp` ids is one worker. With the reference engine the ids are only slots, under the same
//! rules, so that a file can change its engine and nothing else.

use std::collections::BTreeSet;

use crate::config::{EngineKind, Role};

use super::Bench;

pub(super) fn judge(bench: &mut Bench<'_>) {
    if bench.config.hosts.is_given() {
        // The nodes have lists of their own: `hosts`.
        return;
    }
    if !bench.config.pd_disagg.enabled {
        if bench.config.inference_gpu_ids.is_some() {
            list(bench, Role::Both, "inference_gpu_ids", "inference.parallel.tp");
        }
        return;
    }
    let (prefill, decode) = ("pd_disagg.prefill_gpu_ids", "pd_disagg.decode_gpu_ids");
    list(bench, Role::Prefill, prefill, tp_key(bench, "pd_disagg.prefill_tp"));
    list(bench, Role::Decode, decode, tp_key(bench, "pd_disagg.decode_tp"));
    overlap(bench, prefill, decode);
}

/// The key that says a role's ranks: its own if it was given.
fn tp_key(bench: &Bench<'_>, own: &'static str) -> &'static str {
    if bench.has(own) { own } else { "inference.parallel.tp" }
}

fn list(bench: &mut Bench<'_>, role: Role, key: &str, tp_key: &str) {
    let ids = bench.config.gpu_ids(role);
    let name = if role == Role::Both { "plain" } else { role.name() };
    if ids.is_empty() {
        let state = if bench.has(key) { "is empty" } else { "is missing" };
        let example = if role == Role::Decode { "[1]" } else { "[0]" };
        let message = format!("{state}: there would be no {name} worker");
        bench.refuse(&[key], message, format!("list its GPUs, as in `{key} = {example}`"));
        return;
    }
    let mut seen = BTreeSet::new();
    if let Some(id) = ids.iter().find(|id| !seen.insert(**id)) {
        let message = format!("has GPU {id} more than once");
        bench.refuse(&[key], message, "list each GPU once: two ranks on one GPU run out of its memory");
    }
    multiple(bench, key, tp_key, ids.len(), bench.config.tp(role), name);
}

fn multiple(bench: &mut Bench<'_>, key: &str, tp_key: &str, count: usize, tp: u32, name: &str) {
    let ranks = usize::try_from(tp).unwrap_or(usize::MAX);
    // No ranks at all is refused where the value is checked; here it only must not divide.
    if ranks == 0 || count.is_multiple_of(ranks) {
        return;
    }
    let nearest = match count / ranks {
        0 => format!("{ranks}"),
        whole => format!("{} or {}", whole * ranks, (whole + 1) * ranks),
    };
    bench.refuse(
        &[key, tp_key],
        format!("has {count} GPU ids, which is no multiple of {tp_key} = {tp}: a {name} worker takes {tp}"),
        format!("list {nearest} ids, or change {tp_key}"),
    );
}

fn overlap(bench: &mut Bench<'_>, prefill: &str, decode: &str) {
    let set = |ids: &[u32]| ids.iter().copied().collect::<BTreeSet<u32>>();
    let (ours, theirs) = (set(&bench.config.pd_disagg.prefill_gpu_ids), set(&bench.config.pd_disagg.decode_gpu_ids));
    let shared: Vec<String> = ours.intersection(&theirs).map(ToString::to_string).collect();
    if shared.is_empty() {
        return;
    }
    let gpus = shared.join(", ");
    if !bench.config.pd_disagg.shared_gpus {
        bench.refuse(
            &[decode, prefill],
            format!("shares GPU {gpus} with {prefill}: a GPU serves one role"),
            "give each role GPUs of its own, or set pd_disagg.shared_gpus = true to try PD out on one",
        );
    } else if both_take_more_than_there_is(bench) {
        let share = bench.config.inference.gpu_memory_utilization;
        bench.warn(
            &["inference.gpu_memory_utilization", "pd_disagg.shared_gpus"],
            format!("is {share}, and two workers share GPU {gpus}: the second to start will find no memory"),
            "set it below 0.5",
        );
    }
}

/// Whether two workers on one GPU ask for more than all of its memory. Arguments passed on may say otherwise.
fn both_take_more_than_there_is(bench: &Bench<'_>) -> bool {
    let inference = &bench.config.inference;
    let says_otherwise = |role| {
        ["gpu_memory_utilization", "kv_cache_memory_bytes"].iter().any(|name| inference.vllm.arg(role, name).is_some())
    };
    let on_gpu = inference.engine == EngineKind::Vllm;
    let said = says_otherwise(Role::Prefill) || says_otherwise(Role::Decode);
    on_gpu && !said && inference.gpu_memory_utilization > 0.5
}
