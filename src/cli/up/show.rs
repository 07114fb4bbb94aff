//! The plan, for people: a table, and with `--dry-run` every command and variable as a shell would take them.

use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use console::style;

use crate::topology::{Plan, WorkerPlan};

/// Workers and proxy, one line each.
pub(super) fn table(plan: &Plan) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let head = ["worker", "engine", "gpus", "http", "kv"].map(|title| Cell::new(title).add_attribute(Attribute::Dim));
    table.set_header(head);
    if !console::colors_enabled() {
        table.force_no_tty();
    }
    for worker in &plan.workers {
        table.add_row([
            worker.name(),
            worker.engine.name().to_owned(),
            list(&worker.gpus),
            worker.url(),
            worker.kv_address().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    table.add_row(["proxy".to_owned(), "-".to_owned(), "-".to_owned(), plan.proxy.base_url(), "-".to_owned()]);
    if let Some(column) = table.column_mut(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let lines: Vec<String> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    format!("{}\n{}", title(plan), lines.join("\n"))
}

fn title(plan: &Plan) -> String {
    let how = match &plan.link {
        Some(link) => {
            let paths: Vec<&str> = link.paths.iter().map(|path| path.name()).collect();
            let by = if paths.is_empty() { "as vLLM does".to_owned() } else { format!("by {}", paths.join(", ")) };
            format!("{} ({}, {}), {by}", link.connector.name(), link.connector_impl.name(), link.send_type.name())
        }
        None => "plain workers".to_owned(),
    };
    format!("{}  {how}", style(&plan.model).bold())
}

fn list(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// What each worker would run.
pub(super) fn commands(plan: &Plan) -> String {
    plan.workers.iter().map(command).collect::<Vec<_>>().join("\n")
}

fn command(worker: &WorkerPlan) -> String {
    let mut text = format!("{}\n", style(format!("# {}", worker.name())).dim());
    for (name, value) in worker.shown_env() {
        text.push_str(&format!("{name}={} \\\n", quoted(&value)));
    }
    let words: Vec<String> = worker.command.iter().map(|word| quoted(word)).collect();
    text.push_str(&format!("  {}\n", words.join(" ")));
    text
}

/// A word as a POSIX shell reads it back.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        let cases = [
            ("--port", "--port"),
            ("", "''"),
            ("a b", "'a b'"),
            (r#"{"a":1}"#, r#"'{"a":1}'"#),
            ("it's", r"'it'\''s'"),
        ];
        for (word, want) in cases {
            assert_eq!(quoted(word), want);
        }
    }
}
