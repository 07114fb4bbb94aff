//! How far a starting vLLM is, read from its log. The one place that knows those lines, of 0.24 to 0.33.
//!
//! A line is known by a few words in it, wherever they stand: prefixes (process, level, time, file) differ between versions
//! and between the processes of one worker. A line that is not known says nothing; readiness itself is asked over HTTP.

use std::fmt;

/// What a line of the log tells of the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// The server's process has imported its packages and reads the model's configuration.
    Config,
    /// The engine's process has imported its packages and builds the engine.
    Engine,
    /// Weights are read; how much of them where it is said.
    Weights { percent: Option<u8> },
    /// Weights are in memory.
    WeightsLoaded,
    /// `torch.compile` and its warm-up.
    Compiling,
    /// The KV cache is allocated.
    KvCache { tokens: u64 },
    /// CUDA graphs are captured; how many of them where it is said.
    Capturing { percent: Option<u8> },
    /// The engine stands; the HTTP server comes.
    EngineUp,
    /// The HTTP server starts.
    Http,
}

impl Sign {
    /// The name that machines are told.
    pub fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Engine => "engine",
            Self::Weights { .. } => "weights",
            Self::WeightsLoaded => "weights_loaded",
            Self::Compiling => "compiling",
            Self::KvCache { .. } => "kv_cache",
            Self::Capturing { .. } => "capturing",
            Self::EngineUp => "engine_up",
            Self::Http => "http",
        }
    }

    /// Whether both are of the same part of the start.
    pub fn is_same_part(self, other: Self) -> bool {
        self.name() == other.name()
    }

    /// How much of the part is done, where vLLM says it.
    pub fn percent(self) -> Option<u8> {
        match self {
            Self::Weights { percent } | Self::Capturing { percent } => percent,
            _ => None,
        }
    }
}

impl fmt::Display for Sign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Config => write!(f, "reading the model's configuration")?,
            Self::Engine => write!(f, "building the engine")?,
            Self::Weights { .. } => write!(f, "loading weights")?,
            Self::WeightsLoaded => write!(f, "weights loaded")?,
            Self::Compiling => write!(f, "compiling")?,
            Self::KvCache { tokens } => write!(f, "KV cache of {} tokens", grouped(*tokens))?,
            Self::Capturing { .. } => write!(f, "capturing CUDA graphs")?,
            Self::EngineUp => write!(f, "engine up")?,
            Self::Http => write!(f, "starting to serve")?,
        }
        self.percent().map_or(Ok(()), |percent| write!(f, ", {percent} %"))
    }
}

/// `16,384`
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Reads one line of the log.
pub fn read(line: &str) -> Option<Sign> {
    let has = |words: &str| line.contains(words);
    if has("KV cache size:") {
        return tokens(line).map(|tokens| Sign::KvCache { tokens });
    }
    // Each loader names its bar differently: by the format, by the streamer, by its threads.
    if has("checkpoint shards:") || has("Loading safetensors using") || has("Multi-thread loading") {
        return Some(Sign::Weights { percent: percent(line) });
    }
    // Of the model, of a draft model, of prefill and of decode.
    if has("Capturing ") && has("CUDA graphs") {
        return Some(Sign::Capturing { percent: percent(line) });
    }
    let known: &[(&[&str], Sign)] = &[
        (&["non-default args:", "Resolved architecture:"], Sign::Config),
        (&["Initializing a V1 LLM engine", "Initializing an LLM engine"], Sign::Engine),
        (&["Starting to load model", "Loading model from scratch"], Sign::Weights { percent: None }),
        (&["Loading weights took", "Model loading took"], Sign::WeightsLoaded),
        (
            &[
                "Starting torch.compile",
                "Dynamo bytecode transform time",
                "Compiling a graph for",
                "Compile and warming up model",
                "Warming up model for the compilation",
            ],
            Sign::Compiling,
        ),
        (&["init engine (profile, create kv cache"], Sign::EngineUp),
        (&["Starting vLLM API server", "Starting vLLM server", "Application startup complete"], Sign::Http),
    ];
    known.iter().find(|(words, _)| words.iter().any(|words| has(words))).map(|(_, sign)| *sign)
}

