//! A proxy before scripted workers, and clients that see its answers byte by byte.
#![allow(dead_code, reason = "each file of tests uses its own part of this")]

use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pdlink::config::{ProxyConfig, TelemetryConfig, WeightsConfig};
use pdlink::control::{
    self, AbortAnswer, AdminAnswer, AdminReply, AdminRequest, Hello, Liveness, Part, RankRecords, Role,
};
use pdlink::proxy::{Connector, Mode, ProxyHandle, ProxySetup, WorkerAddress, serve};
use pdlink::security::Secret;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::mock_worker::{MockWorker, Received, Reply};

/// No wait of a test is longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// What prefill answers when all is well. The parameters are odd on purpose: they must arrive as they are.
pub(crate) const PARAMS: &str = r#"{"do_remote_prefill":true, "remote_block_ids":[[1,2]],"remote_host":"127.0.0.1","remote_port":1,"extra":{"b":1e2}}"#;

pub(crate) fn prefill_answer() -> Reply {
    Reply::Json(200, format!(r#"{{"id":"p","choices":[{{"text":"x"}}],"kv_transfer_params":{PARAMS},"usage":{{}}}}"#))
}

pub(crate) fn decode_answer() -> Reply {
    Reply::Json(200, r#"{"id":"d","choices":[{"text":"hello"}]}"#.to_owned())
}

/// A prefill worker that always answers.
pub(crate) async fn good_prefill() -> MockWorker {
    MockWorker::start(|_, _| prefill_answer()).await
}

/// A decode worker that always answers.
pub(crate) async fn good_decode() -> MockWorker {
    MockWorker::start(|_, _| decode_answer()).await
}

/// Settings for tests: everything that could wait is short.
pub(crate) fn config() -> ProxyConfig {
    ProxyConfig {
        health_interval_s: 0.1,
        health_timeout_s: 2.0,
        threads: Some(2),
        quarantine_after_failures: 100,
        ..ProxyConfig::default()
    }
}

/// A proxy to be started.
pub(crate) struct Setup {
    pub(crate) config: ProxyConfig,
    pub(crate) weights: WeightsConfig,
    pub(crate) telemetry: TelemetryConfig,
    pub(crate) connector: Connector,
    pub(crate) mode: Mode,
    pub(crate) prefill: Vec<WorkerAddress>,
    pub(crate) decode: Vec<WorkerAddress>,
    pub(crate) secret: Secret,
    pub(crate) admin_port: bool,
    /// Some worker is away, or comes late: do not wait for the proxy's own health.
    pub(crate) unwell: bool,
}

impl Setup {
    pub(crate) fn new(prefill: &[&MockWorker], decode: &[&MockWorker]) -> Self {
        let addresses =
            |workers: &[&MockWorker]| workers.iter().map(|worker| WorkerAddress::new(worker.url())).collect();
        Self {
            config: config(),
            weights: WeightsConfig::default(),
            telemetry: TelemetryConfig { watch_interval_s: 0.1, ..TelemetryConfig::default() },
            connector: Connector::Native,
            mode: Mode::Disaggregated,
            prefill: addresses(prefill),
            decode: addresses(decode),
            secret: Secret::loopback(),
            admin_port: false,
            unwell: false,
        }
    }

    /// Starts it and waits until every worker has been heard of or is known to be away.
    pub(crate) async fn start(self) -> Proxied {
        let unwell = self.unwell;
        let listen = || TcpListener::bind("127.0.0.1:0").expect("a free port");
        let setup = ProxySetup {
            listener: listen(),
            admin_listener: self.admin_port.then(listen),
            config: self.config,
            telemetry: self.telemetry,
            weights: self.weights,
            prefill: self.prefill,
            decode: self.decode,
            connector: self.connector,
            mode: self.mode,
            secret: self.secret,
            registry: Default::default(),
            health_failures_max: 2,
        };
        let handle = serve(setup).expect("a valid setup");
        let proxied = Proxied { base: format!("http://{}", handle.address()), handle: Some(handle) };
        for _ in 0..500 {
            if unwell {
                break;
            }
            let ready = reqwest::get(format!("{}/health", proxied.base)).await;
            if ready.is_ok_and(|answer| answer.status() == 200) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        proxied
    }
}

/// A running proxy.
pub(crate) struct Proxied {
    pub(crate) base: String,
    handle: Option<ProxyHandle>,
}

impl Proxied {
    pub(crate) async fn between(prefill: &[&MockWorker], decode: &[&MockWorker]) -> Self {
        Setup::new(prefill, decode).start().await
    }

    pub(crate) fn handle(&self) -> &ProxyHandle {
        self.handle.as_ref().expect("running")
    }

    pub(crate) fn take_handle(&mut self) -> ProxyHandle {
        self.handle.take().expect("running")
    }

    pub(crate) async fn post(&self, path: &str, body: impl Into<String>) -> Answer {
        self.send(reqwest::Method::POST, path, &[], body.into()).await
    }

    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.send(reqwest::Method::GET, path, &[], String::new()).await
    }

    pub(crate) async fn send(
        &self,
        method: reqwest::Method,
        path: &str,
        headers: &[(&str, &str)],
        body: String,
    ) -> Answer {
        let mut request = reqwest::Client::new().request(method, format!("{}{path}", self.base)).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.timeout(PATIENCE).send().await.expect("an answer");
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        Answer { status, headers, body: response.text().await.expect("a whole body") }
    }

    /// A connection of a client that does as it likes.
    pub(crate) async fn connect(&self) -> RawClient {
        let address = self.base.strip_prefix("http://").expect("ours");
        RawClient { stream: TcpStream::connect(address).await.expect("listening"), received: Vec::new() }
    }

    /// The value of a metric: the sum over its labels.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let page = self.get("/metrics").await.body;
        let lines = page.lines().filter(|line| line.starts_with(name));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}

/// A whole answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("text"))
    }

    /// Checks that this is an error in OpenAI's form and returns its message.
    pub(crate) fn error(&self) -> String {
        let body = self.json();
        let error = &body["error"];
        assert_eq!(error["code"], self.status, "{body}");
        assert!(error["type"].is_string() && error.get("param").is_some(), "{body}");
        error["message"].as_str().expect("a message").to_owned()
    }
}

/// A client on a bare socket.
pub(crate) struct RawClient {
    pub(crate) stream: TcpStream,
    pub(crate) received: Vec<u8>,
}

impl RawClient {
    pub(crate) async fn send(&mut self, path: &str, body: &str) {
        let length = body.len();
        let request = format!(
            "POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        self.stream.write_all(request.as_bytes()).await.expect("the proxy reads");
    }

    /// Reads until `text` has come.
    pub(crate) async fn until(&mut self, text: &str) {
        let mut from = 0;
        while memchr::memmem::find(&self.received[from..], text.as_bytes()).is_none() {
            from = self.received.len().saturating_sub(text.len());
            let read = timeout(PATIENCE, self.stream.read_buf(&mut self.received)).await.expect("in time");
            assert!(read.expect("no reset") > 0, "ended before `{text}`: {}", self.text());
        }
    }

    /// Reads to the end of the connection, whatever that is.
    pub(crate) async fn read_to_end(&mut self) {
        while timeout(PATIENCE, self.stream.read_buf(&mut self.received)).await.expect("in time").is_ok_and(|n| n > 0) {
        }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.received).into_owned()
    }

    /// The chunks after the head, decoded; and whether the last one has come.
    pub(crate) fn chunks(&self) -> (Vec<u8>, bool) {
        let start = memchr::memmem::find(&self.received, b"\r\n\r\n").expect("a head") + 4;
        let (mut rest, mut data) = (&self.received[start..], Vec::new());
        loop {
            let Ok(httparse::Status::Complete((line, size))) = httparse::parse_chunk_size(rest) else {
                return (data, false);
            };
            let size = usize::try_from(size).expect("small");
            if size == 0 {
                return (data, rest[line..].starts_with(b"\r\n"));
            }
            if rest.len() < line + size + 2 {
                return (data, false);
            }
            data.extend_from_slice(&rest[line..line + size]);
            rest = &rest[line + size + 2..];
        }
    }
}

/// A worker's runtime as far as the proxy talks to it: notes what is aborted.
pub(crate) struct FakeRuntime {
    pub(crate) address: String,
    aborted: Arc<Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

struct Notes(Arc<Mutex<Vec<String>>>);

impl control::AdminHandler for Notes {
    fn ask(&self, request: AdminRequest, reply: AdminReply) {
        reply.send(&match request {
            AdminRequest::Abort(id) => {
                self.0.lock().unwrap().push(id.to_string());
                AdminAnswer::Abort(AbortAnswer::Aborted)
            }
            AdminRequest::Records(_) => AdminAnswer::Records(RankRecords::default()),
            other => AdminAnswer::Refused(format!("{other:?}")),
        });
    }
}

impl FakeRuntime {
    pub(crate) async fn start(secret: &Secret) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let aborted = Arc::new(Mutex::new(Vec::new()));
        let hello = Hello {
            part: Part::Engine,
            engine_id: "fake".to_owned(),
            incarnation: 1,
            role: Role::Prefill,
            payload: Vec::new(),
        };
        let identity =
            control::Identity { secret: secret.clone(), versions: control::VERSIONS, hello, timeout: PATIENCE };
        let liveness = Liveness { ping_interval: Duration::from_secs(1), peer_timeout: Duration::from_secs(5) };
        let notes = Arc::new(Notes(Arc::clone(&aborted)));
        let welcome = move |_: Hello, connection: &control::Connection| -> control::Sink {
            control::admin_sink(connection, Arc::clone(&notes) as Arc<dyn control::AdminHandler>)
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(control::serve(listener, Arc::new(identity), liveness, Arc::new(welcome)));
        Self { address, aborted, _tasks: tasks }
    }

    pub(crate) fn aborted(&self) -> Vec<String> {
        self.aborted.lock().unwrap().clone()
    }
}

/// The transfer id in a prefill leg's body.
pub(crate) fn transfer_of(prefill: &Received) -> String {
    prefill.json()["kv_transfer_params"]["pdlink"]["transfer_id"].as_str().expect("an id").to_owned()
}
