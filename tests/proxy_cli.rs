//! `pdlink proxy` as a program: which command lines it takes, how it refuses others, what it says of itself.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::process::Stdio;

use proxied::{good_decode, good_prefill};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pdlink"));
    command.args(["proxy", "--host", "127.0.0.1", "--port", "0"]).args(words);
    command.env_remove("PDLINK_SECRET_FILE").env_remove("PDLINK_ADMIN_TOKEN").kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A proxy that is ready: its ready line, and what it logs from then on.
struct Running {
    ready: String,
    _log: BufReader<ChildStderr>,
    _child: Child,
}

impl Running {
    async fn start(words: &[&str]) -> Self {
        let mut child = command(words).spawn().expect("starts");
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let mut ready = String::new();
        BufReader::new(stdout).read_line(&mut ready).await.expect("a line");
        Self { ready, _log: BufReader::new(stderr), _child: child }
    }

    fn base_url(&self) -> &str {
        self.ready.split(' ').nth(1).and_then(|url| url.strip_suffix("/v1")).unwrap_or_else(|| panic!("{}", self.ready))
    }
}

#[tokio::test]
async fn a_wrong_command_line_is_refused_with_2_and_the_flag_it_gave() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["--timeout", "0"], &["--timeout 0", "above 0"]),
        (&["--timeout", "inf"], &["--timeout inf", "above 0"]),
        (&["--timeout", "nan"], &["--timeout nan", "above 0"]),
        (&["--timeout", "soon"], &["--timeout soon", "a number"]),
        (&["--health-check-interval", "0"], &["--health-check-interval 0"]),
        (&["--health-check-timeout", "0"], &["--health-check-timeout 0"]),
        (&["--max-generate-attempts", "0"], &["--max-generate-attempts 0", "at least 1"]),
        (&["--health-check-failure-threshold", "0"], &["--health-check-failure-threshold"]),
        (&["--prefill", "https://a:1"], &["https://a:1", "http://HOST:PORT"]),
        (&["--prefill", "a:1"], &["a:1", "http://HOST:PORT"]),
        (&["--prefill", "http://a:1", "http://a:1/v1"], &["http://a:1", "given twice"]),
        (&["--prefill", "http://a:1", "--prefill-kv-addrs", "a:5,b:5"], &["1 prefill workers but 2 KV addresses"]),
    ];
    for (words, parts) in cases {
        let words = [&["--decode", "http://127.0.0.1:1"], *words].concat();
        let output = command(&words).output().await.expect("runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{words:?}: {said}");
        let errors = said.lines().filter(|line| line.starts_with("error:")).count();
        assert_eq!(errors, 1, "{words:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_may_be_named_as_their_ready_lines_name_them() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let (at_prefill, at_decode) = (format!("{}/v1", prefill.url()), format!("{}/v1/", decode.url()));
    let proxy = Running::start(&["--prefill", &at_prefill, "--decode", &at_decode]).await;
    let url = format!("{}/v1/completions", proxy.base_url());
    let client = reqwest::Client::new();
    let answer = client.post(url).body(r#"{"prompt":"a"}"#).send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
    assert_eq!((prefill.seen().len(), decode.seen().len()), (1, 1));
}
