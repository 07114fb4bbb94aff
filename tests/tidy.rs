//! The shape of the tree, checked by reading it: layers, unsafe code, sizes, invariants that nothing tests.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Where unsafe code may live: libraries that are not ours, bytes shared with other processes, and the few calls to the system
/// that need it.
const UNSAFE_ALLOWED: &[&str] =
    &["src/ffi/", "src/memory/", "src/transport/shm", "src/transport/wire", "src/launcher/os.rs"];

/// Lines past which a file has a second idea in it.
const FILE_LINES_MAX: usize = 600;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file under a folder with this ending, as (path from the root, text).
fn files_under(folder: &str, ending: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == ending) {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().into_owned();
                found.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// Words between backquotes.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// Rows of the table in docs/architecture.md that begins with `head`, cut into cells.
fn table(head: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    let rows = text.lines().skip_while(|line| !line.starts_with(head)).skip(2).take_while(|line| line.starts_with('|'));
    let rows: Vec<Vec<String>> = rows.map(|row| row.split('|').map(|cell| cell.trim().to_owned()).collect()).collect();
    assert!(rows.len() > 10, "the table `{head}` of docs/architecture.md was not found");
    rows
}

/// Module → modules it may use.
fn layers() -> BTreeMap<String, BTreeSet<String>> {
    let rows = table("| Layer |");
    rows.iter().map(|cells| (quoted(&cells[2]).remove(0), quoted(&cells[4]).into_iter().collect())).collect()
}

/// Modules named after `crate::`, groups included.
fn modules_used(text: &str) -> BTreeSet<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut used = BTreeSet::new();
    let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n");
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if !rest.starts_with('{') {
            used.insert(word(rest));
            continue;
        }
        let (mut depth, mut expects_name) = (0, false);
        for (at, c) in rest.char_indices() {
            match c {
                '{' => {
                    depth += 1;
                    expects_name = depth == 1;
                }
                '}' => depth -= 1,
                ',' => expects_name = depth == 1,
                c if expects_name && !c.is_whitespace() => {
                    used.insert(word(&rest[at..]));
                    expects_name = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    used
}

#[test]
fn layers_hold() {
    let layers = layers();
    let mut wrong = Vec::new();
    for (file, text) in files_under("src", "rs") {
        let module = Path::new(&file).components().nth(1).unwrap().as_os_str().to_string_lossy().into_owned();
        if module.ends_with(".rs") {
            continue;
        }
        let Some(allowed) = layers.get(&module) else {
            wrong.push(format!("{file}: module `{module}` has no row in docs/architecture.md"));
            continue;
        };
        for used in modules_used(&text) {
            if layers.contains_key(&used) && used != module && !allowed.contains(&used) {
                wrong.push(format!("{file}: `{module}` may not use `{used}`"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_module_of_the_table_exists() {
    for module in layers().keys() {
        assert!(root().join("src").join(module).join("mod.rs").is_file(), "`{module}` is in the table but not in src/");
    }
}

#[test]
fn every_file_says_what_it_is() {
    for folder in ["src", "tests", "benches"] {
        for (file, text) in files_under(folder, "rs") {
            assert!(text.starts_with("//! "), "{file} does not begin with a module header");
        }
    }
}

#[test]
fn unsafe_code_is_where_it_was_agreed() {
    let is_unsafe = |line: &str| ["unsafe {", "unsafe fn", "unsafe impl"].iter().any(|word| line.contains(word));
    for (file, text) in files_under("src", "rs") {
        let found = text.lines().map(str::trim_start).any(|line| !line.starts_with("//") && is_unsafe(line));
        let allowed = UNSAFE_ALLOWED.iter().any(|allowed| file.starts_with(allowed));
        assert!(!found || allowed, "{file} has unsafe code; it belongs in {UNSAFE_ALLOWED:?}");
    }
}

#[test]
fn fronts_forbid_unsafe_code_where_there_is_none() {
    for module in layers().keys() {
        let prefix = format!("src/{module}/");
        if UNSAFE_ALLOWED.iter().any(|allowed| allowed.starts_with(&prefix)) {
            continue;
        }
        let front = std::fs::read_to_string(root().join(&prefix).join("mod.rs")).unwrap();
        assert!(front.contains("#![forbid(unsafe_code)]"), "{prefix}mod.rs does not forbid unsafe code");
    }
}

#[test]
fn files_have_one_idea() {
    for folder in ["src", "tests", "benches"] {
        for (file, text) in files_under(folder, "rs") {
            let lines = text.lines().count();
            assert!(lines <= FILE_LINES_MAX, "{file} has {lines} lines; look for the second idea inside");
        }
    }
}

#[test]
fn metric_names_live_in_one_file_and_are_used() {
    const HOME: &str = "src/telemetry/names.rs";
    let files = files_under("src", "rs");
    let (_, names) = files.iter().find(|(file, _)| file == HOME).unwrap();
    for (constant, _) in names.lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(':')) {
        let used = files.iter().any(|(file, text)| file != HOME && text.contains(constant));
        assert!(used, "metric name {constant} is used by nothing");
    }
}

#[test]
fn every_invariant_is_named_by_a_test() {
    let others = files_under("tests", "rs").into_iter().filter(|(file, _)| file != "tests/tidy.rs");
    let mut tests: Vec<String> = others.map(|(_, text)| text).collect();
    let inner = files_under("src", "rs")
        .into_iter()
        .filter_map(|(_, text)| Some(text.split_once("#[cfg(test)]")?.1.to_owned()));
    tests.extend(inner);
    let numbers: Vec<String> = table("| Number |").into_iter().map(|cells| cells[1].clone()).collect();
    let is_tested = |number: &String| tests.iter().any(|text| names_invariant(text, number));
    let missing: Vec<&String> = numbers.iter().filter(|number| !is_tested(number)).collect();
    assert!(missing.is_empty(), "no test names {missing:?}");
}

/// Whether `text` has the number, in words (`KV-1`, and not as part of `KV-10`) or in a test's name (`kv_1_…`).
fn names_invariant(text: &str, number: &str) -> bool {
    let in_words =
        text.match_indices(number).any(|(at, _)| !text[at + number.len()..].starts_with(|c: char| c.is_ascii_digit()));
    in_words || text.contains(&format!("fn {}_", number.to_lowercase().replace('-', "_")))
}

#[test]
fn the_readers_of_this_file_read() {
    let text = "use crate::{config::Path, kv::{a, b}, memory};\nlet x = crate::proxy::serve();\n// crate::engine\n";
    assert_eq!(modules_used(text).into_iter().collect::<Vec<_>>(), ["config", "kv", "memory", "proxy"]);
    assert!(names_invariant("KV-1 holds", "KV-1") && !names_invariant("KV-10", "KV-1"));
    assert!(names_invariant("fn kv_1_holds()", "KV-1") && !names_invariant("fn kv_10_holds()", "KV-1"));
}
