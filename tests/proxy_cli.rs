//! `pdlink proxy` as a program: which command lines it takes, how it refuses others, what it says of itself.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::process::Stdio;

use mock_worker::{MockWorker, Reply};
use pdlink::security::Secret;
use proxied::{FakeRuntime, PATIENCE, good_decode, good_prefill};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStderr, Command};
use tokio::time::timeout;

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
    log: BufReader<ChildStderr>,
    _child: Child,
}

impl Running {
    async fn start(words: &[&str]) -> Self {
        let mut child = command(words).spawn().expect("starts");
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let mut ready = String::new();
        BufReader::new(stdout).read_line(&mut ready).await.expect("a line");
        Self { ready, log: BufReader::new(stderr), _child: child }
    }

    /// The first line of the log with `text` in it, and those before it.
    async fn logs(&mut self, text: &str) -> String {
        let mut said = String::new();
        while !said.lines().last().is_some_and(|line| line.contains(text)) {
            let read = timeout(PATIENCE, self.log.read_line(&mut said)).await;
            assert!(read.is_ok_and(|read| read.is_ok_and(|bytes| bytes > 0)), "no {text:?} in: {said}");
        }
        said
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

#[tokio::test(flavor = "multi_thread")]
async fn request_ids_are_said_and_workers_that_hardly_read_them_are_named_once() {
    let versioned = |version: &'static str| {
        MockWorker::start(move |_, _| Reply::Json(200, format!(r#"{{"version":"{version}"}}"#)))
    };
    let (old, new, pdlink) = (versioned("0.23.1").await, versioned("0.33.0+cu130").await, versioned("0.1.0").await);
    let runtime = FakeRuntime::start(&Secret::loopback()).await;
    let prefill = format!("{},{}", old.url(), new.url());
    let nowhere = "127.0.0.1:1,127.0.0.1:1";
    let mut proxy = Running::start(
        &[
            ("--prefill-urls", prefill.as_str()),
            ("--prefill-kv-addrs", nowhere),
            ("--decode-urls", &pdlink.url()),
            ("--decode-kv-addrs", &runtime.address),
        ]
        .map(|(flag, value)| [flag, value])
        .concat(),
    )
    .await;
    assert!(proxy.ready.contains("P2pNcclConnector, request ids, for vLLM up to 0.23)"), "{}", proxy.ready);
    let mut said = proxy.logs("--connector-impl native").await;
    said += &proxy.logs("--connector-impl native").await;
    assert!(said.contains("it is vLLM 0.33.0+cu130") && said.contains(&runtime.address), "{said}");
    // Requests go on, and each worker was asked its version once.
    let url = format!("{}/v1/completions", proxy.base_url());
    let answer = reqwest::Client::new().post(url).body(r#"{"prompt":"a"}"#).send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
    for worker in [&old, &new, &pdlink] {
        let asked = || worker.seen().iter().filter(|request| request.path == "/version").count();
        mock_worker::eventually("asked its version", || asked() == 1).await;
    }
}
