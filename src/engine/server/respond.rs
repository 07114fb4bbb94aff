//! Answers on their way to the client: collected, or streamed as they come.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, StatusCode};
use serde_json::Value;

use super::super::front::{Answers, Told};
use super::super::model::Weights;
use super::super::request::TokenEvent;
use super::super::tokenizer::decode;
use super::job::Job;
use super::shape::{Answer, Shape, usage};
use crate::openai::{ApiError, headers};

/// Serves a request in the form it asked for.
pub(super) async fn respond(shape: Shape, mut job: Job, answers: Answers) -> Result<Response, ApiError> {
    let request_id = HeaderValue::from_str(&job.request_id);
    let mut response =
        if job.stream { streamed(shape, job, answers).await? } else { whole(shape, &mut job, answers).await? };
    if let Ok(request_id) = request_id {
        response.headers_mut().insert(headers::X_REQUEST_ID, request_id);
    }
    Ok(response)
}

async fn whole(shape: Shape, job: &mut Job, mut events: Answers) -> Result<Response, ApiError> {
    let mut answers: Vec<Answer> = (0..job.answers()).map(|_| Answer::default()).collect();
    while let Some(told) = events.next().await {
        match told? {
            Told::Token(event) => {
                job.weights = event.weights;
                answers[event.index].take(event);
            }
            Told::Restarted { index } => answers[index] = Answer::default(),
        }
    }
    let mut response = axum::Json(shape.whole(job, &answers)).into_response();
    mark(&mut response, job.weights);
    Ok(response)
}

/// Waits for the first event before it commits to a status: a request that fails before its first token is an HTTP error
/// that a proxy can retry elsewhere, not a stream that breaks.
async fn streamed(shape: Shape, mut job: Job, mut events: Answers) -> Result<Response, ApiError> {
    let first = loop {
        match events.next().await {
            Some(Ok(Told::Token(event))) => break event,
            Some(Ok(Told::Restarted { .. })) => {}
            Some(Err(error)) => return Err(error),
            None => return Err(ApiError::internal("the request has no answer")),
        }
    };
    job.weights = first.weights;
    let mut stream = Stream::new(shape, job, events);
    stream.take(&first);
    let body = Body::from_stream(futures_util::stream::unfold(stream, |mut stream| async move {
        stream.next().await.map(|bytes| (Ok::<_, Infallible>(bytes), stream))
    }));
    let mut response = (StatusCode::OK, body).into_response();
    mark(&mut response, first.weights);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

/// Says which weights made the answer.
fn mark(response: &mut Response, weights: Weights) {
    response.headers_mut().insert(headers::X_PDLINK_WEIGHT_VERSION, HeaderValue::from(weights.version));
}

/// A stream in progress. The client's pace is the stream's: nothing is made before it is asked for.
struct Stream {
    shape: Shape,
    job: Job,
    events: Answers,
    ready: VecDeque<Bytes>,
    /// Per answer: whether it was opened, tokens so far, characters so far.
    sides: Vec<Side>,
    cached: usize,
    done: bool,
}

#[derive(Debug, Clone, Default)]
struct Side {
    opened: bool,
    tokens: usize,
    chars: usize,
}

impl Stream {
    fn new(shape: Shape, job: Job, events: Answers) -> Self {
        let sides = vec![Side::default(); job.answers()];
        Self { shape, job, events, ready: VecDeque::new(), sides, cached: 0, done: false }
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Some(bytes);
            }
            if self.done {
                return None;
            }
            match self.events.next().await {
                Some(Ok(Told::Token(event))) => self.take(&event),
                // Another choice of the request, which has not begun: nothing was shown of it.
                Some(Ok(Told::Restarted { .. })) => {}
                Some(Err(error)) => {
                    self.ready.push_back(line(&error.to_json()));
                    self.close();
                }
                None => {
                    if self.job.includes_usage {
                        let chunk = self.shape.usage_chunk(&self.job, self.generated(), self.cached);
                        self.send(&chunk);
                    }
                    self.close();
                }
            }
        }
    }

    fn take(&mut self, event: &TokenEvent) {
        if !std::mem::replace(&mut self.sides[event.index].opened, true) {
            if self.job.echo {
                self.sides[event.index].chars = decode(self.job.prompt_of(event.index), true).chars().count();
            }
            if let Some(chunk) = self.shape.opening(&self.job, event.index) {
                self.send(&chunk);
            }
        }
        let offset = self.sides[event.index].chars;
        let mut chunk = self.shape.chunk(&self.job, event, offset);
        let side = &mut self.sides[event.index];
        side.tokens += usize::from(event.token.is_some());
        side.chars +=
            event.token.as_ref().map_or(0, |token| super::super::tokenizer::token_text(token.token).chars().count());
        if let Some(finish) = event.finish.as_ref().filter(|_| event.index.is_multiple_of(self.job.n)) {
            self.cached += finish.cached_tokens;
        }
        if self.job.continuous_usage {
            chunk["usage"] = usage(&self.job, self.generated(), None);
        }
        self.send(&chunk);
    }

    fn generated(&self) -> usize {
        self.sides.iter().map(|side| side.tokens).sum()
    }

    fn send(&mut self, chunk: &Value) {
        self.ready.push_back(line(&chunk.to_string()));
    }

    fn close(&mut self) {
        self.ready.push_back(line("[DONE]"));
        self.done = true;
    }
}

/// One server-sent event.
fn line(data: &str) -> Bytes {
    Bytes::from(format!("data: {data}\n\n"))
}
