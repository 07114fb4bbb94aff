//! The answers, for a person and for machines.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use console::{Style, style};
use serde::Serialize;

use super::check::{Answer, Group, Verdict};
use super::runner::Answered;
use crate::bench::environment::Environment;

/// Everything that was asked. Its JSON is described in `docs/validation.md`.
#[derive(Debug, Serialize)]
pub struct Report {
    pub environment: Environment,
    /// The worst of all answers, skipped ones aside.
    pub result: Verdict,
    /// How many came out in each way.
    pub counts: BTreeMap<&'static str, usize>,
    pub took_ms: u64,
    pub checks: Vec<Line>,
}

/// One answer.
#[derive(Debug, Serialize)]
pub struct Line {
    pub group: Group,
    pub name: String,
    #[serde(flatten)]
    pub answer: Answer,
    pub took_ms: u64,
}

impl Report {
    pub(super) fn new(environment: Environment, answered: Vec<Answered>, took: Duration) -> Self {
        let mut checks: Vec<Line> = answered.into_iter().map(Line::from).collect();
        checks.sort_by_key(|line| line.group);
        let worst = checks.iter().map(|line| line.answer.result).max().unwrap_or(Verdict::Ok);
        let all = [Verdict::Ok, Verdict::Warn, Verdict::Fail, Verdict::Skipped];
        let count = |verdict: Verdict| checks.iter().filter(|line| line.answer.result == verdict).count();
        Self {
            environment,
            result: worst.max(Verdict::Ok),
            counts: all.into_iter().map(|verdict| (verdict.name(), count(verdict))).collect(),
            took_ms: millis(took),
            checks,
        }
    }

    /// Whether something that the configuration asks for will not work.
    pub fn failed(&self) -> bool {
        self.result == Verdict::Fail
    }

    /// For a terminal of this many columns.
    pub fn in_words(&self, columns: usize) -> String {
        let mut text = format!("{}\n", self.environment);
        let named = self.checks.iter().map(|line| line.name.len()).max().unwrap_or_default();
        for group in Group::ALL {
            let lines: Vec<&Line> = self.checks.iter().filter(|line| line.group == group).collect();
            if !lines.is_empty() {
                let _ = writeln!(text, "\n{}", style(group.name()).bold());
            }
            for line in lines {
                line.write(&mut text, named, columns);
            }
        }
        let count = |verdict: Verdict| self.counts.get(verdict.name()).copied().unwrap_or_default();
        let _ = writeln!(
            text,
            "\n{}: {} ok, {} to look at, {} failed, {} skipped, in {:.1} s",
            verdict_style(self.result).apply_to(self.result.name()),
            count(Verdict::Ok),
            count(Verdict::Warn),
            count(Verdict::Fail),
            count(Verdict::Skipped),
            self.took_ms as f64 / 1000.0
        );
        text
    }
}

impl From<Answered> for Line {
    fn from(answered: Answered) -> Self {
        let Answered { group, name, answer, took } = answered;
        Self { group, name, answer, took_ms: millis(took) }
    }
}

/// Width of the longest verdict.
const VERDICT_WIDTH: usize = 7;

impl Line {
    fn write(&self, text: &mut String, named: usize, columns: usize) {
        let Self { name, answer, .. } = self;
        let verdict = format!("{:VERDICT_WIDTH$}", answer.result.name());
        let indent = 2 + VERDICT_WIDTH + 2 + named + 2;
        let seen = wrapped(&answer.seen, indent, columns);
        let _ = writeln!(text, "  {}  {name:named$}  {seen}", verdict_style(answer.result).apply_to(verdict));
        if let Some(mend) = &answer.mend {
            let mend = wrapped(&format!("→ {mend}"), indent, columns);
            let _ = writeln!(text, "{:indent$}{}", "", Style::new().bold().apply_to(mend));
        }
    }
}

fn verdict_style(verdict: Verdict) -> Style {
    match verdict {
        Verdict::Skipped => Style::new().dim(),
        Verdict::Ok => Style::new().green(),
        Verdict::Warn => Style::new().yellow().bold(),
        Verdict::Fail => Style::new().red().bold(),
    }
}

/// Breaks text between words so that it fits behind `indent` columns; what others wrote must not steer the terminal.
fn wrapped(text: &str, indent: usize, columns: usize) -> String {
    let width = columns.saturating_sub(indent).max(40);
    let clean = text.replace(char::is_control, " ");
    let (mut out, mut column) = (String::new(), 0);
    for word in clean.split(' ').filter(|word| !word.is_empty()) {
        let len = word.chars().count();
        if column > 0 && column + 1 + len > width {
            let _ = write!(out, "\n{:indent$}", "");
            column = 0;
        } else if column > 0 {
            out.push(' ');
            column += 1;
        }
        out.push_str(word);
        column += len;
    }
    out
}

fn millis(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(answers: Vec<(Group, &str, Answer)>) -> Report {
        let answered = answers.into_iter().map(|(group, name, answer)| Answered {
            group,
            name: name.to_owned(),
            answer,
            took: Duration::from_millis(3),
        });
        Report::new(Environment::current(), answered.collect(), Duration::from_millis(1500))
    }

    #[test]
    fn the_worst_answer_decides_and_what_is_skipped_does_not() {
        let skipped = || (Group::Links, "cuda-ipc", Answer::skipped("no driver"));
        assert_eq!(report(vec![skipped()]).result, Verdict::Ok);
        assert_eq!(report(vec![skipped(), (Group::Machine, "a", Answer::warn("x", "y"))]).result, Verdict::Warn);
        let failed = report(vec![
            (Group::Links, "tcp", Answer::fail("wrong\u{1b}[2J bytes", "look at the cables")),
            (Group::Machine, "cores", Answer::ok("2")),
            skipped(),
        ]);
        assert!(failed.failed());
        let words = failed.in_words(100);
        assert!(words.find("machine").unwrap() < words.find("links").unwrap(), "{words}");
        assert!(words.contains("fail     tcp       wrong [2J bytes"), "{words}");
        assert!(words.contains("→ look at the cables") && words.contains("1 ok, 0 to look at, 1 failed, 1 skipped"));
        let json = serde_json::to_value(&failed).unwrap();
        assert_eq!(
            (&json["result"], &json["counts"]["fail"], &json["took_ms"]),
            (&"fail".into(), &1.into(), &1500.into())
        );
        assert_eq!(
            json["checks"][0],
            serde_json::json!({
                "group": "machine", "name": "cores", "result": "ok", "seen": "2", "mend": null, "took_ms": 3
            })
        );
    }

    #[test]
    fn long_lines_break_between_words() {
        let text = "word ".repeat(30);
        let out = wrapped(&text, 10, 60);
        assert!(out.lines().all(|line| line.len() <= 60) && out.lines().count() > 2, "{out}");
        assert!(out.lines().skip(1).all(|line| line.starts_with("          word")), "{out}");
    }
}
