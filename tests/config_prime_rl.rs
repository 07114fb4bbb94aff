//! PRIME-RL's own files run as they are, and its keys are left to it.

#[path = "support/config.rs"]
#[allow(dead_code)]
mod support;

use pdlink::config::{All2AllBackend, Role};
use support::{Folder, errors, lines, load_text};

/// The debug run with prefill and decode apart, as PRIME-RL has it.
const PD: &str = r#"
inference_gpu_ids = [0]
trainer_gpu_ids = [2]
max_steps = 20
seq_len = 2048

[model]
name = "PrimeIntellect/Qwen3-0.6B-Reverse-Text-SFT"

[trainer.optim]
lr = 3e-6

[orchestrator]
batch_size = 128
rollouts_per_example = 16

[orchestrator.sampling]
max_tokens = 128

[[orchestrator.env]]
id = "reverse-text"

[inference]

[inference.model]
enforce_eager = true

[pd_disagg]
enabled = true
auto_ports = true
prefill_gpu_ids = [0]
decode_gpu_ids = [1]
"#;

/// The same with experts spread over GPUs.
const EP: &str = r#"
toml_files = ["rl_pd_disagg.toml"]

[model]
name = "Qwen/Qwen3-30B-A3B"

[orchestrator]
batch_size = 64
rollouts_per_example = 8

[inference]
enable_expert_parallel = true
all2all_backend = "allgather_reducescatter"
enable_eplb = false

[pd_disagg]
"#;

#[test]
fn the_debug_files_load_and_their_foreign_keys_are_told_once() {
    let folder = Folder::new(&[("rl_pd_disagg.toml", PD), ("rl_pd_disagg_ep.toml", EP)]);
    let loaded = folder.load(&["rl_pd_disagg.toml"], &[]).expect("loads");
    let config = &loaded.config;
    assert_eq!(config.model_name(), "PrimeIntellect/Qwen3-0.6B-Reverse-Text-SFT");
    assert!(config.inference.model.enforce_eager && config.pd_disagg.enabled && config.pd_disagg.auto_ports);
    assert_eq!((config.gpu_ids(Role::Prefill), config.gpu_ids(Role::Decode)), (vec![0], vec![1]));
    assert!(loaded.warnings.is_empty(), "{:?}", loaded.warnings);
    let notes = lines(&loaded.notes);
    let foreign: Vec<&str> = notes.lines().filter(|line| line.contains("PRIME-RL")).collect();
    assert_eq!(foreign.len(), 1, "{notes}");
    assert!(foreign[0].contains("max_steps, orchestrator, seq_len, trainer, trainer_gpu_ids"), "{notes}");
    assert!(notes.contains("inference_gpu_ids: is not used with PD on"), "{notes}");

    let loaded = folder.load(&["rl_pd_disagg_ep.toml"], &[]).expect("loads");
    assert_eq!(loaded.config.model_name(), "Qwen/Qwen3-30B-A3B");
    assert!(loaded.config.inference.enable_expert_parallel && loaded.config.inference.model.enforce_eager);
    assert_eq!(loaded.config.all2all_backend(Role::Decode), All2AllBackend::AllgatherReducescatter);
}

#[test]
fn our_copies_of_the_debug_files_say_the_same() {
    let folder = Folder::new(&[("rl_pd_disagg.toml", PD), ("rl_pd_disagg_ep.toml", EP)]);
    let ours = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/debug");
    for name in ["rl_pd_disagg.toml", "rl_pd_disagg_ep.toml"] {
        let theirs: toml::Table = std::fs::read_to_string(folder.path(name)).expect("reads").parse().expect("is TOML");
        let copy: toml::Table = std::fs::read_to_string(ours.join(name)).expect("reads").parse().expect("is TOML");
        assert_eq!(copy, theirs, "{name}");
    }
}

