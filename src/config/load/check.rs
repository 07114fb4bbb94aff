//! Every value against what its setting must be: all that is wrong, told at once.

use serde_json::Value as Json;

use super::names::{is_slip, nearest};
use super::schema::{Kind, Others, Shape};
use super::tree::{Node, Value, join};
use super::{Finding, prime_rl};

/// What a look at all values found.
#[derive(Debug, Default)]
pub(super) struct Checked {
    pub(super) errors: Vec<Finding>,
    /// Paths that cannot be built into the configuration: wrong ones, and ones that are not ours.
    pub(super) drop: Vec<Vec<String>>,
    /// Keys whose value is not to be trusted because of an error: the wrong ones, and those a misspelt one stood for.
    pub(super) tainted: Vec<String>,
    /// PRIME-RL's own keys, dotted.
    pub(super) prime_rl: Vec<String>,
    /// Other keys that are nobody's we know.
    pub(super) unknown: Vec<Finding>,
}

/// Checks the whole tree.
pub(super) fn check(root: &mut Node, document: &Json) -> Checked {
    let mut walk = Walk { path: Vec::new(), found: Checked::default() };
    walk.value(root, Shape::root(document));
    walk.found
}

struct Walk {
    path: Vec<String>,
    found: Checked,
}

impl Walk {
    fn value(&mut self, node: &mut Node, shape: Shape<'_>) {
        let kind = shape.kind();
        read_as_typed(node, &kind);
        match (&mut node.value, kind) {
            (_, Kind::Any) | (Value::Text(_), Kind::Text) | (Value::Bool(_), Kind::Bool) => {}
            (Value::Table(_), Kind::Table) => self.table(node, shape),
            (Value::List(items), Kind::List(each)) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.path.push(format!("[{index}]"));
                    self.value(item, each);
                    self.path.pop();
                }
            }
            (Value::Text(text), Kind::Word(words)) if words.contains(&text.as_str()) => {}
            #[expect(clippy::cast_precision_loss, reason = "bounds are far below 2^53, or the whole range of the type")]
            (Value::Whole(number), Kind::Whole(bounds) | Kind::Number(bounds)) if bounds.allow(*number as f64) => {}
            (Value::Number(number), Kind::Number(bounds)) if bounds.allow(*number) => {}
            (value, kind) => {
                let (message, mend) = mismatch(value, &kind);
                self.refuse(node, message, mend);
            }
        }
    }

    fn table(&mut self, node: &mut Node, shape: Shape<'_>) {
        let Value::Table(table) = &mut node.value else { return };
        for (name, child) in table {
            self.path.push(name.clone());
            match (shape.key(name), shape.others()) {
                (Some(shape), _) => self.value(child, shape),
                (None, Others::Each(shape)) => self.value(child, shape),
                (None, Others::Free) => {}
                (None, Others::PrimeRl) => self.shared(child, name, shape),
                (None, Others::Refused) => self.unknown(child, name, shape),
            }
            self.path.pop();
        }
    }

    /// A key in a table that PRIME-RL reads too: its own, or ours misspelt.
    fn shared(&mut self, node: &Node, name: &str, shape: Shape<'_>) {
        let known = prime_rl::owns(&self.path);
        if !known && shape.keys().any(|ours| is_slip(name, ours)) {
            return self.unknown(node, name, shape);
        }
        self.found.drop.push(self.path.clone());
        if known || prime_rl::owns_table_of(&self.path) {
            self.found.prime_rl.push(self.key());
        } else {
            self.found.unknown.push(Finding {
                key: self.key(),
                origin: Some(node.origin.clone()),
                message: "is neither a setting of pdlink nor one of PRIME-RL's that it knows, and is not read"
                    .to_owned(),
                mend: None,
            });
        }
    }

    /// A key in a table of ours that it does not have.
    fn unknown(&mut self, node: &Node, name: &str, shape: Shape<'_>) {
        let table = self.path[..self.path.len() - 1].join(".");
        let place = if table.is_empty() { "at the top".to_owned() } else { format!("in [{table}]") };
        if shape.keys().next().is_none() {
            let message = format!("is unknown: this version has no settings {place}");
            return self.refuse(node, message, "take the key out".to_owned());
        }
        let mend = match nearest(name, shape.keys()) {
            Some(nearest) => {
                self.found.tainted.push(join(&table, nearest));
                format!("did you mean `{}`?", join(&table, nearest))
            }
            None => format!("the keys {place} are {}", shape.keys().collect::<Vec<_>>().join(", ")),
        };
        self.refuse(node, format!("is unknown {place}"), mend);
    }

    fn refuse(&mut self, node: &Node, message: String, mend: String) {
        let key = self.key();
        self.found.tainted.push(key.clone());
        self.found.drop.push(self.path.iter().take_while(|part| !part.starts_with('[')).cloned().collect());
        self.found.errors.push(Finding { key, origin: Some(node.origin.clone()), message, mend: Some(mend) });
    }

    fn key(&self) -> String {
        self.path.join(".").replace(".[", "[")
    }
}

/// On the command line text needs no quotes: `--model.name 123` is a name, and a word for `true` is not a bool.
fn read_as_typed(node: &mut Node, kind: &Kind<'_>) {
    if let (Kind::Text | Kind::Word(_), Some(typed), false) = (kind, &node.typed, matches!(node.value, Value::Text(_)))
    {
        node.value = Value::Text(typed.clone());
    }
}

/// What is wrong with a value, and what would be right.
fn mismatch(value: &Value, kind: &Kind<'_>) -> (String, String) {
    let message = |expected: &str| format!("must be {expected}, and here is {value}");
    match kind {
        Kind::Any => (message("anything"), String::new()),
        Kind::Table => (message("a table"), "write its keys below a [section] head, or { key = value }".to_owned()),
        Kind::List(_) => (message("a list"), "write [a, b]".to_owned()),
        Kind::Text => (message("text"), format!("write it in quotes: \"{}\"", plain(value))),
        Kind::Bool => (message("true or false"), "write true or false, without quotes".to_owned()),
        Kind::Whole(bounds) => (message(&format!("a whole number{bounds}")), number_mend(value, "a whole number")),
        Kind::Number(bounds) => (message(&format!("a number{bounds}")), number_mend(value, "a number")),
        Kind::Word(words) => {
            let list = words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", ");
            let given = if let Value::Text(text) = value { nearest(text, words.iter().copied()) } else { None };
            let mend = match given {
                Some(word) => format!("did you mean \"{word}\"?"),
                None => "choose one of them".to_owned(),
            };
            (message(&format!("one of {list}")), mend)
        }
    }
}

fn number_mend(value: &Value, kind: &str) -> String {
    match value {
        Value::Text(text) if text.trim().parse::<f64>().is_ok() => format!("write {} without quotes", text.trim()),
        Value::Whole(_) | Value::Number(_) => "choose a number in that range".to_owned(),
        _ => format!("write {kind}"),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Table(_) | Value::List(_) => "…".to_owned(),
        other => other.to_string(),
    }
}
