//! Files, bases and overrides into one configuration, each value with its place.

#[path = "support/config.rs"]
#[allow(dead_code)]
mod support;

use pdlink::config::{KvConnector, Path, Role};
use support::{Folder, lines, load_text};

#[test]
fn later_files_win_key_by_key_and_lists_are_replaced() {
    let folder = Folder::new(&[
        ("a.toml", "[kv]\nlease_ms = 40000\ntcp_streams = 3\npaths = [\"shm\", \"tcp\"]\n"),
        ("b.toml", "[kv]\nlease_ms = 50000\npaths = [\"tcp\"]\n"),
    ]);
    let loaded = folder.load(&["a.toml", "b.toml"], &[]).expect("loads");
    let kv = &loaded.config.kv;
    assert_eq!((kv.lease_ms, kv.tcp_streams, kv.paths.as_deref()), (50_000, 3, Some(&[Path::Tcp][..])));
    let origin = |key: &str| loaded.origins.get(key).map(ToString::to_string).unwrap_or_default();
    assert!(origin("kv.lease_ms").ends_with("b.toml:2"), "{}", origin("kv.lease_ms"));
    assert!(origin("kv.tcp_streams").ends_with("a.toml:3"), "{}", origin("kv.tcp_streams"));
    assert_eq!(loaded.origins.get("kv.digest"), None, "a default has no origin");
}

#[test]
fn a_file_wins_over_its_bases_which_are_found_beside_it() {
    let folder = Folder::new(&[
        ("sub/top.toml", "toml_files = [\"mid.toml\", \"../far.toml\"]\n[kv]\ntcp_streams = 5\n"),
        (
            "sub/mid.toml",
            "toml_files = [\"../far.toml\"]\n[kv]\nlease_ms = 41000\ninflight_max = 7\n[model]\nname = \"mid\"\n",
        ),
        ("far.toml", "[kv]\nlease_ms = 42000\ntcp_streams = 9\n"),
    ]);
    let loaded = folder.load(&["sub/top.toml"], &[]).expect("loads");
    let kv = &loaded.config.kv;
    // far.toml is a base twice: under mid.toml, which wins over it, and beside mid.toml, where the later base wins.
    assert_eq!((kv.tcp_streams, kv.lease_ms, kv.inflight_max), (5, 42_000, 7));
    assert_eq!(loaded.config.model_name(), "mid");
}

#[test]
fn a_circle_of_files_is_an_error_that_names_the_chain() {
    let folder = Folder::new(&[
        ("a.toml", "\ntoml_files = [\"b.toml\"]\n"),
        ("b.toml", "toml_files = [\n\"c.toml\"]\n"),
        ("c.toml", "toml_files = [\"a.toml\"]\n"),
        ("self.toml", "toml_files = \"self.toml\"\n"),
    ]);
    let text = folder.load(&["a.toml"], &[]).expect_err("a circle").to_string();
    assert!(text.contains("c.toml:1: toml_files: files name each other in a circle"), "{text}");
    let chain = ["a.toml → ", "b.toml → ", "c.toml → ", "a.toml;"];
    let mut rest = text.as_str();
    for link in chain {
        let at = rest.find(link).unwrap_or_else(|| panic!("no {link} in order in {text}"));
        rest = &rest[at + link.len()..];
    }
    assert!(folder.load(&["self.toml"], &[]).is_err());
}

#[test]
fn files_that_cannot_be_read_are_all_told() {
    let folder =
        Folder::new(&[("a.toml", "\ntoml_files = [\"gone.toml\", 5]\n"), ("bad.toml", "a = 1\nb = = 2\n[c\n")]);
    let got = lines(&folder.load(&["a.toml", "bad.toml", "missing.toml"], &[]).expect_err("none is right").findings);
    for part in [
        "a.toml:2: toml_files: cannot read",
        "gone.toml",
        "must be a list of files, and here is 5",
        "bad.toml:2: this is not TOML",
        "bad.toml:3",
        "missing.toml",
    ] {
        assert!(got.contains(part), "no {part:?} in\n{got}");
    }
}

