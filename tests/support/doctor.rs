//! Runs `pdlink doctor` as a gate in CI would: arguments and variables in, exit code and JSON out.
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// What came of one run.
pub(crate) struct Diagnosis {
    pub(crate) exit: i32,
    pub(crate) report: Value,
}

impl Diagnosis {
    /// One check, by its group and name.
    pub(crate) fn check(&self, group: &str, name: &str) -> &Value {
        let checks = self.report["checks"].as_array().expect("checks");
        let found = checks.iter().find(|check| check["group"] == group && check["name"] == name);
        found.unwrap_or_else(|| panic!("no {group} {name} in {:#}", self.report))
    }

    /// The check found this fault: it came out so, and says each of `parts`; the report failed if it did.
    pub(crate) fn assert(&self, group: &str, name: &str, result: &str, parts: &[&str]) {
        let check = self.check(group, name);
        assert_eq!(check["result"], result, "{check:#}");
        let said = format!("{} {}", check["seen"].as_str().expect("seen"), check["mend"].as_str().unwrap_or_default());
        for part in parts {
            assert!(said.contains(part), "no {part:?} in {said}");
        }
        if result == "fail" {
            assert_eq!((self.exit, &self.report["result"]), (1, &"fail".into()), "{:#}", self.report);
        }
    }

    /// Names of all checks with this result.
    pub(crate) fn named(&self, result: &str) -> Vec<String> {
        let checks = self.report["checks"].as_array().expect("checks").iter();
        let named = checks.filter(|check| check["result"] == result);
        named.map(|check| format!("{} {}: {}", check["group"], check["name"], check["seen"])).collect()
    }
}

/// The command, with nothing in its environment that would change what is found.
pub(crate) fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::null());
    for name in ["PDLINK_SECRET_FILE", "PDLINK_ADMIN_TOKEN", "VIRTUAL_ENV", "UCX_TLS", "UCX_MODULE_DIR", "LD_PRELOAD"] {
        command.env_remove(name);
    }
    command
}

pub(crate) fn diagnose(args: &[&str]) -> Diagnosis {
    diagnose_with(args, &[])
}

pub(crate) fn diagnose_with(args: &[&str], env: &[(&str, &str)]) -> Diagnosis {
    let mut command = command(env!("CARGO_BIN_EXE_pdlink"));
    command.args(["doctor", "--json"]).args(args).envs(env.iter().copied());
    read(&mut command)
}

pub(crate) fn read(command: &mut Command) -> Diagnosis {
    let output = command.output().expect("run pdlink");
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    let report = serde_json::from_str(&stdout)
        .unwrap_or_else(|error| panic!("{error}: {stdout}{}", String::from_utf8_lossy(&output.stderr)));
    Diagnosis { exit: output.status.code().expect("an exit code"), report }
}

/// A `vllm` of this version, as far as it is asked for it.
pub(crate) fn vllm(folder: &Path, release: &str) -> String {
    program(folder, "vllm", &format!("#!/bin/sh\necho {release}\n"))
}

/// A Python with vLLM and our wheel, which answers a question about the connector by these lines of shell.
pub(crate) fn python(folder: &Path, release: &str, connector: &str) -> String {
    let (asks, wheel) = ("pdlink-asks", env!("CARGO_PKG_VERSION"));
    let answer = format!(r#"{{"vllm": "{release}", "wheel": "{wheel}", "why": null}}"#);
    let text = format!("#!/bin/sh\ncase \"$2\" in *{asks}*) echo '{asks} {answer}';; *) {connector};; esac\n");
    program(folder, "python3", &text)
}

fn program(folder: &Path, name: &str, text: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let program = folder.join(name);
    std::fs::write(&program, text).expect("write");
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("make it executable");
    program.to_str().expect("UTF-8").to_owned()
}
