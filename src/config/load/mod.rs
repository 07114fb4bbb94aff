//! From files and command line to a [`Config`] that can be used.
//!
//! In order: files are read and merged with their bases (`compose`), overrides are laid on top (`overrides`), every value
//! is checked against the schema of its setting (`check`), the types are built, and `rules` looks at what no single value
//! can tell. Each step tells everything it finds; a later step runs on what an earlier one found no fault with.

mod check;
mod compose;
mod finding;
pub(super) mod names;
mod origin;
mod overrides;
mod parse;
mod prime_rl;
mod schema;
pub(super) mod tree;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use check::{Checked, check};
use compose::Composer;
use tree::{Node, Value};

pub use finding::{Finding, LoadError};
pub use origin::{Origin, Origins};
pub use overrides::Override;
pub use schema::document as schema;

use super::{Config, rules};

/// What to load.
pub struct LoadRequest<'a> {
    /// Files, left to right: a later one wins.
    pub files: &'a [PathBuf],
    /// Overrides, in order; they win over files.
    pub overrides: &'a [Override],
    /// The value of an environment variable. Read: `PDLINK_ADMIN_TOKEN` for `proxy.admin_token` and
    /// `PDLINK_SECRET_FILE` for `security.secret_file`, each where neither a file nor an override gives it.
    pub env: &'a dyn Fn(&str) -> Option<String>,
}

/// A configuration that passed every check.
#[derive(Debug, Clone)]
pub struct Loaded {
    pub config: Config,
    /// Worth knowing, nothing wrong.
    pub notes: Vec<Finding>,
    /// Works, but hardly as meant.
    pub warnings: Vec<Finding>,
    /// Where each given value came from.
    pub origins: Origins,
}

/// Most errors told at once: a file that is no configuration at all has one on every line.
const FINDINGS_MAX: usize = 50;

/// Settings that may come from the environment: secrets do not belong into argv, and hardly into files.
const FROM_ENVIRONMENT: &[(&str, &str, &str)] =
    &[("PDLINK_ADMIN_TOKEN", "proxy", "admin_token"), ("PDLINK_SECRET_FILE", "security", "secret_file")];

/// Loads a configuration, or tells everything that is wrong with it.
pub fn load(request: &LoadRequest<'_>) -> Result<Loaded, LoadError> {
    let document = schema::document();
    let mut tree = read(request, document)?;
    let mut origins = Origins::default();
    tree.collect_origins("", &mut origins);
    let checked = check(&mut tree, document);
    let mut clean = tree.clone();
    for path in &checked.drop {
        clean.remove(&path.iter().map(String::as_str).collect::<Vec<_>>());
    }
    let config = build(&clean, &origins).map_err(|finding| refused(with(checked.errors.clone(), finding)))?;
    let verdict = rules::judge(&config, &tree, &origins, &checked.tainted);
    let errors = [checked.errors.clone(), verdict.errors].concat();
    if !errors.is_empty() {
        return Err(refused(errors));
    }
    let mut notes = Vec::from_iter(prime_rl_note(&checked, &config, &origins));
    notes.extend(checked.unknown);
    notes.extend(verdict.notes);
    Ok(Loaded { config, notes, warnings: verdict.warnings, origins })
}

/// Files, environment and overrides in one tree.
fn read(request: &LoadRequest<'_>, document: &serde_json::Value) -> Result<Node, LoadError> {
    let mut composer = Composer::default();
    let nowhere = Origin::File { path: Arc::from(Path::new("")), line: 0 };
    let mut tree = Node::table(nowhere);
    for file in request.files {
        if let Some(node) = composer.file(file, None) {
            tree.merge(node);
        }
    }
    let mut findings = composer.findings;
    for over in request.overrides {
        match over.node(document) {
            Ok(node) => tree.merge(node),
            Err(finding) => findings.push(finding),
        }
    }
    add_environment(&mut tree, request.env);
    if findings.is_empty() { Ok(tree) } else { Err(refused(findings)) }
}

fn add_environment(tree: &mut Node, env: &dyn Fn(&str) -> Option<String>) {
    for &(variable, section, key) in FROM_ENVIRONMENT {
        let given = tree.at(&tree::join(section, key)).is_some();
        if let Some(text) = env(variable).filter(|text| !given && !text.is_empty()) {
            let origin = Origin::Environment(variable);
            let value = Node::new(Value::Text(text), origin.clone());
            let mut section_node = Node::table(origin.clone());
            section_node.insert(key, value);
            let mut root = Node::table(origin);
            root.insert(section, section_node);
            tree.merge(root);
        }
    }
}

/// The types from the values. Checking has told what is wrong already; this is where a gap in it would show.
fn build(clean: &Node, origins: &Origins) -> Result<Config, Finding> {
    serde_path_to_error::deserialize(clean.to_json()).map_err(|error| {
        let key = error.path().to_string();
        Finding {
            origin: origins.nearest(&key).cloned(),
            key,
            message: error.inner().to_string(),
            mend: Some("`pdlink config schema` tells what each key takes".to_owned()),
        }
    })
}

fn with(mut findings: Vec<Finding>, finding: Finding) -> Vec<Finding> {
    findings.push(finding);
    findings
}

fn refused(mut findings: Vec<Finding>) -> LoadError {
    findings.sort_by(|a, b| order(a).cmp(&order(b)));
    findings.dedup();
    let further = findings.len().saturating_sub(FINDINGS_MAX);
    if further > 0 {
        findings.truncate(FINDINGS_MAX);
        let message = format!("{further} more things are wrong");
        findings.push(Finding { key: String::new(), origin: None, message, mend: None });
    }
    LoadError { findings }
}

/// Files by line, then the command line, then what was given nowhere.
fn order(finding: &Finding) -> (bool, Option<(u8, &str, u32)>) {
    (finding.origin.is_none(), finding.origin.as_ref().map(Origin::order))
}

/// One note for all of PRIME-RL's keys.
fn prime_rl_note(checked: &Checked, config: &Config, origins: &Origins) -> Option<Finding> {
    let mut heads: Vec<&str> = checked.prime_rl.iter().map(|key| prime_rl::head(key)).collect();
    heads.extend(config.trainer_gpu_ids.as_ref().map(|_| "trainer_gpu_ids"));
    heads.sort_unstable();
    heads.dedup();
    let first = heads.first()?;
    Some(Finding {
        key: String::new(),
        origin: origins.nearest(first).cloned(),
        message: format!(
            "{} belong to PRIME-RL's trainer and orchestrator; pdlink leaves them alone",
            heads.join(", ")
        ),
        mend: None,
    })
}
