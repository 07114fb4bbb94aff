//! JSON values as YAML: blocks for people, every text quoted as JSON quotes it, long texts as they are.
//!
//! JSON's quoted strings are YAML's, so nothing is guessed about which bare words YAML would take for numbers or truths.

use serde_json::Value;

/// One document.
pub(super) fn document(value: &Value) -> String {
    let mut text = String::from("---\n");
    block(value, 0, &mut text);
    text
}

fn block(value: &Value, depth: usize, out: &mut String) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                out.push_str(&format!("{indent}{}:", key(name)));
                after(value, depth, out);
            }
        }
        Value::Array(items) => {
            for item in items {
                let is_block = item.as_object().is_some_and(|fields| !fields.is_empty())
                    || item.as_array().is_some_and(|items| !items.is_empty());
                // What is in an item stands two columns further in, the first of it behind the dash.
                let mut inner = String::new();
                if is_block {
                    block(item, depth + 1, &mut inner);
                } else {
                    inner = format!("{item}\n");
                }
                out.push_str(&format!("{indent}- {}", inner.trim_start()));
            }
        }
        scalar => out.push_str(&format!("{indent}{scalar}\n")),
    }
}

/// A value behind its name.
fn after(value: &Value, depth: usize, out: &mut String) {
    match value {
        Value::Object(fields) if fields.is_empty() => out.push_str(" {}\n"),
        Value::Array(items) if items.is_empty() => out.push_str(" []\n"),
        Value::Object(_) | Value::Array(_) => {
            out.push('\n');
            block(value, depth + 1, out);
        }
        Value::String(text) if is_long(text) => {
            out.push_str(" |\n");
            let indent = "  ".repeat(depth + 1);
            for line in text.lines() {
                out.push_str(if line.is_empty() { "" } else { &indent });
                out.push_str(line);
                out.push('\n');
            }
        }
        scalar => out.push_str(&format!(" {scalar}\n")),
    }
}

/// Lines that a literal block keeps as they are.
fn is_long(text: &str) -> bool {
    let tame = |line: &str| line.trim_end() == line && !line.chars().any(|c| c.is_control());
    text.ends_with('\n') && !text.ends_with("\n\n") && !text.starts_with([' ', '\n']) && text.lines().all(tame)
}

fn key(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let starts = name.starts_with(|c: char| c.is_ascii_alphabetic());
    let is_word = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"].contains(&name.to_lowercase().as_str());
    if starts && !is_word && name.chars().all(plain) { name.to_owned() } else { Value::from(name).to_string() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_become_blocks() {
        let value = json!({
            "name": "a: b", "on": true, "n": 3, "list": [{"x": 1, "y": [1, 2]}, "no", []], "empty": {},
            "text": "[a]\n\nb = \"c\"\n", "odd": " a\n",
        });
        let want = "---\nname: \"a: b\"\n\"on\": true\n\"n\": 3\nlist:\n  - x: 1\n    \"y\":\n      - 1\n      - 2\n  - \"no\"\n  - []\n\
                    empty: {}\ntext: |\n  [a]\n\n  b = \"c\"\nodd: \" a\\n\"\n";
        assert_eq!(document(&value), want);
    }
}
