//! Finds the `vllm` program and learns about its environment, once per environment and run.
//!
//! The Python behind the program is asked for the versions that its packages state. That takes a tenth of a second, where
//! `vllm --version` imports PyTorch first: seconds, from a cold disk far more. Only a program whose Python cannot be told is
//! asked by `--version`; whether pdlink's connector is installed with it then stays unknown.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::time::Duration;

use serde::Deserialize;
use tokio::process::Command;

use crate::topology::vllm::{VllmProgram, Wheel};

/// How long `vllm --version` may take: it imports PyTorch, from a cold disk at worst.
const VERSION_TIMEOUT: Duration = Duration::from_secs(120);

/// Lines of a program's output that are shown when what was asked is not in them.
const OUTPUT_LINES: usize = 3;

/// Longest first line of a script that is looked at.
const SHEBANG_BYTES_MAX: u64 = 4096;

/// Asks a Python about its packages; prints one line of JSON behind a mark. The folder it runs in must not count: a
/// folder there by the name of a package would be taken for the package.
const QUESTION: &str = r#"
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.metadata, importlib.util, json, platform

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

found = {"python": platform.python_version(), "vllm": version("vllm"), "wheel": version("pdlink"), "why": None}
if found["wheel"] is not None:
    try:
        import pdlink
        if importlib.util.find_spec("pdlink.vllm") is None:
            found["why"] = "it has no module pdlink.vllm"
    except BaseException as error:
        found["why"] = f"{type(error).__name__}: {error}"
print("pdlink-asks " + json.dumps(found))
"#;

/// Marks the answer to [`QUESTION`] among what imports may print.
const MARK: &str = "pdlink-asks ";

/// Why there is no vLLM to run.
#[derive(Debug, thiserror::Error)]
pub enum VllmError {
    #[error(
        "`vllm` is neither beside pdlink nor on the PATH; install it (`uv pip install vllm`), activate its environment, set \
         `launcher.vllm_program`, or set `inference.engine = \"reference\"` to run without a model"
    )]
    NotFound,
    #[error(
        "`launcher.vllm_program` is {program}, which is not an executable file; name the `vllm` program of an environment, or \
         its Python"
    )]
    NotExecutable { program: PathBuf },
    #[error("cannot run {program} {what}: {source}")]
    Run { program: PathBuf, what: &'static str, source: std::io::Error },
    #[error("{program} {what} did not answer within {} s", VERSION_TIMEOUT.as_secs())]
    Silent { program: PathBuf, what: &'static str },
    #[error("{program} --version names no version ({status}): {output}; reinstall vLLM")]
    NoVersion { program: PathBuf, status: ExitStatus, output: String },
    #[error("{python} has no vLLM installed; install it there, or set `launcher.vllm_program`")]
    NotInstalled { python: PathBuf },
    #[error(
        "the two roles would run different versions of vLLM: {prefill} by the environment of prefill, {decode} by that of \
             decode; make `pd_disagg.prefill_env` and `pd_disagg.decode_env` name the same installation"
    )]
    RolesDiffer { prefill: String, decode: String },
}

/// What decides which packages a Python finds.
const PACKAGE_VARIABLES: &[&str] = &["PYTHONPATH", "PYTHONHOME"];

