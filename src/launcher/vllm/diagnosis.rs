//! Why a vLLM failed, from its log: the line that names the root cause, and what to do about it.
//!
//! vLLM's processes each end with a traceback, and only the first of them knows why: the others say that somebody else
//! failed. The cause is the last exception of the first chain of tracebacks that is not such an echo; a cause that is known
//! to be one wins over it, wherever it stands.

use std::fmt;

/// What went wrong, and the mend where one is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnosis {
    /// The line of the log that says it, without its prefix.
    pub cause: String,
    pub mend: Option<&'static str>,
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)?;
        self.mend.map_or(Ok(()), |mend| write!(f, "; {mend}"))
    }
}

/// Longest cause that is shown, in characters: some exceptions print whole configurations.
const CAUSE_CHARS_MAX: usize = 600;

/// Failures that are known: words of the message, all of which it has, and the mend.
const KNOWN: &[(&[&str], &str)] = &[
    (
        &["out of memory", "CUDA"],
        "lower `inference.gpu_memory_utilization` or `inference.model.max_model_len`, spread the model over more GPUs (`tp`), or \
         end what else is on that GPU",
    ),
    (&["Free memory on device"], "something else is on that GPU: end it, or lower `inference.gpu_memory_utilization`"),
    (
        &["is less than desired CPU memory utilization"],
        "give the KV cache a size of its own: `inference.vllm.kv_cache_memory_bytes = \"2G\"`",
    ),
    (
        &["is less than requested memory for kv"],
        "lower `inference.vllm.kv_cache_memory_bytes`, or free memory on this host",
    ),
    (
        &["No available memory for the cache blocks"],
        "raise `inference.gpu_memory_utilization`, or spread the model over more GPUs (`tp`)",
    ),
    (
        &["KV cache is needed, which is larger than the available"],
        "lower `inference.model.max_model_len`, or give the KV cache more by `inference.gpu_memory_utilization` or \
         `inference.vllm.kv_cache_memory_bytes`",
    ),
    (
        &["is greater than the derived max_model_len"],
        "lower `inference.model.max_model_len`: the model was made for shorter texts",
    ),
    (
        &["unrecognized arguments"],
        "this version of vLLM has no such argument: take it out of `[inference.vllm]`, or write it as this version does",
    ),
    (
        &["Invalid repository ID or local path"],
        "check `inference.model.name`: it is neither a folder here nor a model of the hub that can be reached",
    ),
    (
        &["is not a valid model identifier"],
        "check `inference.model.name`; a private model needs HF_TOKEN in the environment",
    ),
    (&["Cannot find any model weights"], "the folder of `inference.model.name` has no weights"),
    (
        &["outgoing traffic has been disabled"],
        "HF_HUB_OFFLINE is set and the model is not in the cache: fetch it first, or name its folder in `inference.model.name`",
    ),
    (&["No module named 'pdlink"], "install pdlink's wheel in vLLM's environment (`pip install pdlink-*.whl`)"),
    (
        &["NIXL is not available"],
        "install NIXL in vLLM's environment (`pip install nixl`), or set `pd_disagg.connector_impl = \"native\"`",
    ),
    (
        &["No module named 'nixl"],
        "install NIXL in vLLM's environment (`pip install nixl`), or set `pd_disagg.connector_impl = \"native\"`",
    ),
    (&["Unsupported connector type"], "this version of vLLM ships no such connector; see `pd_disagg.connector_impl`"),
    (
        &["expandable_segments"],
        "take `expandable_segments:True` out of PYTORCH_CUDA_ALLOC_CONF: no KV connector works with it",
    ),
    (
        &["Address already in use"],
        "a port was taken after pdlink let it go: run it again, or set the ports in `[pd_disagg]` elsewhere",
    ),
    (
        &["No CUDA GPUs are available"],
        "the GPU ids in `[pd_disagg]` are not on this host, or the driver is not loaded (`nvidia-smi`)",
    ),
    (&["invalid device ordinal"], "a GPU id in `[pd_disagg]` is not on this host (`nvidia-smi -L`)"),
    (&["Failed to infer device type"], "vLLM sees no GPU here: check `nvidia-smi`, or install vLLM's build for CPU"),
    (&["NVIDIA driver on your system is too old"], "update the driver, or install a vLLM built for an older CUDA"),
    (&["no kernel image is available"], "this build of vLLM has no code for that GPU: install one that has"),
    (&["Cannot use FlashAttention", "not supported"], "choose another backend by `inference.vllm.attention_backend`"),
    (
        &["No space left on device"],
        "a disk or /dev/shm is full; in a container give it more shared memory (`--shm-size`)",
    ),
    (&["nixl", "NIXL_ERR_BACKEND"], "UCX found no transport: leave UCX_TLS unset, or have `tcp` in it"),
    (
        &["does not match", "local world size"],
        "VLLM_CPU_OMP_THREADS_BIND needs one list for each rank, separated by `|`",
    ),
];

