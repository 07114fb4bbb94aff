//! What is wrong with `[hosts]` is said with the key, the line and the mend.

#[path = "support/config.rs"]
mod config;

use config::{errors, lines, load_text};
use pdlink::config::Role;

const PD: &str = "[inference]\nengine = \"reference\"\n[pd_disagg]\nenabled = true\n";

fn nodes(tables: &[&str]) -> String {
    let table = |text: &&str| format!("[[hosts.nodes]]\n{text}\n");
    format!("{PD}{}", tables.iter().map(table).collect::<String>())
}

const A: &str = "address = \"10.0.0.1\"\nprefill_gpu_ids = [0]";
const B: &str = "address = \"10.0.0.2\"\ndecode_gpu_ids = [0]";

#[test]
fn a_run_on_two_hosts_is_read() {
    let config = load_text(&nodes(&[A, B])).expect("right").config;
    assert_eq!((config.node_count(), config.hosts.address(1)), (2, Some("10.0.0.2")));
    assert_eq!((config.gpu_ids_on(0, Role::Prefill), config.gpu_ids_on(0, Role::Decode)), (vec![0], vec![]));
    assert_eq!(config.gpu_ids(Role::Decode), [0]);
    let text = nodes(&["prefill_gpu_ids = [0]", "decode_gpu_ids = [0]"]);
    let text = text.replacen("[[hosts.nodes]]", "[hosts]\naddresses = [\"a\", \"b\"]\n[[hosts.nodes]]", 1);
    let config = load_text(&text).expect("right").config;
    assert_eq!((config.hosts.address(0), config.hosts.address(1)), (Some("a"), Some("b")));
}

#[test]
fn what_is_wrong_is_named_with_its_mend() {
    let hosts =
        |keys: &str| nodes(&[A, B]).replacen("[[hosts.nodes]]", &format!("[hosts]\n{keys}\n[[hosts.nodes]]"), 1);
    let cases: [(&str, String, &[&str]); 14] = [
        (
            "no address",
            nodes(&["prefill_gpu_ids = [0]", B]),
            &["hosts.nodes[0].address", "is missing: nobody can reach node 0"],
        ),
        ("one address twice", nodes(&[A, A, B]), &["hosts.nodes[1].address", "an earlier node has"]),
        ("loopback", nodes(&["address = \"localhost\"\nprefill_gpu_ids = [0]", B]), &["which no other node can reach"]),
        (
            "a port with it",
            nodes(&["address = \"a b\"\nprefill_gpu_ids = [0]", B]),
            &["must be a host name or an address"],
        ),
        (
            "addresses that do not match",
            hosts("addresses = [\"a\"]"),
            &["a.toml:6: hosts.addresses", "has 1 addresses for 2 nodes"],
        ),
        (
            "lists of one host beside them",
            nodes(&[A, B]).replacen("enabled = true", "enabled = true\nprefill_gpu_ids = [0]", 1),
            &["a.toml:5: pd_disagg.prefill_gpu_ids", "on which node"],
        ),
        (
            "a worker over two nodes",
            nodes(&[A, B]).replacen("enabled = true", "enabled = true\nprefill_tp = 2", 1),
            &["a.toml:8: hosts.nodes[0].prefill_gpu_ids", "a worker's ranks are all on one node"],
        ),
        ("a GPU twice", nodes(&["address = \"a\"\nprefill_gpu_ids = [0, 0]", B]), &["has GPU 0 more than once"]),
        (
            "a GPU of both roles",
            nodes(&["address = \"a\"\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [0]"]),
            &["serves one role"],
        ),
        ("nobody decodes", nodes(&[A]), &["hosts.nodes", "there would be no decode worker"]),
        ("plain GPUs", nodes(&[A, B, "address = \"c\"\ngpu_ids = [0]"]), &["gpu_ids", "pd_disagg.enabled is true"]),
        ("no network", hosts("kv_interface = \"10.0.0.1\""), &["a.toml:6: hosts.kv_interface", "that is one address"]),
        (
            "no way between hosts",
            format!("{}[kv]\npaths = [\"shm\"]\n", nodes(&[A, B])),
            &["kv.paths", "no path between hosts", "tcp"],
        ),
        (
            "a slip",
            hosts("kv_interfaces = \"ib0\""),
            &["a.toml:6: hosts.kv_interfaces", "did you mean `hosts.kv_interface`?"],
        ),
    ];
    for (case, text, parts) in cases {
        let told = errors(&text);
        for part in parts {
            assert!(told.contains(part), "case: {case}: no {part:?} in\n{told}");
        }
    }
    // A GPU id is a node's own: the same on two nodes is two GPUs.
    load_text(&nodes(&[A, "address = \"10.0.0.3\"\nprefill_gpu_ids = [0]", B])).expect("right");
    let shared = nodes(&["address = \"a\"\nprefill_gpu_ids = [0]\ndecode_gpu_ids = [0]"]);
    load_text(&shared.replacen("enabled = true", "enabled = true\nshared_gpus = true", 1)).expect("asked for");
    let unused = load_text("[hosts]\nport = 9\n").expect("right");
    assert!(lines(&unused.notes).contains("hosts.port: is not used"), "{}", lines(&unused.notes));
}

#[test]
fn the_examples_are_right() {
    for name in ["configs/multi_node.toml", "configs/debug/multi_node.toml"] {
        let text = std::fs::read_to_string(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).expect(name);
        let loaded = load_text(&text).unwrap_or_else(|error| panic!("{name}: {}", lines(&error.findings)));
        assert!(loaded.config.hosts.has_several() && loaded.warnings.is_empty(), "{name}: {}", lines(&loaded.warnings));
    }
}