#[test]
fn a_key_given_twice_is_an_error_with_its_line() {
    let error = load_text("[kv]\nlease_ms = 1\nlease_ms = 2\n").expect_err("twice").to_string();
    assert!(error.contains("a.toml:3") && error.contains("duplicate"), "{error}");
}

#[test]
fn overrides_win_and_are_read_as_toml_where_they_can_be() {
    let folder = Folder::new(&[("a.toml", "[inference.model]\nname = \"file\"\n[kv]\nlease_ms = 40000\n")]);
    let loaded = folder
        .load(
            &["a.toml"],
            &[
                "inference.model.name=123",
                "inference.model.enforce-eager",
                "inference.enable-lora=true",
                "kv.paths=[\"tcp\"]",
                "kv.lease-ms=50000",
                "inference.gpu_memory_utilization=1",
                "pd_disagg.decode-env={A-B = \"1\"}",
                "pd_disagg.decode_env.C-D=2",
                "pd_disagg.kv_connector=NixlConnector",
                "inference.vllm.max-num-seqs=64",
                "inference.vllm.prefill.block-size=32",
                "orchestrator.client.headers.X-Key=abc",
                "model.name=\"quoted\"",
            ],
        )
        .expect("loads");
    let config = &loaded.config;
    assert_eq!(config.inference.model.name.as_deref(), Some("123"));
    assert_eq!(config.model.name.as_deref(), Some("quoted"));
    assert!(config.inference.model.enforce_eager && config.inference.enable_lora);
    assert_eq!((config.kv_paths(true), config.kv.lease_ms), (vec![Path::Tcp], 50_000));
    assert!((config.inference.gpu_memory_utilization - 1.0).abs() < f64::EPSILON);
    let env: Vec<(&str, &str)> = config.pd_disagg.decode_env.iter().map(|(name, value)| (&**name, &**value)).collect();
    assert_eq!(env, [("A-B", "1"), ("C-D", "2")]);
    assert_eq!(config.pd_disagg.kv_connector, KvConnector::NixlConnector);
    assert_eq!(config.orchestrator.client.headers["X-Key"], "abc");
    let args = config.inference.vllm.args(Role::Prefill);
    assert_eq!((args["max_num_seqs"].as_i64(), args["block_size"].as_i64()), (Some(64), Some(32)));
    assert!(!config.inference.vllm.args(Role::Decode).contains_key("block_size"));
    assert_eq!(loaded.origins.get("kv.lease_ms").expect("given").to_string(), "command line (--kv.lease-ms 50000)");
}

#[test]
fn the_last_override_of_a_key_wins() {
    let loaded = Folder::new(&[]).load(&[], &["kv.tcp_streams=3", "kv.tcp-streams=4"]).expect("loads");
    assert_eq!(loaded.config.kv.tcp_streams, 4);
}

#[test]
fn wrong_overrides_name_themselves() {
    let cases = [
        ("kv.leas_ms=5", "command line (--kv.leas_ms 5): kv.leas_ms: is unknown in [kv]; did you mean `kv.lease_ms`?"),
        ("kv.lease_ms=soon", "kv.lease_ms: must be a whole number, at least 1, and here is \"soon\" (text)"),
        ("kv.lease_ms", "and here is no value"),
        ("pd_disagg.auto_ports=maybe", "must be true or false"),
        ("pd_disagg.prefill_gpu_ids=0", "must be a list, and here is 0; write a list, as in [1, 2]"),
        ("model.name", "must be text, and here is no value"),
        ("kv..lease_ms=5", "is no dotted name of a setting"),
        ("kw.lease_ms=5", "kw: is unknown at the top; did you mean `kv`?"),
        ("kv.lease_ms.x=5", "kv.lease_ms: must be a whole number"),
    ];
    for (over, want) in cases {
        let error = Folder::new(&[]).load(&[], &[over]).expect_err(over).to_string();
        assert!(error.contains(want), "{over}: no {want:?} in {error}");
    }
}

