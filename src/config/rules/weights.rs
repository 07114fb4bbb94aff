//! Weights by NCCL: what they rule out. PRIME-RL's file keeps the settings in question in several places.

use std::collections::BTreeSet;

use crate::config::load::tree::{Node, Value, join};
use crate::config::{WeightBroadcastConfig, WeightBroadcastType};

use super::Bench;

/// Where LoRA may be switched on, besides `[inference]`: the trainer's file says it in one of these tables.
const LORA_PLACES: &[&str] = &["", "model", "trainer", "orchestrator"];
/// Keys that switch LoRA on, in those tables or one below.
const LORA_KEYS: &[&str] = &["lora", "enable_lora", "lora_name"];
/// Where the number of steps that inference may lag behind is kept.
const ASYNC_PLACES: &[&str] = &[
    "",
    "trainer",
    "orchestrator",
    "weight_broadcast",
    "trainer.weight_broadcast",
    "orchestrator.weight_broadcast",
    "inference.weight_broadcast",
];
/// The names it has had.
const ASYNC_KEYS: &[&str] = &["max_async_level", "async_level"];
/// Tables within tables, at most, that are searched for LoRA: `trainer.model.experimental.lora` is the deepest known.
const DEPTH_MAX: usize = 3;

pub(super) fn judge(bench: &mut Bench<'_>) {
    let copies = copies(bench);
    disagree(bench, &copies);
    let nccl = copies.iter().find(|(_, kind)| *kind == WeightBroadcastType::Nccl);
    let Some((by, _)) = nccl else { return };
    no_lora(bench, by);
    in_step(bench, by);
    two_gpus(bench, by);
}

/// Every place that says how weights travel.
fn copies(bench: &Bench<'_>) -> Vec<(&'static str, WeightBroadcastType)> {
    let config = bench.config;
    let places: [(&str, &Option<WeightBroadcastConfig>); 3] = [
        ("weight_broadcast.type", &config.weight_broadcast),
        ("trainer.weight_broadcast.type", &config.trainer.weight_broadcast),
        ("inference.weight_broadcast.type", &config.inference.weight_broadcast),
    ];
    places.into_iter().filter_map(|(key, copy)| Some((key, copy.as_ref()?.r#type?))).collect()
}

fn disagree(bench: &mut Bench<'_>, copies: &[(&'static str, WeightBroadcastType)]) {
    let Some((first_key, first)) = copies.first() else { return };
    for (key, kind) in copies {
        if kind != first {
            let message = format!("is \"{}\", but {first_key} is \"{}\"", kind.name(), first.name());
            bench.refuse(&[key, first_key], message, format!("say the same in both, or leave {key} out"));
        }
    }
}

fn no_lora(bench: &mut Bench<'_>, by: &str) {
    let mut on = Vec::new();
    if bench.config.inference.enable_lora {
        on.push("inference.enable_lora".to_owned());
    }
    for place in LORA_PLACES {
        let node = if place.is_empty() { Some(bench.given) } else { bench.given.at(place) };
        if let Some(node) = node {
            let depth = if place.is_empty() { 0 } else { DEPTH_MAX };
            find_lora(node, place, depth, &mut on);
        }
    }
    for key in on {
        bench.refuse(
            &[&key, by],
            format!("switches LoRA on, but {by} = \"nccl\" sends whole weights"),
            format!("switch LoRA off, or set {by} = \"filesystem\""),
        );
    }
}

fn find_lora(node: &Node, path: &str, depth: usize, on: &mut Vec<String>) {
    let Some(table) = node.as_table() else { return };
    for (name, child) in table {
        let key = join(path, name);
        if LORA_KEYS.contains(&name.as_str()) {
            on.extend(child.value.is_on().then_some(key));
        } else if depth > 0 {
            find_lora(child, &key, depth - 1, on);
        }
    }
}

fn in_step(bench: &mut Bench<'_>, by: &str) {
    for (place, name) in ASYNC_PLACES.iter().flat_map(|place| ASYNC_KEYS.iter().map(move |name| (place, name))) {
        let key = &join(place, name);
        let Some(node) = bench.given.at(key) else { continue };
        if !matches!(node.value, Value::Whole(1)) {
            let message =
                format!("is {}, but {by} = \"nccl\" needs 1: the broadcast is a step that both sides take", node.value);
            bench.refuse(&[key, by], message, format!("set {key} = 1, or {by} = \"filesystem\""));
        }
    }
}

fn two_gpus(bench: &mut Bench<'_>, by: &str) {
    let config = bench.config;
    if config.hosts.has_several() {
        // The same id on two nodes is two GPUs.
        return;
    }
    let workers = config.roles().iter().flat_map(|role| config.gpu_ids(*role));
    let trainer = config.trainer_gpu_ids.iter().flatten().copied();
    let gpus: BTreeSet<u32> = workers.chain(trainer).collect();
    if gpus.len() < 2 {
        let lists = ["pd_disagg.prefill_gpu_ids", "pd_disagg.decode_gpu_ids", "inference_gpu_ids", "trainer_gpu_ids"];
        let keys: Vec<&str> = std::iter::once(by).chain(lists).collect();
        bench.refuse(
            &keys,
            format!("is \"nccl\", which needs at least 2 GPUs, and trainer and workers together have {}", gpus.len()),
            format!("list the trainer's GPUs in trainer_gpu_ids beside the workers', or set {by} = \"filesystem\""),
        );
    }
}
