//! Every rule of the configuration: what it refuses, at which key, file and line, and with which mend.

#[path = "support/config.rs"]
#[allow(dead_code)]
mod support;

use support::{errors, lines, load_text};

/// A PD run that is right, for cases to break: 4 lines, then `rest` from line 5 on.
fn pd(rest: &str) -> String {
    format!("[inference]\n[pd_disagg]\nenabled = true\n\n{rest}")
}

/// As [`pd`], with one GPU for each role in lines 5 and 6; `rest` is in `[pd_disagg]` from line 7 on.
fn pd_1_1(rest: &str) -> String {
    pd(&format!("prefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n{rest}"))
}

fn assert_cases(cases: &[(&str, String, &[&str])]) {
    for (name, text, parts) in cases {
        let got = errors(text);
        for part in *parts {
            assert!(got.contains(part), "case {name}: no {part:?} in\n{got}\nof\n{text}");
        }
    }
}

#[test]
fn pd_needs_inference_and_one_address() {
    assert_cases(&[
        (
            "no [inference]",
            "[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n".to_owned(),
            &["a.toml:2: pd_disagg.enabled", "no [inference] section", "add an [inference] section"],
        ),
        (
            "elastic client",
            pd_1_1("[orchestrator.client]\ntimeout = 1200\nelastic = { hostname = \"x\" }\n"),
            &["a.toml:9: orchestrator.client.elastic", "the one address", "take `elastic` out"],
        ),
        (
            "elastic client as a table",
            pd_1_1("[orchestrator.client.elastic]\nhostname = \"x\"\n"),
            &["a.toml:7: orchestrator.client.elastic"],
        ),
        (
            "host with a port",
            pd_1_1("host = \"http://localhost\"\n"),
            &["a.toml:7: pd_disagg.host", "host name or an address"],
        ),
        (
            "variables of ours",
            pd_1_1("prefill_env = { CUDA_VISIBLE_DEVICES = \"3\" }\ndecode_env = { \"A=B\" = \"1\" }\n"),
            &[
                "a.toml:7: pd_disagg.prefill_env.CUDA_VISIBLE_DEVICES",
                "take it out",
                "a.toml:8: pd_disagg.decode_env.A=B",
            ],
        ),
    ]);
    for off in ["elastic = false", "elastic = \"None\"", "elastic = {enabled = false}", ""] {
        load_text(&pd_1_1(&format!("[orchestrator.client]\n{off}\n"))).unwrap_or_else(|error| panic!("{off}: {error}"));
    }
}

