//! The manual page of all settings, made from the same schema that checks them.

use std::fmt::Write as _;

use serde_json::{Map, Value};

const HEAD: &str = "\
# Configuration

Made by `pdlink config schema --markdown`; a test keeps it equal to the program.

Files compose from left to right (`pdlink up @ a.toml @ b.toml`), a file may name bases with `toml_files = [\"base.toml\"]`
(relative to itself; the file wins, key by key; lists are replaced), and `--section.key value` overrides all of them. Sections of
PRIME-RL's trainer and orchestrator may stay in the file: they are accepted and reported once. Every error names the key, the
file and line, and what to do.
";

/// All sections as Markdown: each key with its type, its default and what it does.
pub fn markdown() -> String {
    let schema = super::schema();
    let mut page = HEAD.to_owned();
    section(&mut page, schema, "", schema);
    page
}

/// One table of keys, then one for each table inside.
fn section(page: &mut String, root: &Value, path: &str, schema: &Value) {
    let Some(properties) = schema["properties"].as_object() else { return };
    let keys: Vec<(&String, &Value)> = properties.iter().filter(|(_, property)| !is_section(root, property)).collect();
    if !path.is_empty() {
        let _ = write!(page, "\n## `[{path}]`\n\n{}\n", text(schema));
    }
    if !keys.is_empty() {
        page.push_str("\n| Key | Type | Default | What it does |\n| --- | --- | --- | --- |\n");
    }
    for (key, property) in keys {
        let default = property.get("default").map_or_else(|| "none".to_owned(), code);
        let _ = writeln!(page, "| `{key}` | {} | {default} | {} |", kind(root, property), text(property));
    }
    for (key, property) in properties {
        if let Some(inner) = table(root, property) {
            let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
            section(page, root, &path, inner);
        } else if let Some(inner) = table(root, &resolve(root, property)["items"]) {
            // A list of tables: in TOML each begins with its name in two pairs of brackets.
            let path = if path.is_empty() { format!("[{key}]") } else { format!("[{path}.{key}]") };
            section(page, root, &path, inner);
        }
    }
}

/// The schema behind a `$ref`, also where the property may be absent.
fn resolve<'a>(root: &'a Value, property: &'a Value) -> &'a Value {
    let choices = property["anyOf"].as_array().into_iter().flatten();
    let reference = std::iter::once(property).chain(choices).find_map(|schema| schema["$ref"].as_str());
    reference.and_then(|reference| root.pointer(reference.trim_start_matches('#'))).unwrap_or(property)
}

fn table<'a>(root: &'a Value, property: &'a Value) -> Option<&'a Value> {
    let schema = resolve(root, property);
    schema["properties"].as_object().is_some_and(|keys| !keys.is_empty()).then_some(schema)
}

fn is_section(root: &Value, property: &Value) -> bool {
    resolve(root, property)["type"] == "object" && table(root, property).is_some()
}

/// The type in words: a plain one, a list, or the values that may be chosen.
fn kind(root: &Value, property: &Value) -> String {
    let schema = resolve(root, property);
    let names = choices(schema);
    if !names.is_empty() {
        return names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    }
    let named = |kind: &str| match kind {
        "array" => format!("list of {}", kind_of_items(root, schema)),
        "object" => "table".to_owned(),
        other => other.to_owned(),
    };
    match &schema["type"] {
        Value::String(kind) => named(kind),
        Value::Array(kinds) => kinds
            .iter()
            .filter_map(Value::as_str)
            .filter(|kind| *kind != "null")
            .map(named)
            .collect::<Vec<_>>()
            .join(" or "),
        _ => "any".to_owned(),
    }
}

fn kind_of_items(root: &Value, schema: &Value) -> String {
    schema.get("items").map_or_else(|| "any".to_owned(), |items| kind(root, items))
}

/// The values of an enumeration, whether or not each has a text of its own.
fn choices(schema: &Value) -> Vec<&str> {
    let plain = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let one_of = schema["oneOf"].as_array().into_iter().flatten();
    let documented = one_of.flat_map(|choice| {
        let listed = choice["enum"].as_array().into_iter().flatten();
        choice["const"].as_str().into_iter().chain(listed.filter_map(Value::as_str))
    });
    plain.chain(documented).collect()
}

fn code(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Object(map) if *map == Map::new() => "empty".to_owned(),
        value => format!("`{value}`"),
    }
}

/// A description on one line, safe inside a table.
fn text(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().replace('\n', " ").replace('|', "\\|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_and_key_has_its_text() {
        let page = markdown();
        for part in [
            "## `[kv]`",
            "## `[inference.server]`",
            "| `lease_ms` | integer | `30000` |",
            "`sampled`",
            "## `[pd_disagg]`",
        ] {
            assert!(page.contains(part), "{part} is missing from\n{page}");
        }
        let bare: Vec<&str> = page.lines().filter(|line| line.ends_with("|  |")).collect();
        assert!(bare.is_empty(), "keys without a text: {bare:#?}");
    }

    #[test]
    fn the_page_in_docs_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md");
        let page = std::fs::read_to_string(path).unwrap();
        assert!(
            page == markdown(),
            "docs/configuration.md is old: run `pdlink config schema --markdown > docs/configuration.md`"
        );
    }
}