/// Exceptions that only say that another process failed, or that follow from the end.
const ECHOES: &[&str] = &[
    "Engine core initialization failed",
    "Frontend process failed during engine core initialization",
    "WorkerProc initialization failed",
    "EngineCore encountered an issue",
    "EngineDeadError",
    "Worker failed with error",
    "Executor failed",
    "cancelled",
    "CancelledError",
    "KeyboardInterrupt",
    "SystemExit",
    "BrokenPipeError",
    "Connection closed by peer",
    "Can only join a child process",
    "ContextTerminated",
];

/// Finds the cause in the lines of a log, oldest first.
pub fn diagnose<'l>(lines: impl IntoIterator<Item = &'l str>) -> Option<Diagnosis> {
    let lines: Vec<&str> = lines.into_iter().map(bare).collect();
    let at = known(&lines).or_else(|| unknown(&lines))?;
    let cause = whole(&lines, at);
    let mend = KNOWN.iter().find(|(words, _)| has_all(&cause, words)).map(|(_, mend)| *mend);
    Some(Diagnosis { cause, mend })
}

fn has_all(line: &str, words: &[&str]) -> bool {
    words.iter().all(|words| line.contains(words))
}

/// The first line that names a failure we know, said as an error.
fn known(lines: &[&str]) -> Option<usize> {
    let is_known = |line: &str| KNOWN.iter().any(|(words, _)| has_all(line, words));
    let says_error = |line: &str| is_exception(line) || line.contains("error: ") || line.contains("alue error, ");
    let at = lines.iter().position(|line| says_error(line) && is_known(line))?;
    // The message of a validation error is on the line after its name.
    let named_before = at > 0 && lines[at].starts_with(' ') && is_exception(lines[at - 1]);
    Some(if named_before { at - 1 } else { at })
}

/// The last exception of the first chain of tracebacks that is no echo.
fn unknown(lines: &[&str]) -> Option<usize> {
    let mut found = None;
    let mut in_chain = false;
    for (at, line) in lines.iter().enumerate() {
        if line.starts_with("Traceback (most recent call last)") {
            if found.is_some() && !in_chain {
                break;
            }
            in_chain = false;
        } else if line.starts_with("During handling of the above") || line.starts_with("The above exception was") {
            in_chain = true;
        } else if is_exception(line) && !ECHOES.iter().any(|echo| line.contains(echo)) {
            found = Some(at);
        }
    }
    found
}

/// `package.SomeError: text` or `vllm: error: text`, with nothing before it.
fn is_exception(line: &str) -> bool {
    let Some((name, _)) = line.split_once(':') else {
        return false;
    };
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '.' || c == '_');
    let last = name.rsplit('.').next().unwrap_or_default();
    let names_failure = ["Error", "Exception", "Interrupt", "Exit", "Failed"].iter().any(|end| last.ends_with(end));
    (is_name && names_failure) || (line.starts_with("vllm") && line.contains(": error: "))
}

