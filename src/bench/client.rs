//! A small HTTP/1.1 client for scenarios: one connection a request, the body as it comes, every wait bounded.

use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, StatusCode, header, request};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// An answer whose head has come. Dropping it closes the connection, as a client that leaves does.
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    body: Incoming,
    // Drives the connection; aborted on drop.
    _connection: JoinSet<()>,
}

impl Answer {
    /// The next piece of the body, `None` at its proper end. A connection that breaks is an error.
    pub async fn piece(&mut self, patience: Duration) -> anyhow::Result<Option<Bytes>> {
        loop {
            let frame = timeout(patience, self.body.frame()).await.context("the body stood still")?;
            match frame.transpose().context("the body broke off")? {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    /// All of the body.
    pub async fn text(mut self, patience: Duration) -> anyhow::Result<String> {
        let mut text = Vec::new();
        while let Some(piece) = self.piece(patience).await? {
            text.extend_from_slice(&piece);
        }
        String::from_utf8(text).context("the body is not UTF-8")
    }
}

/// Sends one request to `addr` (`host:port`) and waits for the head of the answer.
pub async fn send(
    addr: &str,
    method: Method,
    path: &str,
    body: Option<Bytes>,
    patience: Duration,
) -> anyhow::Result<Answer> {
    let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    exchange(addr, request, body, patience).await
}

/// As [`send`], with this token if there is one.
pub async fn send_as(
    addr: &str,
    method: Method,
    path: &str,
    body: Bytes,
    token: Option<&str>,
    patience: Duration,
) -> anyhow::Result<Answer> {
    let mut request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    exchange(addr, request, Some(body), patience).await
}

/// Sends a `GET`, with this token if there is one.
pub async fn get(addr: &str, path: &str, token: Option<&str>, patience: Duration) -> anyhow::Result<Answer> {
    let mut request = Request::builder().method(Method::GET).uri(path);
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    exchange(addr, request, None, patience).await
}

async fn exchange(
    addr: &str,
    request: request::Builder,
    body: Option<Bytes>,
    patience: Duration,
) -> anyhow::Result<Answer> {
    let stream = timeout(patience, TcpStream::connect(addr)).await.context("connecting took too long")??;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        // An error of the connection reaches the reader of the body; here it has nobody else to tell.
        let _ = connection.await;
    });
    let request = request.header(header::HOST, addr).body(Full::new(body.unwrap_or_default()))?;
    let response = timeout(patience, sender.send_request(request)).await.context("no answer came in time")??;
    let (head, body) = response.into_parts();
    Ok(Answer { status: head.status, headers: head.headers, body, _connection: tasks })
}

/// Sends a `GET` and returns the body of a 200 as text.
pub async fn get_text(addr: &str, path: &str, patience: Duration) -> anyhow::Result<String> {
    let answer = get(addr, path, None, patience).await?;
    let status = answer.status;
    let text = answer.text(patience).await?;
    if status != StatusCode::OK {
        bail!("GET http://{addr}{path} answered {status}: {text}");
    }
    Ok(text)
}