/// Takes the program given, or looks for `vllm` beside `pdlink` (our own program, which the wheel puts into vLLM's
/// environment) and in the folders of `path` (the `PATH` variable), and learns about it under each of `envs`: the
/// variables that each role adds to ours. Both roles must run the same vLLM.
pub async fn find(
    given: Option<&Path>,
    pdlink: &Path,
    path: Option<&OsStr>,
    envs: &[&BTreeMap<String, String>],
) -> Result<VllmProgram, VllmError> {
    let program = match given {
        Some(program) if is_executable(program) => std::path::absolute(program).unwrap_or_else(|_| program.to_owned()),
        Some(program) => return Err(VllmError::NotExecutable { program: program.to_owned() }),
        None => beside(pdlink).or_else(|| path.and_then(on_path)).ok_or(VllmError::NotFound)?,
    };
    let mut environments: Vec<Vec<(&str, &str)>> = envs.iter().map(|env| package_variables(env)).collect();
    environments.dedup();
    let mut found: Option<VllmProgram> = None;
    for env in if environments.is_empty() { vec![Vec::new()] } else { environments } {
        let known = learn(&program, &env).await?;
        match found {
            Some(first) if first.release != known.release => {
                return Err(VllmError::RolesDiffer { prefill: first.release, decode: known.release });
            }
            // The environment without the wheel is the one to tell of.
            Some(first) if matches!(known.wheel, Wheel::Installed { .. }) => found = Some(first),
            _ => found = Some(known),
        }
    }
    found.ok_or(VllmError::NotFound)
}

fn package_variables(env: &BTreeMap<String, String>) -> Vec<(&str, &str)> {
    let given = |name: &&'static str| env.get(*name).map(|value| (*name, value.as_str()));
    PACKAGE_VARIABLES.iter().filter_map(given).collect()
}

fn beside(pdlink: &Path) -> Option<PathBuf> {
    Some(pdlink.parent()?.join("vllm")).filter(|program| is_executable(program))
}

fn on_path(path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path).map(|folder| folder.join("vllm")).find(|program| is_executable(program))
}

fn is_executable(program: &Path) -> bool {
    std::fs::metadata(program).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

async fn learn(program: &Path, env: &[(&str, &str)]) -> Result<VllmProgram, VllmError> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    if is_python(program) {
        let command = vec![text(program), "-m".to_owned(), "vllm.entrypoints.cli.main".to_owned()];
        let missing = || VllmError::NotInstalled { python: program.to_owned() };
        return ask_python(program, env).await?.and_then(|answer| answer.program(command, program)).ok_or_else(missing);
    }
    let command = vec![text(program)];
    if let Some(python) = python_of(program) {
        // A Python that gives no answer does not mean that the program gives none either.
        let answer = ask_python(&python, env).await.ok().flatten();
        if let Some(known) = answer.and_then(|answer| answer.program(command.clone(), &python)) {
            return Ok(known);
        }
    }
    ask_version(program, command, env).await
}

fn is_python(program: &Path) -> bool {
    program.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python"))
}

/// The Python that runs a script: its first line names it, or, where the path is too long for one, the line after.
fn python_of(script: &Path) -> Option<PathBuf> {
    let file = std::fs::File::open(script).ok()?;
    let mut lines = BufReader::new(file.take(SHEBANG_BYTES_MAX)).lines().map_while(Result::ok);
    let first = lines.next()?;
    let named = first.strip_prefix("#!")?.split_ascii_whitespace().map(PathBuf::from).next()?;
    if is_python(&named) && is_executable(&named) {
        return Some(named);
    }
    // Installers write `'''exec' PYTHON "$0" "$@"` below `#!/bin/sh`.
    let second = lines.next()?;
    let named = second.strip_prefix("'''exec' ")?.split_ascii_whitespace().next()?;
    let named = PathBuf::from(named.trim_matches('"'));
    (is_python(&named) && is_executable(&named)).then_some(named)
}

/// What a Python says of its packages.
#[derive(Debug, Deserialize)]
struct Answer {
    vllm: Option<String>,
    wheel: Option<String>,
    why: Option<String>,
}

impl Answer {
    fn program(self, command: Vec<String>, python: &Path) -> Option<VllmProgram> {
        let mut program = VllmProgram::new(command, self.vllm.as_deref()?)?;
        program.python = Some(python.to_string_lossy().into_owned());
        program.wheel = match (self.wheel, self.why) {
            (None, _) => Wheel::Missing,
            (Some(version), Some(why)) => Wheel::Broken { version, why },
            (Some(version), None) => Wheel::Installed { version },
        };
        Some(program)
    }
}

