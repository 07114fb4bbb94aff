//! What a person reads on stderr: errors, warnings and notes, in colour on a terminal.

use console::Style;

use crate::config::{Finding, LoadError};

/// Prints an error and its causes. A configuration that is wrong in several ways is told one line each.
pub(super) fn error(error: &anyhow::Error) {
    let label = Style::new().for_stderr().red().bold();
    if let Some(load) = error.downcast_ref::<LoadError>() {
        for finding in &load.findings {
            line(&label, "error", &finding.to_string());
        }
        return;
    }
    line(&label, "error", &format!("{error:#}"));
}

/// Prints what loading noticed but does not refuse.
pub fn remarks(warnings: &[Finding], notes: &[Finding]) {
    for warning in warnings {
        line(&Style::new().for_stderr().yellow().bold(), "warning", &warning.to_string());
    }
    for note in notes {
        line(&Style::new().for_stderr().cyan(), "note", &note.to_string());
    }
}

/// Prints one thing that is good to know.
pub(super) fn note(text: &str) {
    line(&Style::new().for_stderr().cyan(), "note", text);
}

fn line(style: &Style, label: &str, text: &str) {
    // A name or a value from a file must not steer the terminal.
    let text = text.replace(|letter: char| letter.is_control() && letter != '\n', " ");
    // A closed stderr must not turn a report into a panic.
    let _ = console::Term::stderr().write_line(&format!("{} {text}", style.apply_to(format!("{label}:"))));
}
