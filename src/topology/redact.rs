//! Keeps secrets out of what is shown and out of command lines, which every user of the host can read.

use crate::config::is_secret_variable;

/// Shown instead of a secret value.
const HIDDEN: &str = "***";

/// The value as it may be shown.
pub(super) fn value<'a>(name: &str, value: &'a str) -> &'a str {
    if is_secret_variable(name) { HIDDEN } else { value }
}
