//! One TOML text into a [`Node`], with the line of every key.

use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::tree::{Node, Value};
use super::{Finding, Origin};

/// Turns byte offsets of one file into lines.
struct Lines {
    path: Arc<Path>,
    /// Byte offset of each line feed, in order.
    breaks: Vec<usize>,
}

impl Lines {
    fn new(path: &Arc<Path>, text: &str) -> Self {
        Self { path: Arc::clone(path), breaks: memchr::memchr_iter(b'\n', text.as_bytes()).collect() }
    }

    fn at(&self, offset: usize) -> Origin {
        let line = self.breaks.partition_point(|&line_feed| line_feed < offset) + 1;
        Origin::File { path: Arc::clone(&self.path), line: u32::try_from(line).unwrap_or(u32::MAX) }
    }
}

/// Reads a file's text. Every syntax error is told, not the first alone.
pub(super) fn parse(path: &Arc<Path>, text: &str) -> Result<Node, Vec<Finding>> {
    let lines = Lines::new(path, text);
    let (table, mut errors) = DeTable::parse_recoverable(text);
    errors.sort_by_key(|error| error.span().map_or(0, |span| span.start));
    let mut findings: Vec<_> = errors.iter().map(|error| syntax_error(&lines, error)).collect();
    findings.dedup();
    if !findings.is_empty() {
        return Err(findings);
    }
    let mut converter = Converter { place: &|span| lines.at(span), findings: Vec::new() };
    let root = converter.table(table.get_ref(), lines.at(0));
    if converter.findings.is_empty() { Ok(root) } else { Err(converter.findings) }
}

/// Reads the value of an override: as TOML if it is TOML, else as the text it is.
pub(super) fn parse_value(text: &str, origin: &Origin) -> Node {
    let mut converter = Converter { place: &|_| origin.clone(), findings: Vec::new() };
    let parsed = DeValue::parse(text.trim()).ok().map(|value| converter.value(value.get_ref(), origin.clone()));
    let mut node = match parsed {
        Some(node) if converter.findings.is_empty() => node,
        _ => Node::new(Value::Text(text.to_owned()), origin.clone()),
    };
    node.typed = Some(text.to_owned());
    node
}

fn syntax_error(lines: &Lines, error: &toml::de::Error) -> Finding {
    Finding {
        key: String::new(),
        origin: Some(lines.at(error.span().map_or(0, |span| span.start))),
        message: format!("this is not TOML: {}", error.message().trim().replace('\n', ", ")),
        mend: None,
    }
}

struct Converter<'a> {
    place: &'a dyn Fn(usize) -> Origin,
    findings: Vec<Finding>,
}

impl Converter<'_> {
    fn table(&mut self, table: &DeTable<'_>, origin: Origin) -> Node {
        let mut node = super::tree::Table::new();
        for (key, value) in table {
            let converted = self.value(value.get_ref(), (self.place)(key.span().start));
            node.insert(key.get_ref().to_string(), converted);
        }
        Node::new(Value::Table(node), origin)
    }

    fn list<'i>(&mut self, items: impl Iterator<Item = &'i Spanned<DeValue<'i>>>, origin: Origin) -> Node {
        let nodes = items.map(|item| self.value(item.get_ref(), (self.place)(item.span().start))).collect();
        Node::new(Value::List(nodes), origin)
    }

    fn value(&mut self, value: &DeValue<'_>, origin: Origin) -> Node {
        let value = match value {
            DeValue::String(text) => Value::Text(text.to_string()),
            DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) => Value::Whole(number),
                Err(_) => return self.out_of_range(&number.to_string(), origin),
            },
            DeValue::Float(number) => match number.as_str().parse() {
                Ok(number) => Value::Number(number),
                Err(_) => return self.out_of_range(number.as_str(), origin),
            },
            DeValue::Boolean(flag) => Value::Bool(*flag),
            DeValue::Datetime(date) => Value::Date(date.to_string()),
            DeValue::Array(items) => return self.list(items.iter(), origin),
            DeValue::Table(table) => return self.table(table, origin),
        };
        Node::new(value, origin)
    }

    fn out_of_range(&mut self, number: &str, origin: Origin) -> Node {
        self.findings.push(Finding {
            key: String::new(),
            origin: Some(origin.clone()),
            message: format!("{number} is no number that fits into 64 bits"),
            mend: None,
        });
        Node::new(Value::Whole(0), origin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_text(text: &str) -> Result<Node, Vec<Finding>> {
        parse(&Arc::from(Path::new("a.toml")), text)
    }

    #[test]
    fn every_value_knows_its_line() {
        let root = parse_text("top = 1\n[a]\n\nb = [\n 1,\n 2]\n[a.c]\nd.e = true\n").expect("parses");
        let line = |path: &str| root.at(path).expect("is there").origin.to_string();
        assert_eq!(line("top"), "a.toml:1");
        assert_eq!(line("a.b"), "a.toml:4");
        assert_eq!(line("a.c.d.e"), "a.toml:8");
        let Value::List(items) = &root.at("a.b").expect("is there").value else { panic!("not a list") };
        assert_eq!(items[1].origin.to_string(), "a.toml:6");
    }

    #[test]
    fn every_syntax_error_is_told_with_its_line() {
        let findings = parse_text("a = \nb = 1\nc = [1,\n").expect_err("must not parse");
        assert_eq!(findings[0].origin.as_ref().expect("has one").to_string(), "a.toml:1");
        assert!(findings.len() >= 2, "{findings:?}");
    }

    #[test]
    fn a_value_is_toml_where_it_can_be_and_text_elsewhere() {
        let origin = Origin::CommandLine("--a.b x".into());
        let json = |text: &str| parse_value(text, &origin).to_json().to_string();
        let cases = [
            ("5", "5"),
            ("-1", "-1"),
            ("0.5", "0.5"),
            ("true", "true"),
            ("[1, 2]", "[1,2]"),
            ("{ a = 1 }", r#"{"a":1}"#),
            ("\"5\"", "\"5\""),
            ("hello", "\"hello\""),
            ("a b", "\"a b\""),
            ("", "\"\""),
            ("Qwen/Qwen3-0.6B", "\"Qwen/Qwen3-0.6B\""),
            ("99999999999999999999", "\"99999999999999999999\""),
            ("[1,", "\"[1,\""),
            ("1\nb = 2", r#""1\nb = 2""#),
        ];
        for (text, want) in cases {
            assert_eq!(json(text), want, "value: {text}");
        }
    }
}
