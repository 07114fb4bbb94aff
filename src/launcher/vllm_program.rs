//! Finds the `vllm` program and asks its version, once per run.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::topology::vllm::{VllmProgram, VllmVersion};

/// How long `vllm --version` may take: it imports PyTorch, from a cold disk at worst.
const VERSION_TIMEOUT: Duration = Duration::from_secs(120);

/// Lines of the program's output that are shown when its version is not in them.
const OUTPUT_LINES: usize = 3;

/// Why there is no vLLM to run.
#[derive(Debug, thiserror::Error)]
pub enum VllmError {
    #[error(
        "`vllm` is not on the PATH; install it (`uv pip install vllm`), activate its environment, set \
         `launcher.vllm_program`, or set `inference.engine = \"reference\"` to run without a model"
    )]
    NotFound,
    #[error("`launcher.vllm_program` is {program}, which is not an executable file; name the `vllm` program itself")]
    NotExecutable { program: PathBuf },
    #[error("cannot run {program} --version: {source}")]
    Run { program: PathBuf, source: std::io::Error },
    #[error("{program} --version did not answer within {} s", VERSION_TIMEOUT.as_secs())]
    Silent { program: PathBuf },
    #[error("{program} --version names no version ({status}): {output}; reinstall vLLM")]
    NoVersion { program: PathBuf, status: std::process::ExitStatus, output: String },
}

/// Takes the program given, or looks for `vllm` in the folders of `path` (the `PATH` variable), and asks its version.
pub async fn find(given: Option<&Path>, path: Option<&OsStr>) -> Result<VllmProgram, VllmError> {
    let program = match given {
        Some(program) if is_executable(program) => std::path::absolute(program).unwrap_or_else(|_| program.to_owned()),
        Some(program) => return Err(VllmError::NotExecutable { program: program.to_owned() }),
        None => path.and_then(on_path).ok_or(VllmError::NotFound)?,
    };
    let version = ask_version(&program).await?;
    Ok(VllmProgram { program: program.to_string_lossy().into_owned(), version })
}

fn on_path(path: &OsStr) -> Option<PathBuf> {
    std::env::split_paths(path).map(|folder| folder.join("vllm")).find(|program| is_executable(program))
}

fn is_executable(program: &Path) -> bool {
    std::fs::metadata(program).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

async fn ask_version(program: &Path) -> Result<VllmVersion, VllmError> {
    let program = || program.to_owned();
    let child = Command::new(program()).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let output = match tokio::time::timeout(VERSION_TIMEOUT, child).await {
        Ok(output) => output.map_err(|source| VllmError::Run { program: program(), source })?,
        Err(_) => return Err(VllmError::Silent { program: program() }),
    };
    // Warnings of its imports may come first, on either stream; the version is the last line that is one.
    let stdout = String::from_utf8_lossy(&output.stdout);
    let version = stdout.lines().rev().find_map(VllmVersion::parse);
    version.ok_or_else(|| {
        let stderr = String::from_utf8_lossy(&output.stderr);
        let said: Vec<&str> = stdout.lines().chain(stderr.lines()).filter(|line| !line.trim().is_empty()).collect();
        let output_text = said[said.len().saturating_sub(OUTPUT_LINES)..].join(" / ");
        VllmError::NoVersion { program: program(), status: output.status, output: output_text }
    })
}
