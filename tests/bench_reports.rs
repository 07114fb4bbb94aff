//! Reports of `pdlink bench`: written, read back, compared, and measured between two hosts, over loopback.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use serde_json::{Value, json};

fn pdlink(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
    command.args(args).env_remove("PDLINK_SECRET_FILE").env_remove("PDLINK_ADMIN_TOKEN").stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> (Output, String) {
    let output = pdlink(args).output().expect("run pdlink");
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output, said)
}

fn path(file: &Path) -> &str {
    file.to_str().expect("UTF-8")
}

/// A small link report, and the file that it is in.
fn link_report(folder: &Path, more: &[&str]) -> (PathBuf, Value) {
    let file = folder.join("link.json");
    let small = ["--path", "shm", "--bytes", "64K,256K", "--run-bytes", "64K", "--seconds", "0.01", "--threads", "2"];
    let (output, said) = run(&[&["bench", "link"][..], &small, more, &["--json", path(&file)]].concat());
    assert!(output.status.success(), "{said}");
    let report = serde_json::from_str(&std::fs::read_to_string(&file).expect("a report")).expect("JSON");
    (file, report)
}

/// The same report with the figures of every row multiplied.
fn scaled(report: &Value, factor: f64) -> Value {
    let mut report = report.clone();
    for row in report["levels"][0]["rows"].as_array_mut().expect("rows") {
        for (name, value) in row["gigabytes_per_second"].as_object_mut().expect("a spread") {
            if name != "count" {
                *value = json!(value.as_f64().expect("a number") * factor);
            }
        }
    }
    report
}

/// The same report with every figure free of noise.
fn steady(report: &Value) -> Value {
    let mut report = report.clone();
    let level = &mut report["levels"][0];
    for (list, name) in [("rows", "gigabytes_per_second"), ("latency", "microseconds")] {
        for row in level[list].as_array_mut().expect("rows") {
            let median = row[name]["median"].clone();
            for (part, value) in row[name].as_object_mut().expect("a spread") {
                *value = if part == "count" { json!(9) } else { median.clone() };
            }
        }
    }
    report
}

#[test]
fn a_report_is_complete_and_its_schema_names_all_of_it() {
    let folder = tempfile::tempdir().expect("folder");
    let (_, report) = link_report(folder.path(), &["--way", "pull,push,both", "--at-once", "1,2"]);
    assert_eq!(report["pdlink_bench"], 1);
    let environment = &report["environment"];
    assert!(
        environment["command"].as_str().expect("text").starts_with("pdlink bench link --path shm"),
        "{environment:#}"
    );
    assert!(environment["cores"].as_u64() > Some(0) && environment["memory_bytes"].as_u64() > Some(0));
    let level = &report["levels"][0];
    assert_eq!((&level["level"], level["rows"].as_array().map(Vec::len)), (&json!("link"), Some(12)), "{level:#}");
    for row in level["rows"].as_array().expect("rows") {
        let spread = &row["gigabytes_per_second"];
        let at = |name: &str| spread[name].as_f64().expect("a number");
        assert!(at("count") >= 5.0 && at("min") <= at("p25") && at("p25") <= at("median"), "{row:#}");
        assert!(at("median") <= at("p75") && at("p75") <= at("max") && row["share_of_ceiling"].as_f64() > Some(0.0));
    }
    let (output, said) = run(&["bench", "schema"]);
    assert!(output.status.success(), "{said}");
    let schema: Value = serde_json::from_str(&said).expect("JSON");
    for name in report.as_object().expect("an object").keys() {
        assert!(!schema["properties"][name].is_null(), "{name} is not in {schema:#}");
    }
    for name in level["rows"][0].as_object().expect("a row").keys() {
        assert!(said.contains(&format!("\"{name}\"")), "{name} is not in the schema");
    }
}

