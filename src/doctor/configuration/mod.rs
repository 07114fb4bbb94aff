//! Checks of the configuration: whether it can be used at all, and with the vLLM that is here.

mod connector;
mod geometry;
pub(super) mod model_files;

use std::time::Duration;

use super::check::{Answer, Check, Group};
use super::setting::{Setting, Shared};
use crate::config::{EngineKind, Finding, Path};
use crate::topology::host;

/// Longest for what only thinks.
const THOUGHT: Duration = Duration::from_secs(5);

pub(super) fn checks(setting: &Shared) -> Vec<Check> {
    vec![
        check("composes", THOUGHT, setting, composes),
        check("plan", THOUGHT, setting, plan),
        check("vllm", THOUGHT, setting, vllm),
        check("connector", connector::WITHIN, setting, connector::check),
        check("paths", THOUGHT, setting, paths),
        check("geometry", THOUGHT, setting, geometry::check),
    ]
}

fn check(name: &str, within: Duration, setting: &Shared, ask: fn(&Setting) -> Answer) -> Check {
    let setting = setting.clone();
    Check::new(Group::Configuration, name, within, move || ask(&setting))
}

/// Why nothing can be said without a configuration.
fn why_none(setting: &Setting) -> &'static str {
    match setting.loaded {
        None => "no configuration was given: name one with `@ FILE`",
        Some(_) => "the configuration cannot be used; see composes",
    }
}

fn composes(setting: &Setting) -> Answer {
    let list = |findings: &[Finding]| findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    match &setting.loaded {
        None => Answer::skipped(why_none(setting)),
        Some(Err(error)) => Answer::fail(list(&error.findings), "mend what is named, and ask `pdlink config check`"),
        Some(Ok(loaded)) if loaded.warnings.is_empty() => Answer::ok("every key is known and none contradicts another"),
        Some(Ok(loaded)) => Answer::warn(list(&loaded.warnings), "mend what is named, if it was not meant so"),
    }
}

fn plan(setting: &Setting) -> Answer {
    let (plan, config) = match (&setting.plan, setting.config()) {
        (Some(Err(error)), _) => return Answer::fail(error.to_string(), "mend what is named"),
        (Some(Ok(plan)), Some(config)) => (plan, config),
        _ => return Answer::skipped(why_none(setting)),
    };
    let vllm = setting.vllm.as_ref().and_then(|vllm| vllm.as_ref().ok());
    let names: Vec<String> = plan.workers.iter().map(|worker| worker.name()).collect();
    let link = plan.link.as_ref().map(|link| {
        let paths =
            if link.paths.is_empty() { "as vLLM's class does".to_owned() } else { Path::list(link.paths.clone()) };
        format!(", KV by {} over {paths}", link.connector.name())
    });
    let seen = format!("{}{}", names.join(", "), link.unwrap_or_default());
    let mut doubts = plan.warnings.clone();
    let mut faults = Vec::new();
    match (setting.share(), &setting.place) {
        (Some(share), _) if share.workers.is_empty() => {}
        (Some(share), _) => {
            doubts.extend(host::doubts(config, &share, &setting.host, vllm));
            faults.extend(host::faults(config, &share, &setting.host, vllm).iter().map(ToString::to_string));
        }
        (None, place) => faults.extend(place.as_ref().err().cloned()),
    }
    if !faults.is_empty() {
        Answer::fail(faults.join("; "), "mend what is named: `pdlink up` refuses to start")
    } else if !doubts.is_empty() {
        Answer::warn(doubts.join("; "), "look at what is named")
    } else {
        Answer::ok(seen)
    }
    .with("workers", names)
}

fn vllm(setting: &Setting) -> Answer {
    match &setting.vllm {
        None if setting.config().is_some_and(|config| config.inference.engine == EngineKind::Reference) => {
            Answer::skipped("workers run the reference engine")
        }
        None => Answer::skipped(why_none(setting)),
        Some(Err(error)) => Answer::fail(error.to_string(), "workers cannot start without it"),
        Some(Ok(vllm)) => {
            let kind = if vllm.on_cpu { "for the CPU" } else { "for GPUs" };
            let seen = format!("vLLM {} {kind}, {}", vllm.release, vllm.command.join(" "));
            Answer::ok(seen).with("release", vllm.release.clone()).with("python", vllm.python.clone())
        }
    }
}

/// Allowed paths that cannot move this KV are left out by the launcher, and the next is taken: slower, and without a word.
fn paths(setting: &Setting) -> Answer {
    let (Some(config), Some(memory)) = (setting.config(), setting.memory()) else {
        return Answer::skipped(why_none(setting));
    };
    if !setting.has_link() {
        return Answer::skipped("no worker moves KV by a path of ours");
    }
    let moved = setting.paths();
    let unused = config.kv.paths.iter().flatten().copied().filter(|path| !moved.contains(path));
    let unused: Vec<Path> = unused.collect();
    let seen = format!("KV lies in {}, moved by {}", memory.name(), Path::list(moved.iter().copied()));
    if moved.is_empty() {
        let mend = format!("set kv.paths to some of {}", Path::list(Path::that_move(memory)));
        return Answer::fail(format!("no allowed path moves KV in {}", memory.name()), mend);
    }
    let answer = if unused.is_empty() {
        Answer::ok(seen)
    } else {
        let seen = format!("{seen}; not by {}", Path::list(unused.iter().copied()));
        Answer::warn(seen, "take them out of kv.paths, or know that they are never used here")
    };
    answer.with("paths", moved.into_iter().map(Path::name).collect::<Vec<_>>())
}
