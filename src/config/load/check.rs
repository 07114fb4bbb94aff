//! Every value against what its setting must be: all that is wrong, told at once.

use serde_json::Value as Json;

use super::names::{is_secret, is_slip, nearest};
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
            (_, kind) => {
                let (expected, mend) = (expected(&kind), mend(node, &kind));
                let message = format!("must be {expected}, and here is {}", self.shown(node));
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

    /// A wrong value, as messages show it.
    fn shown(&self, node: &Node) -> String {
        if node.is_lone_flag() {
            "no value".to_owned()
        } else if self.path.last().is_some_and(|name| is_secret(name)) {
            node.value.kind().to_owned()
        } else {
            node.value.to_string()
        }
    }

    fn key(&self) -> String {
        self.path.join(".").replace(".[", "[")
    }
}

/// On the command line text needs no quotes: `--model.name 123` is a name.
fn read_as_typed(node: &mut Node, kind: &Kind<'_>) {
    if !matches!(kind, Kind::Text | Kind::Word(_)) || matches!(node.value, Value::Text(_)) || node.is_lone_flag() {
        return;
    }
    if let Some(typed) = &node.typed {
        node.value = Value::Text(typed.clone());
    }
}

/// What a value must be.
fn expected(kind: &Kind<'_>) -> String {
    match kind {
        Kind::Any => "anything".to_owned(),
        Kind::Table => "a table".to_owned(),
        Kind::List(_) => "a list".to_owned(),
        Kind::Text => "text".to_owned(),
        Kind::Bool => "true or false".to_owned(),
        Kind::Whole(bounds) => format!("a whole number{bounds}"),
        Kind::Number(bounds) => format!("a number{bounds}"),
        Kind::Word(words) => {
            format!("one of {}", words.iter().map(|word| format!("\"{word}\"")).collect::<Vec<_>>().join(", "))
        }
    }
}

/// What to write instead of a wrong value.
fn mend(node: &Node, kind: &Kind<'_>) -> String {
    match (kind, &node.value) {
        _ if node.is_lone_flag() => "write the value behind it".to_owned(),
        (Kind::Table, _) => "write its keys below a [section] head, or { key = value }".to_owned(),
        (Kind::List(_), _) => "write a list, as in [1, 2] or [\"a\", \"b\"]".to_owned(),
        (Kind::Bool, _) => "write true or false, without quotes".to_owned(),
        (Kind::Text, Value::Table(_) | Value::List(_)) => "write text in quotes".to_owned(),
        (Kind::Text, value) => format!("write it in quotes: \"{value}\""),
        (Kind::Word(words), Value::Text(text)) => match nearest(text, words.iter().copied()) {
            Some(word) => format!("did you mean \"{word}\"?"),
            None => "choose one of them".to_owned(),
        },
        (Kind::Word(_), _) => "choose one of them".to_owned(),
        (_, Value::Text(text)) if text.trim().parse::<f64>().is_ok() => format!("write {} without quotes", text.trim()),
        (_, Value::Whole(_) | Value::Number(_)) => "choose a number that fits".to_owned(),
        _ => "write a number".to_owned(),
    }
}
