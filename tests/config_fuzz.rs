//! Whatever the files and overrides hold, loading says yes or no: it never panics, and never hangs.

#[path = "support/config.rs"]
#[allow(dead_code)]
mod support;

use proptest::prelude::*;
use support::{Folder, load_text};

/// Keys that mean something somewhere, and a few that mean nothing.
const KEYS: &[&str] = &[
    "a",
    "admin_token",
    "client",
    "decode",
    "decode_env",
    "decode_gpu_ids",
    "elastic",
    "enabled",
    "engine",
    "headers",
    "hosts",
    "inference",
    "inference_gpu_ids",
    "kv",
    "launcher",
    "lease_ms",
    "lora",
    "max_async_level",
    "model",
    "name",
    "orchestrator",
    "parallel",
    "paths",
    "pd_disagg",
    "port",
    "prefill",
    "prefill_gpu_ids",
    "proxy",
    "reference",
    "rope_scaling",
    "server",
    "toml_files",
    "tp",
    "dp",
    "trainer",
    "type",
    "vllm",
    "weight_broadcast",
    "weights",
    "",
    "x.y",
    "ä\u{1b}[31m",
    "auto_ports",
    "kv_connector",
    "decode_kv_port",
    "log_level",
];

fn key() -> impl Strategy<Value = String> {
    proptest::sample::select(KEYS).prop_map(str::to_owned)
}

fn value() -> impl Strategy<Value = toml::Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(toml::Value::from),
        any::<i64>().prop_map(toml::Value::from),
        (-3_i64..70_000).prop_map(toml::Value::from),
        any::<f64>().prop_map(toml::Value::from),
        proptest::sample::select(&["nccl", "reference", "shm", "GET", "", "[1", "🦀", "a\nb"][..])
            .prop_map(toml::Value::from),
        "[ -~]{0,12}".prop_map(toml::Value::from),
        Just(toml::Value::Datetime("1979-05-27T07:32:00Z".parse().expect("a date"))),
    ];
    leaf.prop_recursive(5, 60, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..5).prop_map(toml::Value::Array),
            proptest::collection::btree_map(key(), inner, 0..6)
                .prop_map(|table| toml::Value::Table(table.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_table_is_taken_or_refused(table in proptest::collection::btree_map(key(), value(), 0..10)) {
        let table: toml::Table = table.into_iter().collect();
        let text = toml::to_string(&table).expect("is TOML");
        match load_text(&text) {
            Ok(loaded) => {
                let shown = pdlink::config::to_toml(&loaded.config, Some(&loaded.origins));
                prop_assert!(shown.parse::<toml::Table>().is_ok(), "{}", shown);
            }
            Err(error) => {
                prop_assert!(!error.findings.is_empty() && error.findings.len() <= 51);
                for finding in &error.findings {
                    prop_assert!(!finding.message.is_empty());
                }
            }
        }
    }

    #[test]
    fn any_text_is_taken_or_refused(text in "[\\[\\]{}=.,\"'#\\n a-z0-9_-]{0,200}") {
        let _ = load_text(&text);
    }

    #[test]
    fn any_override_is_taken_or_refused(name in "[a-z_.-]{0,30}", section in key(), value in any::<String>()) {
        let over = format!("{section}.{name}={value}");
        let _ = Folder::new(&[]).load(&[], &[&over]);
    }
}

#[test]
fn depth_and_size_have_bounds() {
    let deep_lists = format!("a = {}{}\n", "[".repeat(100_000), "]".repeat(100_000));
    let deep_tables = format!("[{}]\n", vec!["a"; 100_000].join("."));
    let deep_vllm = format!("[inference.vllm]\n{} = 1\n", vec!["a"; 70].join("."));
    let long_list = format!("[pd_disagg]\nprefill_gpu_ids = [{}]\n", vec!["7"; 50_000].join(","));
    let many_keys = (0..1_000).fold("[kv]\n".to_owned(), |text, number| format!("{text}k{number} = 1\n"));
    for text in [deep_lists, deep_tables, deep_vllm, long_list, many_keys] {
        let _ = load_text(&text);
    }
    let deep_name = vec!["a"; 100_000].join(".");
    let folder = Folder::new(&[]);
    assert!(folder.load(&[], &[&deep_name]).is_err());
    let deep_value = format!("kv.paths={}", "[".repeat(100_000));
    assert!(folder.load(&[], &[&deep_value]).is_err());
}

#[test]
fn bases_that_fan_out_and_meet_again_end() {
    let names: Vec<String> = (0..40).map(|level| format!("f{level}.toml")).collect();
    let texts: Vec<String> = (0..40)
        .map(|level| {
            if level < 39 { format!("toml_files = [\"f{0}.toml\", \"f{0}.toml\"]\n", level + 1) } else { String::new() }
        })
        .collect();
    let files: Vec<(&str, &str)> =
        names.iter().zip(&texts).map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let error = Folder::new(&files).load(&["f0.toml"], &[]).expect_err("too many").to_string();
    assert!(error.contains("more than 32 files in a chain, or 256 in all"), "{error}");
}