#[test]
fn names_of_passed_on_arguments_meet_whatever_their_dashes() {
    let folder = Folder::new(&[
        (
            "a.toml",
            "[inference.vllm]\nmax-num-seqs = 1\n\"--block-size\" = 16\n[inference.vllm.decode]\nmax-num-seqs = 2\n",
        ),
        ("b.toml", "[inference.vllm]\nmax_num_seqs = 3\n"),
    ]);
    let vllm = folder.load(&["a.toml", "b.toml"], &[]).expect("loads").config.inference.vllm;
    assert_eq!(vllm.args(Role::Both).keys().collect::<Vec<_>>(), ["block_size", "max_num_seqs"]);
    assert_eq!(vllm.args(Role::Prefill)["max_num_seqs"], 3);
    assert_eq!(vllm.args(Role::Decode)["max_num_seqs"], 2);
}

#[test]
fn secrets_may_come_from_the_environment_and_are_not_shown() {
    let env = |name: &str| match name {
        "PDLINK_ADMIN_TOKEN" => Some("from-environment".to_owned()),
        "PDLINK_SECRET_FILE" => Some("/run/secret".to_owned()),
        _ => None,
    };
    let folder = Folder::new(&[("a.toml", "[proxy]\nadmin_token = \"from-file\"\n")]);
    let loaded = folder.load_with(&[], &[], &env).expect("loads");
    assert_eq!(loaded.config.proxy.admin_token.as_deref(), Some("from-environment"));
    assert_eq!(loaded.config.security.secret_file.as_deref(), Some(std::path::Path::new("/run/secret")));
    assert_eq!(
        loaded.origins.get("proxy.admin_token").expect("given").to_string(),
        "environment variable PDLINK_ADMIN_TOKEN"
    );
    let loaded = folder.load_with(&["a.toml"], &[], &env).expect("loads");
    assert_eq!(loaded.config.proxy.admin_token.as_deref(), Some("from-file"), "what was written down wins");
    let loaded = folder.load(&[], &["proxy.admin_token=sesame"]).expect("loads");
    assert!(!loaded.origins.get("proxy.admin_token").expect("given").to_string().contains("sesame"));
    let error = folder.load(&[], &["proxy.admin_token={a = \"sesame\"}", "kv.x=1"]).expect_err("wrong").to_string();
    assert!(!error.contains("sesame"), "{error}");
}

#[test]
fn answers_that_need_several_sections() {
    let config = |text: &str| load_text(text).unwrap_or_else(|error| panic!("{error}")).config;
    assert_eq!(config("[model]\nname = \"a\"\n[inference.model]\nname = \"b\"\n").model_name(), "b");
    assert_eq!(config("[model]\nname = \"a\"\n").model_name(), "a");
    assert_eq!(config("").host(), "127.0.0.1");
    assert_eq!(config("[inference.server]\nhost = \"h\"\n[pd_disagg]\nhost = \"p\"\n").host(), "h");
    let pd = "[inference.server]\nhost = \"h\"\n[inference.parallel]\ntp = 2\n[pd_disagg]\nenabled = true\nprefill_gpu_ids = [0, 1]\n\
              decode_gpu_ids = [2, 3, 4, 5]\ndecode_tp = 4\nhost = \"p\"\n";
    let pd = config(pd);
    assert_eq!((pd.host(), pd.tp(Role::Prefill), pd.tp(Role::Decode)), ("p", 2, 4));
    assert_eq!((pd.roles(), pd.gpu_ids(Role::Prefill)), (&[Role::Prefill, Role::Decode][..], vec![0, 1]));
    let plain = config("[inference.parallel]\ntp = 2\ndp = 2\n");
    assert_eq!((plain.roles(), plain.gpu_ids(Role::Both)), (&[Role::Both][..], vec![0, 1, 2, 3]));
    let of_nixl = "[pd_disagg]\nkv_connector = \"NixlConnector\"\n";
    let of_host = [Path::Shm, Path::Tcp];
    assert_eq!(config("").kv_paths(false), [Path::CudaIpc, Path::Nccl]);
    assert_eq!(config(of_nixl).kv_paths(false), [Path::Nixl]);
    assert_eq!((config("").kv_paths(true), config(of_nixl).kv_paths(true)), (of_host.to_vec(), of_host.to_vec()));
    assert_eq!(config("[inference]\nengine = \"reference\"\n").kv_paths(false), of_host);
    assert_eq!(config("[kv]\npaths = [\"tcp\"]\n").kv_paths(true), [Path::Tcp]);
}
