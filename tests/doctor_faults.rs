//! `pdlink doctor` finds each fault of a machine and of a configuration that is put before it, and names it.

#[path = "support/doctor.rs"]
mod support;

use std::net::TcpListener;
use std::process::Command;

use support::{command, diagnose, diagnose_with, python, read, vllm};

const LOCAL: [&str; 2] = ["@", "configs/debug/local.toml"];

/// One node of each role, and `more`; of these groups alone.
fn of<'a>(groups: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    ["--only", groups].iter().chain(&LOCAL).chain(more).copied().collect()
}

fn local<'a>(more: &[&'a str]) -> Vec<&'a str> {
    LOCAL.iter().chain(more).copied().collect()
}

#[test]
fn a_machine_with_nothing_but_the_program_is_well_and_what_is_absent_is_skipped_by_name() {
    let home = tempfile::tempdir().expect("folder");
    let mut bare = command(env!("CARGO_BIN_EXE_pdlink"));
    let found = read(bare.args(["doctor", "--json"]).env_clear().env("HOME", home.path()));
    assert_eq!((found.exit, found.named("fail")), (0, Vec::new()));
    for (group, name, why) in [
        ("libraries", "nixl", "libnixl_capi.so"),
        ("libraries", "ucx-transports", "no NIXL"),
        ("libraries", "nixl-together", "no NIXL"),
        ("libraries", "nixl-restart", "no NIXL"),
        ("configuration", "composes", "no configuration was given"),
        ("links", "nixl", "NIXL cannot be opened"),
        ("deployment", "kv-moved", "--url"),
    ] {
        found.assert(group, name, "skipped", &[why]);
    }
    for path in ["shm", "tcp"] {
        found.assert("links", path, "ok", &["32 MiB right"]);
    }
}

#[test]
fn every_check_has_a_name_a_result_what_was_seen_and_a_line_in_the_manual() {
    let found = diagnose(&local(&[]));
    let manual = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/validation.md")).expect("manual");
    let checks = found.report["checks"].as_array().expect("checks");
    assert!(checks.len() > 30, "{}", checks.len());
    for check in checks {
        let name = check["name"].as_str().expect("a name");
        assert!(manual.contains(&format!("`{name}`")), "docs/validation.md does not tell of {name}");
        let result = check["result"].as_str().expect("a result");
        assert!(["ok", "warn", "fail", "skipped"].contains(&result), "{check:#}");
        assert!(!check["seen"].as_str().expect("seen").is_empty() && check["took_ms"].is_u64(), "{check:#}");
        assert_eq!(check["mend"].is_string(), ["warn", "fail"].contains(&result), "{check:#}");
    }
    let counted: u64 =
        ["ok", "warn", "fail", "skipped"].iter().filter_map(|result| found.report["counts"][result].as_u64()).sum();
    assert_eq!(counted, u64::try_from(checks.len()).expect("few"));
    assert!(found.report["environment"]["command"].as_str().expect("a command").contains("doctor"));
}

#[test]
fn a_wrong_library_path_is_named() {
    let found = diagnose(&of(
        "libraries,links",
        &["--kv.nixl.library", "/nowhere/libnixl_capi.so", "--kv.paths", "[\"nixl\"]"],
    ));
    found.assert("libraries", "nixl", "fail", &["/nowhere/libnixl_capi.so", "kv.nixl.library"]);
    found.assert("links", "nixl", "fail", &["see nixl"]);
    // Also where nothing uses it yet.
    let found = diagnose(&of("libraries", &["--kv.nccl.library", "libc.so.6"]));
    found.assert("libraries", "nccl", "fail", &["kv.nccl.library", "libc.so.6"]);
}

#[test]
fn a_port_in_use_is_named_with_who_has_it() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let port = listener.local_addr().expect("address").port().to_string();
    let fixed = ["--pd_disagg.auto_ports", "false", "--pd_disagg.prefill_port", &port];
    let own = format!("process {}", std::process::id());
    let found = diagnose(&of("machine", &fixed));
    found.assert("machine", "ports", "fail", &[&port, "HTTP port of prefill 0", &own, "pd_disagg.prefill_port"]);
    let searched = diagnose(&of("machine", &["--pd_disagg.prefill_port", &port]));
    searched.assert("machine", "ports", "warn", &[&port, &own, "later ports"]);
}

