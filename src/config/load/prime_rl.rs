//! Which keys are PRIME-RL's own: its trainer and orchestrator read the same file.

/// PRIME-RL's keys at the top of a file.
const TOP: &[&str] = &[
    "async_level",
    "batch_size",
    "bench",
    "ckpt",
    "clean",
    "clean_output_dir",
    "deployment",
    "dump_config",
    "dry_run",
    "env",
    "eval",
    "experimental",
    "log",
    "max_async_level",
    "max_steps",
    "output_dir",
    "seq_len",
    "slurm",
    "teacher_gpu_ids",
    "teacher_inference",
    "tokenizer",
    "val",
    "wandb",
];

/// PRIME-RL's keys in `[orchestrator.client]`, besides those that the type names.
const CLIENT: &[&str] =
    &["admin_base_url", "api_key", "dp_rank_count", "extra_headers_from_state", "headers_from_env", "server_type"];

/// PRIME-RL's keys in the `weight_broadcast` tables, besides `type`.
const WEIGHT_BROADCAST: &[&str] = &[
    "adapter_only",
    "async_level",
    "broadcast_dir",
    "host",
    "inference_world_size",
    "max_async_level",
    "port",
    "quantize_in_weight_transfer",
    "save_format",
    "save_sharded",
    "timeout",
];

/// Whether a key is known to be PRIME-RL's.
pub(super) fn owns(path: &[String]) -> bool {
    match path {
        [top] => TOP.contains(&top.as_str()),
        [.., table, key] if table == "client" => CLIENT.contains(&key.as_str()),
        [.., table, key] if table == "weight_broadcast" => WEIGHT_BROADCAST.contains(&key.as_str()),
        _ => false,
    }
}

/// Whether a key that is no slip for one of ours must be PRIME-RL's, because its table is.
pub(super) fn owns_table_of(path: &[String]) -> bool {
    matches!(path, [table, _] if table == "trainer" || table == "orchestrator")
}

/// What the note calls a key: `trainer.optim` is told as `trainer`, and `orchestrator.sampling` as `orchestrator`.
pub(super) fn head(key: &str) -> &str {
    let first = key.split('.').next().unwrap_or(key);
    if matches!(first, "trainer" | "orchestrator") { first } else { key }
}
