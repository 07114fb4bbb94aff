//! Small questions to workers: health, models, admin calls.

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};

use super::shared::Lane;
use super::upstream::{Deadline, Outgoing, UpstreamError, exchange};
use super::worker::Worker;

/// Longest answer to such a question.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// A whole answer.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// What is asked: `headers` are whole header lines.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question<'a> {
    pub(crate) method: &'a Method,
    pub(crate) path: &'a str,
    pub(crate) headers: &'a [u8],
    pub(crate) body: &'a [u8],
}

/// Asks one worker and reads its whole answer.
pub(crate) async fn ask(
    lane: &Lane,
    worker: &Worker,
    question: Question<'_>,
    deadline: Deadline,
) -> Result<Reply, UpstreamError> {
    let Question { method, path, headers, body } = question;
    let body = [body];
    let body: &[&[u8]] = if body[0].is_empty() { &[] } else { &body };
    let request = Outgoing { method, path, headers, body };
    let connect = lane.shared.limits.connect;
    let mut answer = exchange(&lane.sockets, worker.number, &worker.origin, request, connect, deadline).await?;
    let body = deadline.bound("whole answer", answer.whole(ANSWER_BYTES_MAX)).await?;
    let (status, headers) = (answer.head.status, answer.head.headers());
    lane.sockets.finish(worker.number, answer);
    Ok(Reply { status, headers, body })
}