#[test]
fn every_file_in_configs_loads_without_a_warning() {
    let mut folders = vec![std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("configs")];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("is there") {
            let path = entry.expect("reads").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "toml") {
                files.push(path);
            }
        }
    }
    assert!(files.len() >= 4, "{files:?}");
    for file in files {
        let request =
            pdlink::config::LoadRequest { files: std::slice::from_ref(&file), overrides: &[], env: &|_| None };
        let loaded = pdlink::config::load(&request).unwrap_or_else(|error| panic!("{}:\n{error}", file.display()));
        assert!(loaded.warnings.is_empty(), "{}: {:?}", file.display(), loaded.warnings);
    }
}

#[test]
fn the_rest_of_prime_rl_is_accepted() {
    let text = format!(
        "output_dir = \"outputs\"\nclean = true\nmax_async_level = 2\n{PD}\n[ckpt]\ninterval = 5\n[wandb]\nproject = \"x\"\n\
         [orchestrator.client]\ntimeout = 1200\nbase_url = [\"http://localhost:8000/v1\"]\napi_key_var = \"KEY\"\n\
         skip_model_check = true\nheaders = {{ X-A = \"b\" }}\ndp_rank_count = 2\n[weight_broadcast]\ntype = \"filesystem\"\n\
         [trainer.weight_broadcast]\ntype = \"filesystem\"\nsave_sharded = true\n[inference.weight_broadcast]\ntype = \"filesystem\"\n"
    );
    let loaded = load_text(&text).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(loaded.config.orchestrator.client.timeout, Some(1200.0));
    let notes = lines(&loaded.notes);
    assert_eq!(notes.lines().filter(|line| line.contains("PRIME-RL")).count(), 1, "{notes}");
    for key in ["ckpt", "wandb", "clean", "output_dir", "max_async_level"] {
        assert!(notes.contains(key), "no {key} in {notes}");
    }
    let text = PD.replace("[inference]\n", "[inference]\nkv_transfer_config = { kv_connector = \"X\" }\n");
    let notes = lines(&load_text(&text).expect("loads").notes);
    assert!(notes.contains("inference.kv_transfer_config: is not used with PD on"), "{notes}");
}

#[test]
fn an_unknown_section_is_a_slip_or_a_note() {
    let cases = [
        ("[pd_disag]\n", "pd_disag: is unknown at the top; did you mean `pd_disagg`?"),
        ("[pd-disagg]\n", "did you mean `pd_disagg`?"),
        ("[inferense]\n", "did you mean `inference`?"),
        ("[trainer.weight_brodcast]\n", "did you mean `trainer.weight_broadcast`?"),
        ("[orchestrator.clent]\n", "did you mean `orchestrator.client`?"),
        ("[orchestrator.client]\nelastik = true\n", "did you mean `orchestrator.client.elastic`?"),
    ];
    for (text, want) in cases {
        let got = errors(text);
        assert!(got.contains(want), "{text}: {got}");
    }
    for text in ["[something_new]\na = 1\n", "[orchestrator.client]\nsomething_new = 1\n"] {
        let loaded = load_text(text).unwrap_or_else(|error| panic!("{text}: {error}"));
        let notes = lines(&loaded.notes);
        assert!(notes.contains("something_new: is neither a setting of pdlink nor one of PRIME-RL's"), "{notes}");
    }
}

#[test]
fn an_unknown_key_of_ours_names_the_nearest_or_all() {
    let cases = [
        ("[kv]\nlease = 5\n", "a.toml:2: kv.lease: is unknown in [kv]; did you mean `kv.lease_ms`?"),
        ("[inference]\nmodel_name = 5\n", "inference.model_name: is unknown in [inference]"),
        ("[inference.model]\nqqq = 5\n", "the keys in [inference.model] are name, dtype"),
        ("[proxy]\npolcy = \"prefix\"\n", "did you mean `proxy.policy`?"),
        ("[proxy]\npolicy = \"last_loaded\"\n", "did you mean \"least_loaded\"?"),
        ("[model]\nnames = \"x\"\n", "did you mean `model.name`?"),
    ];
    for (text, want) in cases {
        let got = errors(text);
        assert!(got.contains(want), "{text}: {got}");
    }
}
