//! What the workers run: arguments passed on to vLLM, and the shape of the reference engine.

use crate::config::{All2AllBackend, EngineKind, VllmArgs};

use super::Bench;

/// Arguments that pdlink decides for each worker, and the setting that stands behind each.
const ARGS_OF_OURS: &[(&str, &str)] = &[
    ("data_parallel_size", "inference.parallel.dp"),
    ("host", "pd_disagg.host"),
    ("kv_transfer_config", "pd_disagg.kv_connector"),
    ("model", "inference.model.name"),
    ("port", "pd_disagg.prefill_port and pd_disagg.decode_port"),
    ("tensor_parallel_size", "inference.parallel.tp, pd_disagg.prefill_tp and pd_disagg.decode_tp"),
    ("uds", "pd_disagg.host"),
];

pub(super) fn judge(bench: &mut Bench<'_>) {
    match bench.config.inference.engine {
        EngineKind::Vllm => vllm(bench),
        EngineKind::Reference => reference(bench),
    }
}

fn vllm(bench: &mut Bench<'_>) {
    let config = bench.config;
    let args = &config.inference.vllm;
    for (table, args) in [("", &args.all), (".prefill", &args.prefill), (".decode", &args.decode)] {
        args_of_ours(bench, table, args);
    }
    let backends = [
        ("inference.all2all_backend", Some(config.inference.all2all_backend)),
        ("pd_disagg.prefill_all2all_backend", config.pd_disagg.prefill_all2all_backend),
        ("pd_disagg.decode_all2all_backend", config.pd_disagg.decode_all2all_backend),
    ];
    for (key, backend) in backends {
        if let Some(backend) = backend.filter(|backend| backend.is_replaced_by_vllm()) {
            let used = All2AllBackend::default().name();
            let message =
                format!("is \"{}\", which vLLM 0.24 and later silently replaces by \"{used}\"", backend.name());
            bench.warn(&[key], message, format!("write \"{used}\", or a backend that vLLM still has"));
        }
    }
    if config.inference.enable_eplb && !config.inference.enable_expert_parallel {
        let message = "is true, but without expert parallelism vLLM has no experts to balance and refuses to start";
        bench.warn(&["inference.enable_eplb"], message, "set inference.enable_expert_parallel = true");
    }
}

fn args_of_ours(bench: &mut Bench<'_>, table: &str, args: &VllmArgs) {
    for (name, setting) in ARGS_OF_OURS {
        if args.contains_key(*name) {
            let key = format!("inference.vllm{table}.{name}");
            bench.refuse(&[&key], "is an argument that pdlink writes for each worker", format!("use {setting}"));
        }
    }
}

fn reference(bench: &mut Bench<'_>) {
    let config = bench.config;
    if bench.has("inference.vllm") {
        bench.note("inference.vllm", "is not used: the workers run the reference engine");
    }
    let shape = &config.inference.reference;
    if ![1, 2, 4].contains(&shape.dtype_bytes) {
        let message = format!("must be 1, 2 or 4, and here is {}", shape.dtype_bytes);
        bench.refuse(&["inference.reference.dtype_bytes"], message, "choose one of them");
    }
    for role in config.roles() {
        let ranks = usize::try_from(config.tp(*role)).unwrap_or(usize::MAX);
        let heads = shape.kv_heads;
        // Zero of either is refused where the values are checked.
        let fits = heads == 0 || ranks == 0 || heads.is_multiple_of(ranks) || ranks.is_multiple_of(heads);
        if !fits {
            let message = format!(
                "is {heads}, which {ranks} ranks of a {} worker can neither share nor repeat evenly",
                role.name()
            );
            bench.refuse(
                &[
                    "inference.reference.kv_heads",
                    "pd_disagg.prefill_tp",
                    "pd_disagg.decode_tp",
                    "inference.parallel.tp",
                ],
                message,
                "choose heads and ranks so that one divides the other",
            );
            break;
        }
    }
}