#[test]
fn a_page_holds_everything_itself_and_is_the_same_from_the_file() {
    let folder = tempfile::tempdir().expect("folder");
    let (page, again) = (folder.path().join("page.html"), folder.path().join("again.html"));
    let (file, _) = link_report(folder.path(), &["--html", path(&page)]);
    let text = std::fs::read_to_string(&page).expect("a page");
    for elsewhere in ["<script", "<link", "<img", "<iframe", "src=", "@import", "url(", "href=\"http", "href=\"//"] {
        assert!(!text.contains(elsewhere), "{elsewhere} is in the page");
    }
    for part in
        ["<svg", "role=\"img\"", "<table", "scope=\"col\"", "prefers-color-scheme: dark", "@media print", "lang=\"en\""]
    {
        assert!(text.contains(part), "{part} is not in the page");
    }
    // Every plot has its name, and every link of the page a target.
    for id in text.split("aria-labelledby=\"").skip(1).chain(text.split("href=\"#").skip(1)) {
        let id = id.split('"').next().expect("an end");
        assert!(text.contains(&format!("id=\"{id}\"")), "{id} is nowhere");
    }
    let (output, said) = run(&["bench", "render", path(&file), "--html", path(&again)]);
    assert!(output.status.success(), "{said}");
    assert_eq!(std::fs::read_to_string(&again).expect("a page"), text);
}

#[test]
fn compare_ends_with_1_where_something_got_slower_and_never_for_noise() {
    let folder = tempfile::tempdir().expect("folder");
    let (_, measured) = link_report(folder.path(), &[]);
    let report = steady(&measured);
    let write = |name: &str, report: &Value| {
        let file = folder.path().join(name);
        std::fs::write(&file, report.to_string()).expect("write");
        file
    };
    let compare = |before: &Path, after: &Path, more: &[&str]| {
        let (output, said) = run(&[&["bench", "compare", path(before), path(after)][..], more].concat());
        (output.status.code(), said)
    };
    let before = write("before", &report);
    let (slow, fast) = (write("slow", &scaled(&report, 0.7)), write("fast", &scaled(&report, 1.5)));
    let (code, said) = compare(&before, &before, &[]);
    assert!(code == Some(0) && said.contains("0 slower, 0 faster"), "{said}");
    let (code, said) = compare(&before, &slow, &[]);
    assert!(code == Some(1) && said.contains("slower") && said.contains("-30.0 %"), "{said}");
    let (code, said) = compare(&before, &fast, &[]);
    assert!(code == Some(0) && said.contains("2 faster"), "{said}");
    assert_eq!(compare(&before, &slow, &["--tolerance", "40"]).0, Some(0), "within the tolerance");
    assert_eq!(compare(&before, &slow, &["--again", path(&slow)]).0, Some(0), "two runs of one build differ as much");

    let mut less = report.clone();
    less["levels"][0]["rows"].as_array_mut().expect("rows").pop();
    let less = write("less", &less);
    let (code, said) = compare(&before, &less, &[]);
    assert!(code == Some(0) && said.contains("not measured any more: 1"), "{said}");
    assert_eq!(compare(&before, &less, &["--all-figures"]).0, Some(1));
    let (code, said) = compare(&before, &write("old", &json!({"pdlink_bench": 0})), &[]);
    assert!(code == Some(2) && said.contains("version 0"), "{said}");
}

#[test]
fn ranks_of_either_side_may_differ_and_every_byte_is_compared() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("kv.json");
    for (shape, layout, prefill, decode) in
        [("small", "split-kv", "2", "4"), ("small", "token-major", "4", "1"), ("deepseek-v3-mla", "split-kv", "2", "1")]
    {
        let tp = ["--prefill-tp", prefill, "--decode-tp", decode, "--shape", shape, "--layout", layout];
        let small = ["--tokens", "40", "--seconds", "0.01", "--threads", "1", "--json", path(&file)];
        let (output, said) = run(&[&["bench", "kv"][..], &tp, &small].concat());
        assert!(output.status.success(), "{shape} {prefill} to {decode}: {said}");
        let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).expect("a report")).expect("JSON");
        assert_eq!(report["levels"][0]["rows"].as_array().map(Vec::len), Some(4), "{report:#}");
    }
    let (output, said) = run(&["bench", "kv", "--shape", "small", "--decode-tp", "3"]);
    assert!(!output.status.success() && said.contains("cannot be spread over 3 ranks"), "{said}");
}

