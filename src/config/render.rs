//! The effective configuration as TOML, for people and for another run.

use std::fmt::Write as _;

use serde_json::{Map, Value as Json};

use super::load::names::is_secret;
use super::load::tree::join;
use super::{Config, Origins};

/// Shown in the place of a secret.
const HIDDEN: &str = "(hidden)";

/// The whole configuration as TOML, defaults too; settings without a value are left out and secrets are hidden. With
/// `origins`, each line says where its value came from.
pub fn to_toml(config: &Config, origins: Option<&Origins>) -> String {
    let mut page = Page { text: String::new(), origins };
    // Plain data of strings, numbers and string-keyed maps always has a JSON form.
    if let Ok(Json::Object(sections)) = serde_json::to_value(config) {
        page.table("", &sections);
    }
    page.text
}

struct Page<'a> {
    text: String,
    origins: Option<&'a Origins>,
}

impl Page<'_> {
    fn table(&mut self, path: &str, table: &Map<String, Json>) {
        let is_table = |value: &Json| value.is_object();
        for (name, value) in table.iter().filter(|(_, value)| !is_table(value) && !value.is_null()) {
            self.line(&join(path, name), name, value);
        }
        for (name, value) in table {
            let Json::Object(below) = value else { continue };
            let key = join(path, &written(name));
            let has_lines = below.values().any(|value| !is_table(value) && !value.is_null());
            if has_lines || below.is_empty() && self.is_given(&key) {
                let gap = if self.text.is_empty() { "" } else { "\n" };
                let _ = writeln!(self.text, "{gap}[{key}]");
            }
            self.table(&key, below);
        }
    }

    fn line(&mut self, key: &str, name: &str, value: &Json) {
        let shown = if value.is_string() && is_secret(name) { Json::from(HIDDEN) } else { value.clone() };
        let line = format!("{} = {}", written(name), inline(&shown));
        let _ = match self.origins.map(|origins| origins.get(key)) {
            None => writeln!(self.text, "{line}"),
            Some(None) => writeln!(self.text, "{line:<48} # default"),
            // A comment ends with its line.
            Some(Some(origin)) => writeln!(self.text, "{line:<48} # {}", one_line(&origin.to_string())),
        };
    }

    fn is_given(&self, key: &str) -> bool {
        self.origins.is_some_and(|origins| origins.has(key))
    }
}

fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// A key as TOML writes it: bare where it can be.
fn written(name: &str) -> String {
    let bare = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte));
    if bare { name.to_owned() } else { inline(&Json::from(name)) }
}

/// A value on one line.
fn inline(value: &Json) -> String {
    match value {
        Json::Null => "\"\"".to_owned(),
        Json::Bool(flag) => flag.to_string(),
        Json::Number(number) => number.to_string(),
        Json::String(text) => toml::Value::from(text.as_str()).to_string(),
        Json::Array(items) => format!("[{}]", items.iter().map(inline).collect::<Vec<_>>().join(", ")),
        Json::Object(table) => {
            let pairs = table.iter().map(|(name, value)| format!("{} = {}", written(name), inline(value)));
            format!("{{ {} }}", pairs.collect::<Vec<_>>().join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_toml_and_means_the_same() {
        let mut config = Config::default();
        config.pd_disagg.decode_env.insert("ODD NAME".to_owned(), "two\nlines \"quoted\"".to_owned());
        config.inference.kv_transfer_config = Some(serde_json::json!({"a": [1, {"b": 0.5}], "c": {"d": "e"}}));
        let text = to_toml(&config, None);
        let again: Config = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(again, config);
    }

    #[test]
    fn secrets_are_hidden() {
        let mut config = Config::default();
        config.proxy.admin_token = Some("open-sesame".to_owned());
        config.pd_disagg.prefill_env.insert("HF_TOKEN".to_owned(), "open-sesame".to_owned());
        config.security.secret_file = Some("/run/secret".into());
        let text = to_toml(&config, None);
        assert!(!text.contains("open-sesame"), "{text}");
        assert!(text.contains("/run/secret"), "{text}");
        assert!(text.contains("tool_call_parser = \"hermes\""), "{text}");
    }
}