async fn ask_python(python: &Path, env: &[(&str, &str)]) -> Result<Option<Answer>, VllmError> {
    let output = run(python, &["-c", QUESTION], "-c", env).await?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    Ok(stdout.lines().find_map(|line| serde_json::from_str(line.strip_prefix(MARK)?).ok()))
}

async fn ask_version(program: &Path, command: Vec<String>, env: &[(&str, &str)]) -> Result<VllmProgram, VllmError> {
    let output = run(program, &["--version"], "--version", env).await?;
    // Warnings of its imports may come first, on either stream; the version is the last line that is one.
    let stdout = String::from_utf8_lossy(&output.stdout);
    let known = stdout.lines().rev().find_map(|line| VllmProgram::new(command.clone(), line));
    known.ok_or_else(|| {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = stdout.lines().chain(stderr.lines()).filter(|line| !line.trim().is_empty()).collect();
        let said = said[said.len().saturating_sub(OUTPUT_LINES)..].join(" / ");
        VllmError::NoVersion { program: program.to_owned(), status: output.status, output: said }
    })
}

async fn run(program: &Path, args: &[&str], what: &'static str, env: &[(&str, &str)]) -> Result<Output, VllmError> {
    let child =
        Command::new(program).args(args).envs(env.iter().copied()).stdin(Stdio::null()).kill_on_drop(true).output();
    match tokio::time::timeout(VERSION_TIMEOUT, child).await {
        Ok(output) => output.map_err(|source| VllmError::Run { program: program.to_owned(), what, source }),
        Err(_) => Err(VllmError::Silent { program: program.to_owned(), what }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A script of these lines, executable.
    fn script(folder: &Path, name: &str, text: &str) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, text).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("make it executable");
        path
    }

    #[test]
    fn the_python_behind_a_script_is_found() {
        let folder = tempfile::tempdir().expect("folder");
        let python = script(folder.path(), "python3.12", "#!/bin/sh\n");
        let name = python.display();
        let cases = [
            (format!("#!{name}\nimport sys\n"), Some(&python)),
            (format!("#!{name} -I\n"), Some(&python)),
            (format!("#!/bin/sh\n'''exec' {name} \"$0\" \"$@\"\n' '''\n"), Some(&python)),
            (format!("#!/bin/sh\n'''exec' \"{name}\" \"$0\" \"$@\"\n"), Some(&python)),
            ("#!/bin/sh\necho 0.33.0\n".to_owned(), None),
            ("#!/nowhere/bin/python3\n".to_owned(), None),
            ("\u{7f}ELF".to_owned(), None),
            (String::new(), None),
        ];
        for (text, want) in cases {
            let vllm = script(folder.path(), "vllm", &text);
            assert_eq!(python_of(&vllm).as_ref(), want, "case: {text}");
        }
    }

    #[test]
    fn what_python_says_becomes_a_program() {
        let cases = [
            (
                r#"{"vllm": "0.32.0+cpu", "wheel": "0.1.0", "why": null}"#,
                Some(Wheel::Installed { version: "0.1.0".into() }),
            ),
            (r#"{"vllm": "0.32.0", "wheel": null, "why": null}"#, Some(Wheel::Missing)),
            (
                r#"{"vllm": "0.32.0", "wheel": "0.1.0", "why": "ImportError: x"}"#,
                Some(Wheel::Broken { version: "0.1.0".into(), why: "ImportError: x".into() }),
            ),
            (r#"{"vllm": null, "wheel": "0.1.0", "why": null}"#, None),
        ];
        for (text, want) in cases {
            let answer: Answer = serde_json::from_str(text).expect("an answer");
            let program = answer.program(vec!["vllm".to_owned()], Path::new("/env/bin/python"));
            assert_eq!(program.map(|program| program.wheel), want, "case: {text}");
        }
    }
}