#[test]
fn requests_at_once_are_compared_with_as_many_at_once_alone() {
    let folder = tempfile::tempdir().expect("folder");
    let measured = |name: &str, at_once: &str, more: &[&str]| {
        let file = folder.path().join(name);
        let small = ["--shape", "small", "--tokens", "40", "--seconds", "0.01", "--threads", "1", "--at-once", at_once];
        let (output, said) = run(&[&["bench", "kv"][..], &small, more, &["--json", path(&file)]].concat());
        assert!(output.status.success(), "{name}: {said}");
        let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).expect("a report")).expect("JSON");
        (file, report)
    };
    let page = folder.path().join("page.html");
    let (several, report) = measured(
        "several",
        "1,3",
        &["--prefill-tp", "2", "--digest", "--path", "shm", "--path", "tcp", "--html", path(&page)],
    );
    let rows = report["levels"][0]["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 16, "two paths, two send types, two kinds of blocks, alone and three: {report:#}");
    for row in rows {
        let (at_once, rounds) = (row["at_once"].as_u64(), row["gigabytes_per_second"]["count"].as_u64());
        assert!(at_once == Some(1) || at_once == Some(3), "{row:#}");
        assert!(rounds >= Some(5), "{row:#}");
        for each in ["fetch_us", "whole_us"] {
            assert_eq!(row[each]["count"].as_u64(), rounds.zip(at_once).map(|(one, other)| one * other), "{row:#}");
        }
    }
    let text = std::fs::read_to_string(&page).expect("a page");
    assert!(text.contains("Bandwidth of requests at once") && text.contains("Time of each fetch of requests at once"));

    let (alone, report) = measured("alone", "1", &["--prefill-tp", "2", "--digest"]);
    let (_, said) = run(&["bench", "compare", path(&several), path(&alone)]);
    // Of each line the fetch, the whole, and of several their bandwidth: 4 of `shm` alone are in both.
    assert!(said.contains("8 figures: "), "{said}");
    assert!(said.contains("not measured any more: 32 figures"), "{said}");

    let mut old = report;
    for row in old["levels"][0]["rows"].as_array_mut().expect("rows") {
        row.as_object_mut().expect("a row").remove("at_once");
    }
    let before = folder.path().join("before");
    std::fs::write(&before, old.to_string()).expect("write");
    let (output, said) = run(&["bench", "compare", path(&before), path(&alone)]);
    assert!(output.status.success() && said.contains("8 figures: 0 slower, 0 faster, 0 unsure"), "{said}");
}

/// The other host; ended when dropped.
struct Listener {
    child: Child,
    address: String,
}

impl Listener {
    fn start(secret: &Path) -> Self {
        let args = ["bench", "link", "--listen", "127.0.0.1:0", "--secret-file", path(secret)];
        let mut child = pdlink(&args).stdout(Stdio::piped()).spawn().expect("start the listener");
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("stdout")).read_line(&mut line).expect("a line");
        let address = line.split([' ', ':']).skip(2).take(2).collect::<Vec<_>>().join(":");
        Self { child, address }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn secret(folder: &Path, name: &str) -> PathBuf {
    use std::os::unix::fs::OpenOptionsExt;
    let file = folder.join(name);
    let mut options = std::fs::OpenOptions::new();
    let mut open = options.write(true).create_new(true).mode(0o600).open(&file).expect("a file");
    std::io::Write::write_all(&mut open, name.repeat(64).as_bytes()).expect("write");
    file
}

#[test]
fn two_hosts_measure_link_and_kv_and_a_stranger_is_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let (ours, other) = (secret(folder.path(), "a"), secret(folder.path(), "b"));
    let listener = Listener::start(&ours);
    let file = folder.path().join("hosts.json");
    let connect = |level: &str, secret: &Path, more: &[&str]| {
        let to = ["bench", level, "--connect", &listener.address, "--secret-file", path(secret)];
        run(&[&to[..], &["--seconds", "0.01", "--threads", "2", "--json", path(&file)], more].concat())
    };
    let small = ["--bytes", "256K", "--run-bytes", "16K", "--way", "pull,both"];
    let (output, said) = connect("link", &other, &small);
    assert!(!output.status.success() && said.contains("another secret"), "{said}");
    let (output, said) = connect("link", &ours, &small);
    assert!(output.status.success(), "{said}");
    let read = || -> Value { serde_json::from_str(&std::fs::read_to_string(&file).expect("a report")).expect("JSON") };
    let report = read();
    let level = &report["levels"][0];
    assert_eq!((&level["other_host"], &level["rows"][0]["path"]), (&json!(listener.address), &json!("tcp")));
    assert_eq!(level["rows"].as_array().map(Vec::len), Some(2));
    let (output, said) =
        connect("kv", &ours, &["--shape", "small", "--tokens", "64", "--prefill-tp", "2", "--at-once", "4"]);
    assert!(output.status.success(), "{said}");
    assert_eq!(read()["levels"][0]["other_host"], json!(listener.address));
    let (output, said) = connect("raw", &ours, &["--bytes", "64K"]);
    assert!(output.status.success(), "{said}");
    assert_eq!(
        (&read()["levels"][0]["rows"][0]["means"], read()["levels"][0]["rows"].as_array().map(Vec::len)),
        (&json!("sockets"), Some(4))
    );
    let (output, said) = connect("link", &ours, &["--path", "cuda-ipc", "--bytes", "64K"]);
    assert!(!output.status.success() && said.contains("cuda-ipc (pull)"), "it says which path failed: {said}");
}

#[test]
fn one_run_gives_every_level_that_was_asked_for_and_names_the_rest() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("all.json");
    let args =
        ["bench", "--quick", "--seconds", "0.01", "--only", "raw,kv", "--shape", "small,one-run", "--tokens", "32"];
    let (output, said) = run(&[&args[..], &["--json", path(&file)]].concat());
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).expect("a report")).expect("JSON");
    let levels: Vec<&str> =
        report["levels"].as_array().expect("levels").iter().filter_map(|l| l["level"].as_str()).collect();
    assert_eq!(levels, ["raw", "kv", "kv"], "one for each shape");
    let skipped: Vec<&str> =
        report["skipped"].as_array().expect("skipped").iter().filter_map(|skipped| skipped["what"].as_str()).collect();
    for level in ["link", "serve", "weights", "proxy"] {
        assert!(skipped.contains(&level), "{level} is not among {skipped:?}");
    }
    let means = |row: &Value| row["means"].as_str().expect("a name").to_owned();
    let rows = report["levels"][0]["rows"].as_array().expect("rows");
    assert!(rows.iter().any(|row| means(row) == "memcpy") && rows.iter().any(|row| means(row) == "sockets"));
    assert!(rows.iter().all(|row| row["gigabytes_per_second"]["median"].as_f64() > Some(0.0)));
}

#[test]
fn weights_are_pushed_into_a_fleet_that_serves() {
    let folder = tempfile::tempdir().expect("folder");
    let file = folder.path().join("weights.json");
    let args = ["bench", "weights", "--bytes", "1M", "--tensors", "3", "--pushes", "2", "--clients", "1"];
    let (output, said) = run(&[&args[..], &["--threads", "1", "--json", path(&file)]].concat());
    assert!(output.status.success(), "{said}");
    let report: Value = serde_json::from_str(&std::fs::read_to_string(&file).expect("a report")).expect("JSON");
    let row = &report["levels"][0]["rows"][0];
    assert_eq!((&row["workers"], &row["tensors"], &row["lost"]), (&json!(2), &json!(3), &json!(0)), "{row:#}");
    for name in ["gigabytes_per_second", "ceiling_gigabytes_per_second", "staging_ms", "paused_ms", "whole_ms"] {
        assert_eq!(row[name]["count"], 2, "{name}: {row:#}");
        assert!(row[name]["median"].as_f64() > Some(0.0), "{name}: {row:#}");
    }
    assert!(row["longest_gap_ms"]["median"].as_f64() > Some(0.0), "clients streamed meanwhile: {row:#}");
}