#[test]
fn gpu_lists_are_whole_and_apart() {
    assert_cases(&[
        (
            "missing",
            pd("decode_gpu_ids = [1]\n"),
            &["a.toml:2: pd_disagg.prefill_gpu_ids", "is missing", "`pd_disagg.prefill_gpu_ids = [0]`"],
        ),
        (
            "empty",
            pd("prefill_gpu_ids = [0]\ndecode_gpu_ids = []\n"),
            &["a.toml:6: pd_disagg.decode_gpu_ids", "is empty", "no decode worker", "`pd_disagg.decode_gpu_ids = [1]`"],
        ),
        (
            "repeated",
            pd("prefill_gpu_ids = [0, 2, 0]\ndecode_gpu_ids = [1]\n"),
            &["a.toml:5: pd_disagg.prefill_gpu_ids", "GPU 0 more than once", "list each GPU once"],
        ),
        (
            "negative",
            pd("prefill_gpu_ids = [\n 0,\n -1]\ndecode_gpu_ids = [1]\n"),
            &["a.toml:7: pd_disagg.prefill_gpu_ids[1]", "at least 0", "-1"],
        ),
        (
            "overlapping",
            pd("prefill_gpu_ids = [0, 1, 2]\ndecode_gpu_ids = [2, 3, 1]\n"),
            &["a.toml:6: pd_disagg.decode_gpu_ids", "GPU 1, 2", "pd_disagg.prefill_gpu_ids", "GPUs of its own"],
        ),
        (
            "no multiple of the role's ranks",
            pd("prefill_gpu_ids = [0, 1, 2]\ndecode_gpu_ids = [3]\nprefill_tp = 2\n"),
            &["a.toml:5: pd_disagg.prefill_gpu_ids", "3 GPU ids", "pd_disagg.prefill_tp = 2", "list 2 or 4 ids"],
        ),
        (
            "no multiple of the shared ranks",
            pd("prefill_gpu_ids = [0, 1]\ndecode_gpu_ids = [3]\n[inference.parallel]\ntp = 2\n"),
            &["a.toml:6: pd_disagg.decode_gpu_ids", "inference.parallel.tp = 2", "list 2 ids"],
        ),
        (
            "plain workers",
            "inference_gpu_ids = [0, 1, 1]\n[inference.parallel]\ntp = 2\n".to_owned(),
            &["a.toml:1: inference_gpu_ids", "GPU 1 more than once", "3 GPU ids, which is no multiple"],
        ),
        (
            "slots of the reference engine are under the same rules",
            "[inference]\nengine = \"reference\"\n[pd_disagg]\nenabled = true\nprefill_gpu_ids=[0]\ndecode_gpu_ids=[0]\n".to_owned(),
            &["a.toml:6: pd_disagg.decode_gpu_ids", "shares GPU 0"],
        ),
    ]);
    let unequal =
        pd("prefill_gpu_ids = [0, 1]\ndecode_gpu_ids = [2]\nprefill_tp = 2\n[weight_broadcast]\ntype = \"nccl\"\n");
    let loaded = load_text(&unequal).expect("unequal ranks are no obstacle to weights by NCCL");
    assert_eq!(loaded.config.weight_broadcast_type().name(), "nccl");
}

#[test]
fn fixed_ports_do_not_collide() {
    let fixed = |rest: &str| pd_1_1(&format!("auto_ports = false\n{rest}"));
    let ranks = |connector: &str, decode: u16| {
        format!(
            "[inference]\n[pd_disagg]\nenabled = true\nauto_ports = false\nconnector_impl = \"{connector}\"\ndecode_kv_port = {decode}\n\
             prefill_gpu_ids = [0, 1, 2, 3]\nprefill_tp = 2\ndecode_gpu_ids = [4]\n"
        )
    };
    let two = "[inference]\n[pd_disagg]\nenabled = true\nauto_ports = false\nprefill_gpu_ids = [0, 1]\ndecode_gpu_ids = [2, 3]\n";
    assert_cases(&[
        (
            "proxy and prefill",
            fixed("prefill_port = 8000\n"),
            &[
                "a.toml:8: pd_disagg.prefill_port",
                "port 8000",
                "set pd_disagg.prefill_port to 8001 or more",
                "auto_ports = true",
            ],
        ),
        (
            "ranges of HTTP ports",
            format!("{two}prefill_port = 8199\ndecode_kv_port = 15000\n"),
            &[
                "HTTP of the prefill workers (ports 8199 to 8200, pd_disagg.prefill_port)",
                "set pd_disagg.decode_port to 8201",
            ],
        ),
        (
            "the KV ports' defaults leave room for one prefill worker",
            two.to_owned(),
            &["KV of the decode workers (ports 14580 to 14581)", "set pd_disagg.decode_kv_port to 14581", "a.toml:4"],
        ),
        (
            "HTTP and KV",
            fixed("decode_port = 14579\n"),
            &["a.toml:8: pd_disagg.decode_port", "pd_disagg.prefill_kv_port to 14580 or more"],
        ),
        (
            "past the last port",
            format!("{two}decode_port = 65535\n"),
            &["a.toml:7: pd_disagg.decode_port", "ports 65535 to 65536", "the last port is 65535"],
        ),
        (
            "each rank on vLLM has a port",
            ranks("native", 14_582),
            &[
                "a.toml:6: pd_disagg.decode_kv_port",
                "KV of the prefill workers (ports 14579 to 14582",
                "to 14583 or more",
            ],
        ),
        (
            "so it is with vLLM's own connector",
            ranks("vllm", 14_582),
            &[
                "a.toml:6: pd_disagg.decode_kv_port",
                "KV of the prefill workers (ports 14579 to 14582",
                "to 14583 or more",
            ],
        ),
        (
            "plain workers",
            "[inference.server]\nport = 8200\n[pd_disagg]\nauto_ports = false\n".to_owned(),
            &["inference.server.port", "HTTP of the workers (port 8200)", "pd_disagg.decode_port to 8201"],
        ),
        ("no port 0", fixed("proxy_port = 0\n"), &["a.toml:8: pd_disagg.proxy_port", "at least 1"]),
    ]);
    load_text(&two.replace("false", "true")).expect("the launcher moves out of the way");
    load_text(&fixed("")).expect("one worker of each role fits");
    for connector in ["native", "vllm"] {
        load_text(&ranks(connector, 14_583)).expect("four ports and no more");
    }
}

