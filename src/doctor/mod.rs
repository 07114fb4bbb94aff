//! `pdlink doctor`: whether the machine, the libraries, the configuration, the links and a deployment can be trusted, before a
//! large run.
//!
//! A [`Check`] asks one question, within a time of its own, and gives one [`Answer`]: what was seen, and what to do. Checks are
//! data, listed by their group ([`machine`], [`libraries`], [`configuration`], [`links`], [`deployment`]); [`run`] asks them and [`Report`] shows the answers, to a person or as JSON.
//! What may harm the process that looks (a foreign library, another process's memory) is asked in a process of its own
//! ([`probe`]). What is absent is skipped by name; absent and needed by the configuration is a failure.
#![forbid(unsafe_code)]

mod check;
mod configuration;
mod deployment;
mod libraries;
mod links;
mod machine;
pub mod probe;
mod report;
mod runner;
mod setting;

use std::time::Instant;

pub use check::{Answer, Check, Group, Verdict};
pub use deployment::Target;
pub use report::Report;
pub use setting::Setting;

use crate::bench::environment::Environment;

/// Checks asked at the same time. They mostly wait: for a process, a library, a name server.
const AT_ONCE: usize = 4;

/// Asks what there is to ask about `setting` in these groups; `tell` hears what is being asked.
pub fn run(setting: Setting, groups: &[Group], tell: &dyn Fn(&runner::Progress<'_>)) -> Report {
    let started = Instant::now();
    let environment = Environment::current();
    let setting = std::sync::Arc::new(setting);
    let wanted = |checks: Vec<Check>| checks.into_iter().filter(|check| groups.contains(&check.group));
    let mut checks: Vec<Check> = wanted(machine::checks(&setting)).collect();
    checks.extend(wanted(libraries::checks(&setting)));
    checks.extend(wanted(configuration::checks(&setting)));
    let mut answered = runner::ask(checks, AT_ONCE, tell);
    // Speed is measured, so one after the other, and beside nothing else.
    let mut alone: Vec<Check> = wanted(links::checks(&setting)).collect();
    alone.extend(wanted(deployment::checks(&setting)));
    answered.extend(runner::ask(alone, 1, tell));
    Report::new(environment, answered, started.elapsed())
}

pub use runner::Progress;
