//! NIXL: which file, which version, and whether an agent comes up with the backend that is configured.

use super::super::check::Answer;
use super::{Libraries, Looked};
use crate::ffi::nixl::{TESTED, is_untested};

const INSTALL: &str = "install nixl-cu13 (or nixl-cu12) into the workers' Python environment, and name that in \
                       kv.nixl.environment or the library itself in kv.nixl.library";

pub(super) fn check(libraries: &Libraries) -> Answer {
    let setting = &libraries.setting;
    let wish = libraries.wish();
    let named = wish.library.is_some() || setting.config().is_some_and(|config| config.kv.nixl.environment.is_some());
    let needed = setting.needs_nixl();
    let Looked { found, said } = match libraries.nixl() {
        Ok(looked) => looked,
        // What was named and is not there is a mistake, whether or not it is used.
        Err(error) => return Answer::absent(needed || named, error.to_owned(), INSTALL),
    };
    let version = &found.version;
    let file = found.library.display().to_string();
    let answer = match &found.agent {
        Err(error) => {
            let said = said.lines().last().map(|line| format!("; it said: {line}")).unwrap_or_default();
            let mend = "set kv.nixl.backend to one that is there, and look at kv.nixl.parameters and [kv.nixl.env]";
            Answer::fault(
                needed,
                format!("NIXL {version}, {file}: no agent with {}: {error}{said}", wish.backend),
                mend,
            )
        }
        Ok(backends) => {
            let seen = format!(
                "NIXL {version}, {file}; an agent with {} came up, there are {}",
                wish.backend,
                backends.join(", ")
            );
            let answer = if is_untested(version) {
                let ((from, from_minor), (to, to_minor)) = TESTED;
                let mend = format!(
                    "use a version from {from}.{from_minor} to {to}.{to_minor}, or try the nixl path well first"
                );
                Answer::warn(format!("{seen}; this version was never tested"), mend)
            } else {
                Answer::ok(seen)
            };
            answer.with("backends", backends.clone())
        }
    };
    answer.with("version", version.clone()).with("library", file)
}