#[test]
fn weights_by_nccl_rule_out_lora_lag_and_one_gpu() {
    let nccl = |rest: &str| pd_1_1(&format!("[weight_broadcast]\ntype = \"nccl\"\n{rest}"));
    let lora = ["switches LoRA on", "set weight_broadcast.type = \"filesystem\""];
    let lag = ["needs 1"];
    let cases = [
        ("[trainer.model.lora]\nrank = 8\n", "a.toml:9: trainer.model.lora", &lora[..]),
        ("[trainer.model.experimental.lora]\nrank = 8\n", "a.toml:9: trainer.model.experimental.lora", &lora),
        ("[orchestrator]\nlora_name = \"x\"\n", "a.toml:10: orchestrator.lora_name", &lora),
        ("[orchestrator]\nmax_async_level = 2\n", "a.toml:10: orchestrator.max_async_level: is 2", &lag),
        ("[trainer]\nmax_async_level = 0\n", "a.toml:10: trainer.max_async_level: is 0", &lag),
        ("[trainer]\nasync_level = 3\n", "a.toml:10: trainer.async_level: is 3", &lag),
        ("max_async_level = 2\n", "a.toml:9: weight_broadcast.max_async_level: is 2", &lag),
        (
            "[trainer.weight_broadcast]\nmax_async_level = 2\n",
            "a.toml:10: trainer.weight_broadcast.max_async_level: is 2",
            &lag,
        ),
        (
            "[orchestrator.weight_broadcast]\nasync_level = 0\n",
            "a.toml:10: orchestrator.weight_broadcast.async_level: is 0",
            &lag,
        ),
    ];
    for (rest, place, parts) in cases {
        let got = errors(&nccl(rest));
        assert!(got.contains(place) && parts.iter().all(|part| got.contains(part)), "{rest}:\n{got}");
    }
    let top = |line: &str| format!("{line}\n{}", nccl(""));
    assert_cases(&[
        ("top-level lag", top("max_async_level = 2"), &["a.toml:1: max_async_level: is 2", "set max_async_level = 1"]),
        ("top-level LoRA", top("lora = { rank = 8 }"), &["a.toml:1: lora: switches LoRA on"]),
        (
            "LoRA of the workers",
            nccl("").replace("[inference]\n", "[inference]\nenable_lora = true\n"),
            &["a.toml:2: inference.enable_lora", "switch LoRA off"],
        ),
        (
            "said by the trainer",
            pd_1_1("[trainer.weight_broadcast]\ntype = \"nccl\"\n[trainer.lora]\nrank = 1\n"),
            &["a.toml:9: trainer.lora", "trainer.weight_broadcast.type = \"nccl\""],
        ),
        (
            "copies that disagree",
            nccl("[trainer.weight_broadcast]\ntype = \"filesystem\"\n"),
            &["a.toml:10: trainer.weight_broadcast.type", "weight_broadcast.type is \"nccl\"", "say the same in both"],
        ),
        (
            "one GPU",
            "inference_gpu_ids = [0]\n[inference]\n[weight_broadcast]\ntype = \"nccl\"\n".to_owned(),
            &["a.toml:4: weight_broadcast.type", "at least 2 GPUs", "have 1", "trainer_gpu_ids"],
        ),
        (
            "the same GPU twice is one",
            "inference_gpu_ids = [0]\ntrainer_gpu_ids = [0]\n[inference]\n[weight_broadcast]\ntype = \"nccl\"\n"
                .to_owned(),
            &["a.toml:5: weight_broadcast.type", "have 1"],
        ),
        (
            "no other way",
            nccl("").replace("nccl", "nixl"),
            &["a.toml:8: weight_broadcast.type", "\"filesystem\", \"nccl\""],
        ),
    ]);
    let fine = [
        nccl("[orchestrator]\nmax_async_level = 1\n[trainer]\nmax_async_level = 1\n"),
        nccl("max_async_level = 1\n"),
        nccl("[trainer.model]\nlora = false\n"),
        nccl("[trainer.weight_broadcast]\ntype = \"nccl\"\nport = 29501\ntimeout = 1200\n"),
        "inference_gpu_ids = [0]\ntrainer_gpu_ids = [1]\n[inference]\n[weight_broadcast]\ntype = \"nccl\"\n".to_owned(),
        pd_1_1(
            "[weight_broadcast]\ntype = \"filesystem\"\n[trainer]\nmax_async_level = 4\n[trainer.model.lora]\nrank=8\n",
        ),
    ];
    for text in fine {
        load_text(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    }
}

#[test]
fn the_links_times_and_paths_make_sense() {
    let kv = |rest: &str| format!("[kv]\n{rest}\n");
    assert_cases(&[
        (
            "a transfer longer than its lease (KV-2)",
            kv("lease_ms = 10_000"),
            &[
                "a.toml:2: kv.lease_ms",
                "may take 20000 ms",
                "for 10000 ms only",
                "set kv.transfer_timeout_ms below kv.lease_ms",
            ],
        ),
        (
            "one lost ping",
            kv("ping_interval_ms = 500"),
            &["a.toml:2: kv.ping_interval_ms", "dead after 1000 ms", "3 times kv.ping_interval_ms"],
        ),
        ("no path", kv("paths = []"), &["a.toml:2: kv.paths", "is empty"]),
        ("a path twice", kv("paths = [\"shm\", \"tcp\", \"shm\"]"), &["a.toml:2: kv.paths", "\"shm\" more than once"]),
        (
            "an unknown path",
            kv("paths = [\"shm\", \"tpc\"]"),
            &["a.toml:2: kv.paths[1]", "\"cuda-ipc\"", "did you mean \"tcp\"?"],
        ),
        ("no time at all", kv("connect_timeout_ms = 0"), &["a.toml:2: kv.connect_timeout_ms", "at least 1"]),
        ("no threads", kv("copy_threads = 0"), &["a.toml:2: kv.copy_threads", "at least 1 and at most 256"]),
        (
            "GPU paths for host memory",
            "[inference]\nengine = \"reference\"\n[kv]\npaths = [\"cuda-ipc\"]\n".to_owned(),
            &["a.toml:4: kv.paths", "host memory", "name \"shm\", \"tcp\" or \"nixl\""],
        ),
    ]);
}

#[test]
fn arguments_that_the_plan_decides_or_everybody_could_read_are_refused_all_at_once() {
    let vllm = "[inference.vllm]\nheadless = true\ndata-parallel-size-local = 2\npipeline_parallel_size = 2\n\
                my_password = \"hidden\"\napi_key = [\"hidden\"]\nhf_token = \"fine\"\nlong_prefill_token_threshold = 4\n\
                [inference.vllm.decode]\ndata_parallel_rank = 1\n[inference.vllm.prefil]\nmax_num_seqs = 4\n";
    let got = errors(vllm);
    for part in [
        "a.toml:2: inference.vllm.headless",
        "a.toml:3: inference.vllm.data_parallel_size_local",
        "a.toml:4: inference.vllm.pipeline_parallel_size",
        "a.toml:5: inference.vllm.my_password: looks like a secret",
        "give it by pd_disagg.prefill_env",
        "a.toml:6: inference.vllm.api_key: must be one text",
        "a.toml:10: inference.vllm.decode.data_parallel_rank",
        "a.toml:11: inference.vllm.prefil",
        "did you mean `inference.vllm.prefill`?",
    ] {
        assert!(got.contains(part), "no {part:?} in\n{got}");
    }
    assert!(got.lines().count() == 7 && !got.contains("hidden"), "{got}");
}

#[test]
fn concurrent_dispatch_needs_our_own_connector_and_put_async() {
    let concurrent = |rest: &str| format!("{}\n[proxy]\ndispatch = \"concurrent\"\n", pd_1_1(rest));
    assert_cases(&[
        ("GET", concurrent("kv_send_type = \"GET\""), &["proxy.dispatch", "GET", "PUT_ASYNC"]),
        ("PUT", concurrent("kv_send_type = \"PUT\""), &["proxy.dispatch", "no KV moves before prefill has ended"]),
        (
            "vLLM's own",
            concurrent("kv_connector = \"NixlConnector\"\nconnector_impl = \"vllm\""),
            &["connector_impl = \"native\""],
        ),
    ]);
    for text in [concurrent(""), concurrent("kv_send_type = \"PUT_ASYNC\"")] {
        load_text(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    }
}

#[test]
fn nccl_alone_is_refused_where_both_roles_share_a_gpu() {
    let shared = |paths: &str| {
        format!(
            "[inference]\ngpu_memory_utilization = 0.4\n[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [0]\n\
             shared_gpus = true\n[kv]\npaths = {paths}\n"
        )
    };
    assert_cases(&[(
        "alone",
        shared("[\"nccl\"]"),
        &["kv.paths: has nccl alone, which refuses two ranks on one GPU, and both roles are on GPU 0", "cuda-ipc"],
    )]);
    let fine = [
        shared("[\"nccl\", \"cuda-ipc\"]"),
        pd_1_1("[kv]\npaths = [\"nccl\"]\n"),
        pd_1_1(""),
        pd_1_1("kv_connector = \"NixlConnector\"\n"),
        pd_1_1("kv_connector = \"NixlConnector\"\nconnector_impl = \"vllm\"\n"),
        pd_1_1("kv_connector = \"NixlConnector\"\n[kv]\npaths = [\"nixl\", \"shm\"]\n"),
    ];
    for text in fine {
        let loaded = load_text(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(lines(&loaded.warnings), "", "{text}");
    }
}

#[test]
fn variables_of_nixl_are_known_ones_without_secrets_said_once() {
    let env = |line: &str| pd_1_1(&format!("[kv.nixl.env]\n{line}\n"));
    assert_cases(&[
        ("another program's", env("LD_PRELOAD = \"x\""), &["a.toml:8: kv.nixl.env.LD_PRELOAD", "prefill_env"]),
        ("a secret", env("NIXL_ETCD_PASSWORD = \"x\""), &["a.toml:8: kv.nixl.env.NIXL_ETCD_PASSWORD", "a secret"]),
        (
            "two values",
            pd_1_1("prefill_env = { UCX_TLS = \"tcp\" }\n[kv.nixl.env]\nUCX_TLS = \"rc,tcp\"\n"),
            &["pd_disagg.prefill_env.UCX_TLS", "\"tcp\" there and \"rc,tcp\"", "one of the two places"],
        ),
    ]);
    load_text(&pd_1_1("decode_env = { UCX_TLS = \"rc,tcp\" }\n[kv.nixl.env]\nUCX_TLS = \"rc,tcp\"\n")).expect("right");
}

#[test]
fn numbers_stay_in_their_range() {
    assert_cases(&[
        (
            "percent",
            "[inference]\ngpu_memory_utilization = 90\n".to_owned(),
            &["a.toml:2", "above 0 and at most 1", "here is 90"],
        ),
        ("zero share", "[inference]\ngpu_memory_utilization = 0.0\n".to_owned(), &["a.toml:2", "above 0"]),
        ("not a number", "[proxy]\nquarantine_s = nan\n".to_owned(), &["a.toml:2: proxy.quarantine_s", "NaN"]),
        ("endless", "[proxy]\nrequest_timeout_s = inf\n".to_owned(), &["a.toml:2: proxy.request_timeout_s", "inf"]),
        ("negative time", "[launcher]\ngrace_s = -1\n".to_owned(), &["a.toml:2: launcher.grace_s", "at least 0"]),
        ("no ranks", "[inference.parallel]\ntp = 0\n".to_owned(), &["a.toml:2: inference.parallel.tp", "at least 1"]),
        ("too many bits", "[kv]\ndigest_sample_every = 4294967296\n".to_owned(), &["a.toml:2: kv.digest_sample_every"]),
        (
            "element size",
            "[inference]\nengine = \"reference\"\n[inference.reference]\ndtype_bytes = 3\n".to_owned(),
            &["a.toml:4", "1, 2 or 4"],
        ),
        (
            "heads and ranks",
            "[inference]\nengine = \"reference\"\n[inference.parallel]\ntp = 3\n".to_owned(),
            &["a.toml:4: inference.parallel.tp", "3 ranks", "one divides the other"],
        ),
        (
            "back-off",
            "[launcher]\nrestart_backoff_s = 60\n".to_owned(),
            &["a.toml:2: launcher.restart_backoff_s", "the longest 30 s", "restart_backoff_max_s at most"],
        ),
        (
            "admin address",
            "[proxy]\nadmin_listen = \"8001\"\n".to_owned(),
            &["a.toml:2: proxy.admin_listen", "must be host:port"],
        ),
        ("empty token", "[proxy]\nadmin_token = \"\"\n".to_owned(), &["a.toml:2: proxy.admin_token", "is empty"]),
        (
            "log filter",
            "[telemetry]\nlog_level = \"pdlink=loud\"\n".to_owned(),
            &["a.toml:2: telemetry.log_level", "info,pdlink"],
        ),
    ]);
}

#[test]
fn arguments_that_pdlink_writes_are_not_passed_on() {
    assert_cases(&[
        (
            "port",
            "[inference.vllm]\nport = 1\n".to_owned(),
            &["a.toml:2: inference.vllm.port", "use pd_disagg.prefill_port"],
        ),
        (
            "ranks of one role",
            "[inference.vllm.prefill]\ntensor-parallel-size = 2\n".to_owned(),
            &["a.toml:2: inference.vllm.prefill.tensor_parallel_size", "use inference.parallel.tp"],
        ),
    ]);
}

#[test]
fn sections_with_defaults_are_accepted_empty() {
    load_text("[weights]\n[hosts]\n").expect("nothing is asked of them");
}

#[test]
fn an_update_of_the_weights_has_times_in_order_and_paths_that_weights_go_by() {
    load_text("[weights]\nstaging = \"none\"\nin_flight = \"finish\"\npaths = [\"tcp\"]\n").expect("all of it can be");
    load_text(&format!("{}[weights]\nstaging = \"device\"\npaths = [\"cuda-ipc\"]\n", pd_1_1("")))
        .expect("all of it can be");
    assert_cases(&[
        (
            "hold",
            "[weights]\npause_timeout_s = 180.0\n".to_owned(),
            &["a.toml:2: weights.pause_timeout_s", "gives an update up after 120 s", "others may take 180 s"],
        ),
        (
            "paths",
            "[weights]\npaths = [\"nixl\"]\n".to_owned(),
            &["a.toml:2: weights.paths", "is [nixl]", "name some of \"nccl\", \"cuda-ipc\", \"shm\", \"tcp\""],
        ),
        (
            "staging on no GPU",
            "[inference]\nengine = \"reference\"\n[weights]\nstaging = \"device\"\n".to_owned(),
            &["a.toml:4: weights.staging", "no worker of this configuration takes weights on a GPU"],
        ),
    ]);
}

#[test]
fn warnings_and_notes_are_told_with_their_place() {
    let loaded = load_text(
        "inference_gpu_ids = [0]\n[inference]\nall2all_backend = \"pplx\"\n[inference.server]\nport = 9\n[inference.parallel]\n\
         dp = 2\n[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\ndecode_all2all_backend = \"naive\"\n\
         [proxy]\nadmin_listen = \"0.0.0.0:8001\"\n",
    )
    .expect("only warnings");
    let warnings = lines(&loaded.warnings);
    for part in [
        "a.toml:3: inference.all2all_backend: is \"pplx\"",
        "a.toml:12: pd_disagg.decode_all2all_backend: is \"naive\"",
        "silently replaces by \"allgather_reducescatter\"",
        "a.toml:7: inference.parallel.dp: is 2",
        "a.toml:14: proxy.admin_listen",
    ] {
        assert!(warnings.contains(part), "no {part:?} in\n{warnings}");
    }
    let notes = lines(&loaded.notes);
    for part in [
        "a.toml:1: inference_gpu_ids: is not used",
        "a.toml:5: inference.server.port: is not used",
        "model.name: is not given",
    ] {
        assert!(notes.contains(part), "no {part:?} in\n{notes}");
    }
}

#[test]
fn roles_that_would_not_understand_each_other_are_warned_of() {
    let two = "[inference]\n[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [1]\n";
    let warnings = |text: &str| lines(&load_text(text).expect("only warnings").warnings);
    let differ = format!(
        "{two}decode_env = {{ VLLM_KV_CACHE_LAYOUT = \"HND\" }}\n[inference.vllm.decode]\nblock_size = 32\nmax_num_seqs = 4\n"
    );
    let told = warnings(&differ);
    assert!(told.contains("a.toml:8: inference.vllm.decode.block_size: differs between the roles"), "{told}");
    assert!(
        told.contains("a.toml:6: pd_disagg.decode_env.VLLM_KV_CACHE_LAYOUT: differs") && !told.contains("max_num_seqs"),
        "{told}"
    );
    assert_eq!(warnings(&format!("{two}[inference.vllm]\nblock_size = 32\n")), "");

    let one =
        "[inference]\n[pd_disagg]\nenabled = true\nshared_gpus = true\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [0]\n";
    assert!(warnings(one).contains("two workers share GPU 0"), "{}", warnings(one));
    assert_eq!(warnings(&one.replace("[inference]", "[inference]\ngpu_memory_utilization = 0.4")), "");
    assert!(errors(&one.replace("shared_gpus = true\n", "")).contains("pd_disagg.shared_gpus = true"));
}

#[test]
fn everything_that_is_wrong_is_told_at_once_and_nothing_follows_from_a_slip() {
    let got = errors(
        "[inference]\nengine = \"vlm\"\n[pd_disagg]\nenabled = true\nprefil_gpu_ids = [0]\ndecode_gpu_ids = [1, 1]\n\
         [kv]\nlease_ms = \"long\"\ntransfer_timeout_ms = 50000\n[prox]\n",
    );
    let lines: Vec<&str> = got.lines().collect();
    let places = [
        "a.toml:2: inference.engine",
        "a.toml:5: pd_disagg.prefil_gpu_ids",
        "a.toml:6: pd_disagg.decode_gpu_ids",
        "a.toml:8: kv.lease_ms",
        "a.toml:10: prox",
    ];
    assert_eq!(lines.len(), places.len(), "a missing list and a short lease are not to be told:\n{got}");
    for (line, place) in lines.iter().zip(places) {
        assert!(line.starts_with(place), "{place}:\n{got}");
    }
}
