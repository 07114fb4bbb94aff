//! Scripted workers: each request gets what the test says, and the test sees what came. Raw sockets, so that a worker can
//! also die at any moment.
#![allow(dead_code, reason = "each file of tests uses its own part of this")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Received {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).expect("JSON")
    }
}

/// What a worker does with a request.
#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// A whole answer, with `content-length`.
    Json(u16, String),
    /// These bytes, in turn; then the connection stays open.
    Raw(Vec<Part>),
    /// Hangs up without a word.
    Close,
    /// Never answers; notes when the client leaves.
    Hang,
}

/// A part of a raw answer.
#[derive(Debug, Clone)]
pub(crate) enum Part {
    Bytes(Vec<u8>),
    /// Waits for the test to let it go on.
    Wait(Arc<Semaphore>),
    /// Hangs up.
    Die,
    /// Waits for the client to leave, and notes it.
    Hang,
}

/// The head of an event stream, as uvicorn sends it.
pub(crate) fn stream_head() -> Part {
    let head = "HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\nserver: uvicorn\r\n\
                content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
    Part::Bytes(head.as_bytes().to_vec())
}

/// One chunk.
pub(crate) fn chunk(text: &str) -> Part {
    Part::Bytes(format!("{:x}\r\n{text}\r\n", text.len()).into_bytes())
}

/// The last chunk.
pub(crate) fn last_chunk() -> Part {
    Part::Bytes(b"0\r\n\r\n".to_vec())
}

type Script = Arc<dyn Fn(&Received, usize) -> Reply + Send + Sync>;

/// A worker; its connections end when it is dropped.
pub(crate) struct MockWorker {
    pub(crate) address: SocketAddr,
    seen: Arc<Mutex<Vec<Received>>>,
    /// Clients that left while they were owed an answer.
    left: Arc<AtomicUsize>,
    script: Arc<Mutex<Script>>,
    tasks: JoinSet<()>,
}

#[derive(Clone)]
struct Desk {
    seen: Arc<Mutex<Vec<Received>>>,
    left: Arc<AtomicUsize>,
    script: Arc<Mutex<Script>>,
}

impl MockWorker {
    /// `script` is given each request and its number, from 0. `/health` is answered without it, unless it is told
    /// otherwise by `script` answering health requests itself (see [`MockWorker::start_all`]).
    pub(crate) async fn start(script: impl Fn(&Received, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_all(move |request, number| match request.path.as_str() {
            "/health" => Reply::Json(200, String::new()),
            "/metrics" => Reply::Json(404, String::new()),
            _ => script(request, number),
        })
        .await
    }

    pub(crate) async fn start_all(script: impl Fn(&Received, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::on(listener, script)
    }

    fn on(listener: TcpListener, script: impl Fn(&Received, usize) -> Reply + Send + Sync + 'static) -> Self {
        let address = listener.local_addr().expect("bound");
        let script: Script = Arc::new(script);
        let desk = Desk { seen: Arc::default(), left: Arc::default(), script: Arc::new(Mutex::new(script)) };
        let mut tasks = JoinSet::new();
        let (seen, left, script) = (Arc::clone(&desk.seen), Arc::clone(&desk.left), Arc::clone(&desk.script));
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(converse(stream, desk.clone()));
            }
        });
        Self { address, seen, left, script, tasks }
    }

    /// An address where nobody listens.
    pub(crate) fn nobody() -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        format!("http://{}", listener.local_addr().expect("bound"))
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on.
    pub(crate) fn script(&self, script: impl Fn(&Received, usize) -> Reply + Send + Sync + 'static) {
        let health = move |request: &Received, number: usize| match request.path.as_str() {
            "/health" => Reply::Json(200, String::new()),
            "/metrics" => Reply::Json(404, String::new()),
            _ => script(request, number),
        };
        *self.script.lock().unwrap() = Arc::new(health);
    }

    /// All requests but questions how it is, in order.
    pub(crate) fn seen(&self) -> Vec<Received> {
        self.seen.lock().unwrap().iter().filter(|request| !is_question(request)).cloned().collect()
    }

    /// How often a path was asked for.
    pub(crate) fn asked(&self, path: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|request| request.path == path).count()
    }

    pub(crate) fn left(&self) -> usize {
        self.left.load(Ordering::SeqCst)
    }

    /// Ends the worker with all its connections, as a killed process does.
    pub(crate) async fn kill(mut self) -> SocketAddr {
        self.tasks.shutdown().await;
        self.address
    }

    /// A worker at an address where one was before.
    pub(crate) fn restart(
        address: SocketAddr,
        script: impl Fn(&Received, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(address).expect("the port is free again");
        let healthy = move |request: &Received, number: usize| match request.path.as_str() {
            "/health" => Reply::Json(200, String::new()),
            "/metrics" => Reply::Json(404, String::new()),
            _ => script(request, number),
        };
        Self::on(socket.listen(64).expect("listening"), healthy)
    }
}

/// Asked by the proxy for itself.
fn is_question(request: &Received) -> bool {
    matches!(request.path.as_str(), "/health" | "/metrics")
}

async fn converse(mut stream: TcpStream, desk: Desk) {
    let mut buffer = Vec::new();
    while let Some(request) = read(&mut stream, &mut buffer).await {
        let number = {
            let mut seen = desk.seen.lock().unwrap();
            let number = seen.iter().filter(|seen| !is_question(seen)).count();
            seen.push(request.clone());
            number
        };
        let script = Arc::clone(&desk.script.lock().unwrap());
        let parts = match script(&request, number) {
            Reply::Close => return,
            Reply::Hang => vec![Part::Hang],
            Reply::Raw(parts) => parts,
            Reply::Json(status, body) => {
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 {status} Mock\r\nserver: mock\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
                );
                vec![Part::Bytes([head.into_bytes(), body.into_bytes()].concat())]
            }
        };
        if !answer(&mut stream, parts, &desk).await {
            return;
        }
    }
}

async fn answer(stream: &mut TcpStream, parts: Vec<Part>, desk: &Desk) -> bool {
    for part in parts {
        match part {
            Part::Bytes(bytes) => {
                if stream.write_all(&bytes).await.is_err() {
                    desk.left.fetch_add(1, Ordering::SeqCst);
                    return false;
                }
            }
            Part::Wait(gate) => gate.acquire().await.expect("never closed").forget(),
            Part::Die => return false,
            Part::Hang => {
                let mut rest = [0; 64];
                while stream.read(&mut rest).await.is_ok_and(|bytes| bytes > 0) {}
                desk.left.fetch_add(1, Ordering::SeqCst);
                return false;
            }
        }
    }
    true
}

async fn read(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<Received> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Request::new(&mut headers);
        if let Ok(httparse::Status::Complete(start)) = head.parse(buffer) {
            let headers: Vec<(String, String)> = head
                .headers
                .iter()
                .map(|line| (line.name.to_owned(), String::from_utf8_lossy(line.value).into_owned()))
                .collect();
            let (method, path) = (head.method?.to_owned(), head.path?.to_owned());
            let length = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case("content-length"));
            let length: usize = length.map_or(0, |(_, value)| value.parse().expect("a number"));
            while buffer.len() < start + length {
                if stream.read_buf(buffer).await.ok()? == 0 {
                    return None;
                }
            }
            let body = buffer[start..start + length].to_vec();
            buffer.drain(..start + length);
            return Some(Received { method, path, headers, body });
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

/// Waits until `holds`, for a bounded time.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it never came about that {what}");
}