/// The exception with what it says on the following lines, where its own says nothing yet.
fn whole(lines: &[&str], at: usize) -> String {
    let mut cause = lines[at].trim().to_owned();
    if cause.contains("validation error") || cause.ends_with(':') {
        for line in lines.iter().skip(at + 1).take(2).take_while(|line| line.starts_with(' ')) {
            cause.push(' ');
            cause.push_str(line.trim());
        }
    }
    match cause.char_indices().nth(CAUSE_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &cause[..end]),
        None => cause,
    }
}

/// A line without what vLLM puts before each: `(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906] `. Indentation behind
/// the prefix stays, since it tells the frames of a traceback from its exception.
fn bare(line: &str) -> &str {
    let mut rest = line;
    if let Some((process, after)) = rest.strip_prefix('(').and_then(|rest| rest.split_once(") "))
        && process.contains("pid=")
    {
        rest = after;
    }
    let level = ["ERROR ", "CRITICAL ", "WARNING ", "INFO "].iter().find_map(|level| rest.strip_prefix(level));
    if let Some((_, after)) = level.and_then(|stamped| stamped.split_once(".py:"))
        && let Some((_, text)) = after.split_once(']')
    {
        return text.strip_prefix(' ').unwrap_or(text);
    }
    // Workers of older versions mark the rank again.
    rest.strip_prefix("[rank0]: ").unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(text: &str) -> Option<(String, bool)> {
        diagnose(text.lines()).map(|diagnosis| (diagnosis.cause, diagnosis.mend.is_some()))
    }

    #[test]
    fn the_root_cause_is_told_from_its_echoes() {
        let out_of_memory = "\
(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906]   File \"/x/core.py\", line 849, in run
(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906]     raise ValueError(\"ValueError: not this\")
(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.
(APIServer pid=3) Traceback (most recent call last):
(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
";
        let told = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB.";
        assert_eq!(cause(out_of_memory), Some((told.to_owned(), true)));

        let chained = "\
Traceback (most recent call last):
requests.exceptions.HTTPError: 404 Client Error
The above exception was the direct cause of the following exception:

Traceback (most recent call last):
OSError: no/such is not a local folder and is not a valid model identifier listed on 'https://huggingface.co/models'
";
        assert!(cause(chained).is_some_and(|(cause, mend)| cause.starts_with("OSError: no/such") && mend));

        let plain = "\
(Worker_TP0 pid=8) ERROR 11-22 21:10:42 [multiproc.py:1] Traceback (most recent call last):
(Worker_TP0 pid=8) ERROR 11-22 21:10:42 [multiproc.py:1] SomeOddError: the reason
(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 21:10:42 [core.py:906] Exception: WorkerProc initialization failed due to an exception
(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7) AnotherError: what came of it
";
        assert_eq!(cause(plain), Some(("SomeOddError: the reason".to_owned(), false)));
    }

    #[test]
    fn messages_on_the_next_line_and_usage_errors_are_told() {
        let invalid = "\
Traceback (most recent call last):
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Invalid repository ID or local path specified: '/nope'. Please verify [type=value_error]
    For further information visit https://errors.pydantic.dev/2.12/v/value_error
";
        let (cause_of_invalid, mend) = cause(invalid).expect("a cause");
        assert!(cause_of_invalid.contains("ModelConfig Value error, Invalid repository ID"), "{cause_of_invalid}");
        assert!(mend);
        let usage = "usage: vllm serve [model_tag] [options]\nvllm: error: unrecognized arguments: --no-such 1\n";
        assert_eq!(cause(usage), Some(("vllm: error: unrecognized arguments: --no-such 1".to_owned(), true)));
    }

    #[test]
    fn a_log_without_a_failure_has_no_cause() {
        for text in ["", "INFO 11-22 21:10:42 [a.py:1] all is well\n", "http://host: Error: none\nline: 4\n"] {
            assert_eq!(cause(text), None, "case: {text}");
        }
        let long = format!("ValueError: {}", "x".repeat(5000));
        assert!(cause(&long).is_some_and(|(cause, _)| cause.chars().count() == CAUSE_CHARS_MAX + 1));
    }
}
