//! Bodies on the client's side: reading a request's, and what an answer's can be.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use tokio::time::{Instant, timeout_at};

use super::shared::Limits;
use super::stream::StreamBody;
use crate::openai::ApiError;

/// Memory taken for a long body before any of it has come.
const RESERVE_BYTES_MAX: usize = 1 << 20;
/// What is read of a refused body, so that a client that only sends sees the refusal: a closed socket with unread bytes
/// would be reset, and the answer lost.
const DRAIN_BYTES_MAX: u64 = 512 << 20;
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads a request's body: whole, bounded in size and time.
pub(crate) async fn read(mut incoming: Incoming, limits: &Limits) -> Result<Bytes, ApiError> {
    let bytes_max = limits.body_bytes_max;
    let announced = incoming.size_hint().lower();
    if announced > bytes_max as u64 {
        drain(&mut incoming).await;
        return Err(too_large(bytes_max));
    }
    if incoming.is_end_stream() {
        return Ok(Bytes::new());
    }
    let late = |_| {
        let message = format!("the request body did not arrive within {:?}", limits.body);
        ApiError::new(StatusCode::REQUEST_TIMEOUT, message)
    };
    match timeout_at(Instant::now() + limits.body, collect(&mut incoming, announced, bytes_max)).await.map_err(late)? {
        Ok(Some(body)) => Ok(body),
        Ok(None) => {
            drain(&mut incoming).await;
            Err(too_large(bytes_max))
        }
        Err(error) => Err(ApiError::bad_request(format!("the request body broke off: {error}"))),
    }
}

/// `None`: it is longer than allowed.
async fn collect(incoming: &mut Incoming, announced: u64, bytes_max: usize) -> Result<Option<Bytes>, hyper::Error> {
    let Some(first) = data(incoming).await? else { return Ok(Some(Bytes::new())) };
    if first.len() as u64 == announced {
        // The usual case: it came in one piece with the head, and stays where it was read.
        return Ok(Some(first));
    }
    let announced = usize::try_from(announced).unwrap_or(usize::MAX);
    let mut body = BytesMut::with_capacity(announced.clamp(first.len(), RESERVE_BYTES_MAX.max(first.len())));
    body.extend_from_slice(&first);
    drop(first);
    while let Some(more) = data(incoming).await? {
        if body.len() + more.len() > bytes_max {
            return Ok(None);
        }
        body.extend_from_slice(&more);
        if body.len() == announced {
            break;
        }
    }
    Ok((body.len() <= bytes_max).then(|| body.freeze()))
}

async fn data(incoming: &mut Incoming) -> Result<Option<Bytes>, hyper::Error> {
    while let Some(frame) = incoming.frame().await {
        if let Ok(data) = frame?.into_data() {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

async fn drain(incoming: &mut Incoming) {
    let discard = async {
        let mut left = DRAIN_BYTES_MAX;
        while let Ok(Some(more)) = data(incoming).await {
            left = left.saturating_sub(more.len() as u64);
            if left == 0 {
                break;
            }
        }
    };
    // Whether it ended or ran out, the answer is the same.
    let _ = timeout_at(Instant::now() + DRAIN_TIMEOUT, discard).await;
}

fn too_large(bytes_max: usize) -> ApiError {
    let message = format!("the request body is longer than {bytes_max} bytes; raise `[proxy] body_bytes_max`");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}

/// An answer broke off; the connection must end so that the client can tell.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BrokenAnswer(pub(crate) String);

/// The body of an answer.
#[derive(Debug)]
pub(crate) enum ProxyBody {
    Full(Bytes),
    /// A worker's answer as it comes.
    Stream(Box<StreamBody>),
    /// From a route behind the router.
    Routed(axum::body::Body),
}

impl From<String> for ProxyBody {
    fn from(text: String) -> Self {
        Self::Full(text.into())
    }
}

impl Body for ProxyBody {
    type Data = Bytes;
    type Error = BrokenAnswer;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenAnswer>>> {
        match self.get_mut() {
            Self::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Self::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Self::Stream(stream) => stream.poll_next(cx).map(|part| part.map(|part| part.map(Frame::data))),
            Self::Routed(body) => Pin::new(body)
                .poll_frame(cx)
                .map(|frame| frame.map(|frame| frame.map_err(|error| BrokenAnswer(error.to_string())))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Full(bytes) => bytes.is_empty(),
            Self::Stream(_) => false,
            Self::Routed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Stream(stream) => stream.size_hint(),
            Self::Routed(body) => body.size_hint(),
        }
    }
}