#[test]
fn a_node_is_asked_for_its_own_share_and_for_the_way_to_the_others() {
    const SCRIPT: &str = "ip link set lo up && ip addr add 10.9.0.2/32 dev lo || exit 99; exec \"$0\" \"$@\"";
    let may = Command::new("unshare").args(["-rn", "sh", "-c", SCRIPT, "true"]).output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: this machine does not let us make a network of our own");
        return;
    }
    let of = |addresses: &str, more: &[&str]| {
        let mut command = command("unshare");
        command.args(["-rn", "sh", "-c", SCRIPT, env!("CARGO_BIN_EXE_pdlink"), "doctor", "--json"]);
        command.args(["--only", "machine,configuration", "@", "configs/debug/multi_node.toml"]);
        read(command.args(["--hosts.addresses", addresses]).args(more))
    };
    let both = of(r#"["10.9.0.1", "10.9.0.2"]"#, &[]);
    both.assert("machine", "host-names", "ok", &["10.9.0.2 is 10.9.0.2", "node 0 is 10.9.0.1"]);
    both.assert("machine", "cores", "ok", &["2 workers with 2 ranks"]);
    both.assert("machine", "ports", "ok", &["free on 10.9.0.2"]);
    both.assert("configuration", "plan", "ok", &["prefill_0, prefill_1, decode_0, decode_1"]);
    let lost = of(r#"["10.9.0.2", "no-such-host.invalid"]"#, &["--node", "0"]);
    lost.assert("machine", "ports", "ok", &["14570"]);
    lost.assert("machine", "host-names", "fail", &["node 1", "no-such-host.invalid", "hosts.nodes[1].address"]);
    let foreign = of(r#"["10.9.0.1", "10.9.0.2"]"#, &["--node", "0"]);
    foreign.assert("machine", "host-names", "fail", &["workers cannot listen", "10.9.0.1"]);
    let nowhere = of(r#"["10.9.0.8", "10.9.0.9"]"#, &[]);
    nowhere.assert("configuration", "plan", "fail", &["which of the 2 nodes", "--node RANK"]);
    let unusable = of(r#"["127.0.0.1", "10.9.0.2"]"#, &[]);
    unusable.assert("configuration", "composes", "fail", &["127.0.0.1", "no other node can reach"]);
    unusable.assert("configuration", "plan", "skipped", &["see composes"]);
}

#[test]
fn a_tiny_dev_shm_is_named() {
    const SCRIPT: &str = "mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 99; exec \"$0\" \"$@\"";
    let may = Command::new("unshare").args(["-rm", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"]).output();
    if !may.is_ok_and(|output| output.status.success()) {
        eprintln!("skipped: this machine does not let us mount in a namespace of our own");
        return;
    }
    let in_namespace = |args: &[&str]| {
        let mut command = command("unshare");
        command.args(["-rm", "sh", "-c", SCRIPT, env!("CARGO_BIN_EXE_pdlink"), "doctor", "--json"]).args(args);
        read(&mut command)
    };
    let found = in_namespace(&of("machine", &["--kv.paths", "[\"nixl\"]"]));
    found.assert("machine", "shared-memory", "fail", &["/dev/shm has 1 MiB", "--shm-size"]);
    // pdlink's own path takes nothing of it.
    let found = in_namespace(&of("machine,links", &[]));
    found.assert("machine", "shared-memory", "warn", &["/dev/shm has 1 MiB"]);
    found.assert("links", "shm", "ok", &["right"]);
}

#[test]
fn block_sizes_that_do_not_fit_are_named() {
    let folder = tempfile::tempdir().expect("folder");
    let model = r#"{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}"#;
    std::fs::write(folder.path().join("config.json"), model).expect("write");
    let sized = |release: &str, decode: &str| {
        let program = vllm(folder.path(), release);
        let name = folder.path().to_str().expect("UTF-8");
        diagnose(&[
            "@",
            "configs/debug/vllm_cpu.toml",
            "--launcher.vllm_program",
            &program,
            "--inference.model.name",
            name,
            "--only",
            "configuration",
            "--inference.vllm.prefill.block_size",
            "16",
            "--inference.vllm.decode.block_size",
            decode,
        ])
    };
    sized("0.33.0+cpu", "32").assert(
        "configuration",
        "geometry",
        "fail",
        &["packed planes", "16 at prefill, 32 at decode"],
    );
    let uneven = sized("0.33.0", "24");
    uneven.assert("configuration", "geometry", "fail", &["the block size is 16 at prefill and 24 at decode"]);
    let fits = sized("0.33.0+cpu", "16");
    fits.assert("configuration", "geometry", "ok", &["4 layers of 2 KV heads of 16", "blocks of 16 tokens"]);
}

#[test]
fn a_corrupted_byte_on_the_wire_is_found() {
    for path in ["shm", "tcp"] {
        let found = diagnose(&of("links", &["--corrupt", path]));
        found.assert("links", path, "fail", &[path, "brought wrong bytes", "kv.paths"]);
        let other = if path == "shm" { "tcp" } else { "shm" };
        found.assert("links", other, "ok", &["right"]);
    }
}

#[test]
fn what_is_wrong_with_a_configuration_fails_and_a_wrong_flag_is_wrong_usage() {
    let found = diagnose(&of("configuration", &["--kv.lease_ms", "1"]));
    found.assert("configuration", "composes", "fail", &["kv.transfer_timeout_ms", "kv.lease_ms"]);
    let found = diagnose(&of("machine", &["--pd_disagg.host", "host.invalid"]));
    found.assert("machine", "host-names", "fail", &["host.invalid"]);
    let wrong = command(env!("CARGO_BIN_EXE_pdlink")).args(["doctor", "--bogus"]).output().expect("run pdlink");
    assert_eq!(wrong.status.code(), Some(2));
    let wrong =
        command(env!("CARGO_BIN_EXE_pdlink")).args(["doctor", "--url", "nowhere"]).output().expect("run pdlink");
    assert_eq!(wrong.status.code(), Some(2));
}

#[test]
fn a_vllm_that_is_not_there_or_is_too_old_is_named() {
    let with = |program: &str| {
        let vllm = ["@", "configs/debug/vllm_cpu.toml", "--launcher.vllm_program", program];
        diagnose(&[&["--only", "configuration"], &vllm[..]].concat())
    };
    with("/nowhere/vllm").assert("configuration", "vllm", "fail", &["/nowhere/vllm"]);
    let folder = tempfile::tempdir().expect("folder");
    with(&vllm(folder.path(), "0.19.0")).assert("configuration", "plan", "fail", &["0.19"]);
}

#[test]
fn a_connector_that_vllm_cannot_use_is_named_with_what_python_says() {
    let folder = tempfile::tempdir().expect("folder");
    let with = |connector: &str| {
        let program = python(folder.path(), "0.33.0+cpu", connector);
        diagnose(&["--only", "configuration", "@", "configs/debug/vllm_cpu.toml", "--launcher.vllm_program", &program])
    };
    let found = with("echo 'ImportError: no such symbol' >&2; exit 1");
    found.assert("configuration", "connector", "fail", &["ImportError: no such symbol", "--force-reinstall"]);
    let found = with("echo pdlink-connector pdlink.vllm.NixlConnector");
    found.assert("configuration", "connector", "ok", &["pdlink.vllm.NixlConnector"]);
}

#[test]
fn a_list_of_transports_that_leaves_out_tcp_or_leaves_nothing_else_is_named() {
    let nixl = ["--kv.paths", "[\"nixl\"]"];
    let with = |value: &str| {
        let setting = format!("--kv.nixl.env.UCX_TLS={value}");
        diagnose(&of("libraries", &[nixl[0], nixl[1], &setting]))
    };
    with("rc,sm").assert("libraries", "ucx-tls", "fail", &["kv.nixl.env.UCX_TLS is \"rc,sm\"", "tcp is left out"]);
    with("tcp").assert("libraries", "ucx-tls", "warn", &["only sockets are left"]);
    with("sm,tcp").assert("libraries", "ucx-tls", "ok", &["sm,tcp"]);
    let inherited = diagnose_with(&of("libraries", &nixl), &[("UCX_TLS", "^tcp")]);
    inherited.assert("libraries", "ucx-tls", "fail", &["in this environment", "tcp is left out"]);
}

#[test]
fn a_person_reads_it_without_colour() {
    let mut plain = command(env!("CARGO_BIN_EXE_pdlink"));
    let output = plain.args(["doctor"]).args(LOCAL).output().expect("run pdlink");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    for part in [
        "\nmachine\n",
        "\nlibraries\n",
        "\nconfiguration\n",
        "\nlinks\n",
        "\ndeployment\n",
        "  ok       shm",
        "skipped, in ",
    ] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    assert!(!text.contains('\u{1b}') && text.lines().skip(1).all(|line| line.chars().count() <= 130), "{text}");
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}
