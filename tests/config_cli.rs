//! `pdlink config` and the frame of the command line, run as a program.

#[path = "support/config.rs"]
#[allow(dead_code)]
mod support;

use std::process::Command;

use support::Folder;

/// Exit code, stdout and stderr of `pdlink` with these words, run in the folder.
fn pdlink(folder: &Folder, words: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_pdlink"))
        .args(words)
        .current_dir(folder.path(""))
        .env_remove("PDLINK_ADMIN_TOKEN")
        .env_remove("PDLINK_SECRET_FILE")
        .output()
        .expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("is text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn check_says_ok_or_everything_that_is_wrong() {
    let folder = Folder::new(&[
        ("good.toml", "max_steps = 5\n[inference]\n[inference.parallel]\ndp = 2\n"),
        ("bad.toml", "[kv]\nleas_ms = 5\ntcp_streams = 0\n"),
    ]);
    let (code, stdout, stderr) = pdlink(&folder, &["config", "check", "@", "good.toml"]);
    assert_eq!((code, stdout.trim()), (Some(0), "ok"), "{stderr}");
    assert!(stderr.contains("note: good.toml:1: max_steps"), "{stderr}");

    let (code, stdout, stderr) = pdlink(&folder, &["config", "check", "@good.toml", "@", "bad.toml"]);
    assert_eq!((code, stdout.as_str()), (Some(2), ""));
    assert!(
        stderr.contains("error: bad.toml:2: kv.leas_ms: is unknown in [kv]; did you mean `kv.lease_ms`?"),
        "{stderr}"
    );
    assert!(stderr.contains("error: bad.toml:3: kv.tcp_streams"), "{stderr}");
    assert!(!stderr.contains('\u{1b}'), "no colour where there is no terminal: {stderr:?}");
}

#[test]
fn show_is_toml_that_means_the_same_with_origins_on_request() {
    let folder = Folder::new(&[("a.toml", "[kv]\nlease_ms = 40000\n[proxy]\nadmin_token = \"sesame\"\n")]);
    let (code, stdout, stderr) =
        pdlink(&folder, &["config", "show", "--kv.tcp-streams", "4", "@", "a.toml", "--origins", "--kv.digest=every"]);
    assert_eq!(code, Some(0), "{stderr}");
    let line = |start: &str| stdout.lines().find(|line| line.starts_with(start)).unwrap_or_default();
    assert!(line("lease_ms").ends_with("# a.toml:2"), "{stdout}");
    assert!(line("tcp_streams").ends_with("# command line (--kv.tcp-streams 4)"), "{stdout}");
    assert!(line("inflight_max").ends_with("# default"), "{stdout}");
    assert!(!stdout.contains("sesame"), "{stdout}");
    std::fs::write(folder.path("again.toml"), &stdout).expect("writes");
    let (code, again, stderr) = pdlink(&folder, &["config", "show", "@", "again.toml"]);
    assert_eq!(code, Some(0), "{stderr}");
    let table = |text: &str| text.parse::<toml::Table>().expect("is TOML");
    assert_eq!(table(&again), table(&stdout));
}

#[test]
fn schema_is_json_that_describes_every_key() {
    let (code, stdout, _) = pdlink(&Folder::new(&[]), &["config", "schema"]);
    assert_eq!(code, Some(0));
    let schema: serde_json::Value = serde_json::from_str(&stdout).expect("is JSON");
    let sections = schema["properties"].as_object().expect("an object");
    for section in [
        "model",
        "inference",
        "pd_disagg",
        "orchestrator",
        "weight_broadcast",
        "proxy",
        "kv",
        "weights",
        "hosts",
        "security",
        "telemetry",
        "launcher",
    ] {
        assert!(sections.contains_key(section), "no {section}");
    }
    for (name, definition) in schema["$defs"].as_object().expect("an object") {
        for (key, what) in definition["properties"].as_object().into_iter().flatten() {
            assert!(what["description"].is_string(), "{name}.{key} is not described");
        }
    }
}

#[test]
fn a_wrong_command_line_is_code_2_and_names_the_nearest() {
    let folder = Folder::new(&[]);
    let cases: &[(&[&str], &str)] = &[
        (&["config", "show", "--orign"], "--origins"),
        (&["config", "chek"], "check"),
        (&["konfig"], "config"),
        (&["config", "show", "@"], "needs a file"),
        (&["config", "show", "--kv.paths", "--origins"], "kv.paths: must be a list, and here is no value"),
        (&["config", "check", "@", "gone.toml"], "cannot read gone.toml"),
        (&[], "Usage"),
    ];
    for (words, want) in cases {
        let (code, _, stderr) = pdlink(&folder, words);
        assert_eq!(code, Some(2), "{words:?}: {stderr}");
        assert!(stderr.contains(want), "{words:?}: no {want:?} in {stderr}");
    }
}

#[test]
fn help_and_version_are_no_errors() {
    let folder = Folder::new(&[]);
    let (code, stdout, _) = pdlink(&folder, &["--version"]);
    assert_eq!(code, Some(0));
    assert!(stdout.starts_with(concat!("pdlink ", env!("CARGO_PKG_VERSION"), " (")), "{stdout}");
    let (code, stdout, _) = pdlink(&folder, &["config", "--help"]);
    assert_eq!(code, Some(0));
    assert!(stdout.contains("@ FILE") && stdout.contains("--section.key"), "{stdout}");
}

#[test]
fn a_file_without_its_at_is_told_how_to_be_written() {
    let folder = Folder::new(&[("a.toml", "[kv]\n"), ("plain", "[kv]\n")]);
    for (words, file) in [
        (&["config", "check", "a.toml"][..], "a.toml"),
        (&["up", "--dry-run", "nowhere.toml"], "nowhere.toml"),
        (&["up", "plain"], "plain"),
        (&["config", "a.toml"], "a.toml"),
        (&["a.toml"], "a.toml"),
        (&["engine", "--port", "0", "a.toml"], "a.toml"),
    ] {
        let (code, _, stderr) = pdlink(&folder, words);
        assert_eq!(code, Some(2), "{words:?}: {stderr}");
        assert!(stderr.contains(&format!("write `@ {file}`")), "{words:?}: {stderr}");
    }
    let (code, _, stderr) = pdlink(&folder, &["config", "check", "what"]);
    assert!(code == Some(2) && stderr.contains("'what'") && !stderr.contains("write `@"), "{stderr}");
    for words in [&["up"][..], &["proxy"], &["engine"], &["config", "check"], &["config", "show"]] {
        let (_, help, _) = pdlink(&folder, &[words, &["--help"]].concat());
        let usage = help.lines().find(|line| line.starts_with("Usage:")).unwrap_or_default();
        assert!(usage.starts_with(&format!("Usage: pdlink {}", words.join(" "))) && usage.contains("@ FILE"), "{help}");
    }
}