/// The number before the word `tokens`: `GPU KV cache size: 83,024 tokens`.
fn tokens(line: &str) -> Option<u64> {
    let (_, after) = line.split_once("KV cache size:")?;
    let (number, _) = after.split_once("tokens")?;
    number.trim().replace([',', '_'], "").parse().ok()
}

/// The first `NN%` of a progress bar.
fn percent(line: &str) -> Option<u8> {
    let (before, _) = line.split_once('%')?;
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok().filter(|percent| *percent <= 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_all_versions_are_known_by_their_words() {
        let engine = "(EngineCore_DP0 pid=212) INFO 10-06 12:00:40";
        let cases = [
            (
                format!("{engine} [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='M'"),
                Some(Sign::Engine),
            ),
            (
                format!("{engine} [gpu_model_runner.py:5040] Starting to load model M..."),
                Some(Sign::Weights { percent: None }),
            ),
            (
                "Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:01<00:01, 1.32it/s]".to_owned(),
                Some(Sign::Weights { percent: Some(50) }),
            ),
            (
                "Multi-thread loading shards: 100% Completed | 4/4".to_owned(),
                Some(Sign::Weights { percent: Some(100) }),
            ),
            (format!("{engine} [default_loader.py:272] Loading weights took 3.22 seconds"), Some(Sign::WeightsLoaded)),
            (
                format!("{engine} [gpu_model_runner.py:1801] Model loading took 14.2488 GiB and 5.1 seconds"),
                Some(Sign::WeightsLoaded),
            ),
            (
                format!("{engine} [backends.py:319] Compiling a graph for compile range (1, 2048) takes 6.40 s"),
                Some(Sign::Compiling),
            ),
            (format!("{engine} [backends.py:690] Dynamo bytecode transform time: 4.59 s"), Some(Sign::Compiling)),
            (
                format!("{engine} [kv_cache_utils.py:1307] GPU KV cache size: 83,024 tokens"),
                Some(Sign::KvCache { tokens: 83_024 }),
            ),
            (
                format!(
                    "{engine} [kv_cache_utils.py:2327] CPU KV cache size: 16,384 tokens, Maximum concurrency for 2,048 tokens per request: 8.00x"
                ),
                Some(Sign::KvCache { tokens: 16_384 }),
            ),
            (
                "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  36%|███▋      | 4/11 [00:00<00:01]"
                    .to_owned(),
                Some(Sign::Capturing { percent: Some(36) }),
            ),
            (
                "(APIServer pid=9) INFO 11-22 21:09:55 [api_utils.py:286] non-default args: {}".to_owned(),
                Some(Sign::Config),
            ),
            ("Capturing prefill CUDA graphs (PIECEWISE):   0%|".to_owned(), Some(Sign::Capturing { percent: Some(0) })),
            (
                format!("{engine} [core.py:402] init engine (profile, create kv cache, warmup model) took 1.10 s"),
                Some(Sign::EngineUp),
            ),
            (
                "(APIServer pid=9) INFO 11-22 21:10:33 [entry.py:140] Starting vLLM server on http://127.0.0.1:8100"
                    .to_owned(),
                Some(Sign::Http),
            ),
            (
                "INFO 10-06 12:00:41 [api_server.py:1971] Starting vLLM API server 0 on http://0.0.0.0:8000".to_owned(),
                Some(Sign::Http),
            ),
            ("GPU KV cache size: many tokens".to_owned(), None),
            ("INFO:     127.0.0.1:50178 - \"GET /health HTTP/1.1\" 200 OK".to_owned(), None),
            (String::new(), None),
        ];
        for (line, want) in cases {
            assert_eq!(read(&line), want, "case: {line}");
        }
    }

    #[test]
    fn signs_read_well() {
        assert_eq!(Sign::Weights { percent: Some(5) }.to_string(), "loading weights, 5 %");
        assert_eq!(Sign::KvCache { tokens: 1_234_567 }.to_string(), "KV cache of 1,234,567 tokens");
        assert_eq!((grouped(0), grouped(999), grouped(1000)), ("0".to_owned(), "999".to_owned(), "1,000".to_owned()));
    }
}
