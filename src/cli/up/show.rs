//! The plan, for people: a table, and with `--dry-run` every command and variable as a shell would take them.

use comfy_table::{Attribute, Cell, CellAlignment, Table, presets};
use console::style;

use crate::render::quoted;
use crate::topology::{Plan, WorkerPlan};

/// Workers and proxy, one line each.
pub(super) fn table(plan: &Plan) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    let has_nodes = !plan.nodes.is_empty();
    let head = ["worker", "node", "engine", "gpus", "http", "kv"];
    let shown = move |titles: Vec<String>| titles.into_iter().enumerate().filter(move |(at, _)| has_nodes || *at != 1);
    let titles = shown(head.map(str::to_owned).to_vec());
    table.set_header(titles.map(|(_, title)| Cell::new(title).add_attribute(Attribute::Dim)));
    if !console::colors_enabled() {
        table.force_no_tty();
    }
    for worker in &plan.workers {
        table.add_row(
            shown(vec![
                worker.name(),
                worker.node.to_string(),
                worker.engine.name().to_owned(),
                list(&worker.gpus),
                worker.url(),
                worker.kv_address().unwrap_or_else(|| "-".to_owned()),
            ])
            .map(|(_, cell)| cell),
        );
    }
    let none = || "-".to_owned();
    let proxy = vec!["proxy".to_owned(), "0".to_owned(), none(), none(), plan.proxy.base_url(), none()];
    table.add_row(shown(proxy).map(|(_, cell)| cell));
    if let Some(column) = table.column_mut(if has_nodes { 3 } else { 2 }) {
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
    let place = |worker: &WorkerPlan| match plan.nodes.get(worker.node) {
        Some(node) => format!("# {}, on node {} ({})", worker.name(), node.rank, node.address),
        None => format!("# {}", worker.name()),
    };
    plan.workers.iter().map(|worker| command(worker, &place(worker))).collect::<Vec<_>>().join("\n")
}

fn command(worker: &WorkerPlan, title: &str) -> String {
    let mut text = format!("{}\n", style(title).dim());
    for (name, value) in worker.shown_env() {
        text.push_str(&format!("{name}={} \\\n", quoted(&value)));
    }
    let words: Vec<String> = worker.command.iter().map(|word| quoted(word)).collect();
    text.push_str(&format!("  {}\n", words.join(" ")));
    text
}
