//! vLLM's versions: which one is there, and what that means.

use std::fmt;

/// The oldest version whose settings are known here. Only what vLLM itself ships works before [`NATIVE_FLOOR`].
pub const VERSION_FLOOR: VllmVersion = VllmVersion::new(0, 20);

/// The oldest version that pdlink's own connector is made for.
pub const NATIVE_FLOOR: VllmVersion = VllmVersion::new(0, 24);

/// The range pdlink is tested with, ends included.
pub const TESTED: (VllmVersion, VllmVersion) = (VllmVersion::new(0, 24), VllmVersion::new(0, 33));

/// The last version that ships `P2pNcclConnector`.
pub const P2P_NCCL_LAST: VllmVersion = VllmVersion::new(0, 23);

/// The oldest version known to ship `NixlPushConnector`.
pub const NIXL_PUSH_FLOOR: VllmVersion = VllmVersion::new(0, 24);

/// Release number of vLLM, patch level left out: settings change with the minor number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VllmVersion {
    major: u32,
    minor: u32,
}

impl VllmVersion {
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor }
    }

    /// Reads `0.24.0`, `0.33.0+cu130`, `v0.32.1rc1`, `vllm 0.24.0`. Anything else is no version.
    pub fn parse(text: &str) -> Option<Self> {
        let word = text.split_ascii_whitespace().last()?;
        let mut numbers = word.trim_start_matches('v').split(['.', '+', '-']);
        let major = numbers.next()?.parse().ok()?;
        let minor = numbers.next()?.parse().ok()?;
        let patch = numbers.next()?;
        patch.starts_with(|c: char| c.is_ascii_digit()).then_some(Self { major, minor })
    }

    /// Whether it lies outside of what pdlink is tested with.
    pub fn is_untested(self) -> bool {
        self < TESTED.0 || self > TESTED.1
    }
}

impl fmt::Display for VllmVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// Whether pdlink's own connector is in the environment of a `vllm`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wheel {
    /// It could not be looked for: the program is no script of a Python that can be asked.
    Unknown,
    Missing,
    /// It is installed and cannot be imported; the text says why.
    Broken {
        version: String,
        why: String,
    },
    Installed {
        version: String,
    },
}

/// The `vllm` that workers run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VllmProgram {
    /// What stands before `serve`: the program, or a Python and its arguments.
    pub command: Vec<String>,
    pub version: VllmVersion,
    /// As vLLM writes it: `0.32.0+cpu`.
    pub release: String,
    /// Whether this build computes on the CPU; vLLM itself decides so by its version's text.
    pub on_cpu: bool,
    /// The Python behind it, where it is known.
    pub python: Option<String>,
    pub wheel: Wheel,
}

impl VllmProgram {
    /// A program of which only the version is known. `None` if `release` is no version.
    pub fn new(command: Vec<String>, release: &str) -> Option<Self> {
        let version = VllmVersion::parse(release)?;
        let release = release.split_ascii_whitespace().last().unwrap_or_default().to_owned();
        let on_cpu = release.contains("cpu");
        Some(Self { command, version, release, on_cpu, python: None, wheel: Wheel::Unknown })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_vllm_prints_them() {
        let cases = [
            ("0.24.0", Some((0, 24))),
            ("0.33.0+cu130", Some((0, 33))),
            ("v0.32.1rc1", Some((0, 32))),
            ("vllm 0.23.0", Some((0, 23))),
            ("1.0.0", Some((1, 0))),
            ("INFO 07-01 12:00:00 [__init__.py:12] Automatically detected platform cpu.", None),
            ("0.33", None),
            ("", None),
        ];
        for (text, want) in cases {
            assert_eq!(
                VllmVersion::parse(text),
                want.map(|(major, minor)| VllmVersion::new(major, minor)),
                "case: {text}"
            );
        }
        assert!(VllmVersion::new(0, 23).is_untested() && VllmVersion::new(1, 0).is_untested());
        assert!(!VllmVersion::new(0, 24).is_untested() && !VllmVersion::new(0, 33).is_untested());
    }

    #[test]
    fn a_build_for_the_cpu_says_so_in_its_version() {
        let on_cpu = |release| VllmProgram::new(Vec::new(), release).map(|program| (program.release, program.on_cpu));
        assert_eq!(on_cpu("vllm 0.32.0+cpu"), Some(("0.32.0+cpu".to_owned(), true)));
        assert_eq!(on_cpu("0.33.0+cu130"), Some(("0.33.0+cu130".to_owned(), false)));
        assert_eq!(on_cpu("no version"), None);
    }
}
