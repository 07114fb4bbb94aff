//! A worker's answer on its way to the client, byte for byte.
//!
//! Nothing runs beside the client's connection: hyper asks for the next part when it can write it, so a slow client
//! stops the reading from the worker and memory stays flat (PX-4). If the worker dies in the middle, an event stream
//! gets one more event, an error in OpenAI's form, and the connection ends without the mark of a complete answer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderValue;
use http_body::SizeHint;
use tokio::time::{Instant, Sleep, sleep_until};

use super::body::{BrokenAnswer, ProxyBody};
use super::flight::Flight;
use super::link::ClientLink;
use super::shared::Lane;
use super::upstream::{Exchange, Framing, UpstreamError};
use super::watch::What;
use crate::openai::ApiError;

/// What is remembered of a stream's end: enough for its last event.
const TAIL_BYTES: usize = 16;

/// The rest of an answer.
#[derive(Debug)]
pub(crate) struct StreamBody {
    lane: Arc<Lane>,
    link: Arc<ClientLink>,
    flight: Flight,
    exchange: Option<Exchange>,
    /// Read before the answer was passed on.
    first: Option<Bytes>,
    /// Length of the whole body, where the worker said.
    length: Option<u64>,
    events: bool,
    tail: Tail,
    idle: Idle,
    state: State,
}

#[derive(Debug)]
enum State {
    Flowing,
    /// Broken, and said so; ends when the client has been sent what was said.
    Told {
        flushes: u64,
        why: String,
    },
    Ended,
}

impl StreamBody {
    /// The body for an answer. One that is here whole needs no stream.
    pub(crate) fn start(
        lane: &Arc<Lane>,
        link: &Arc<ClientLink>,
        flight: Flight,
        exchange: Exchange,
        first: Option<Bytes>,
        length: Option<&HeaderValue>,
        events: bool,
    ) -> ProxyBody {
        let limits = &lane.shared.limits;
        let whole = Instant::from_std(flight.started) + limits.request;
        let mut stream = Self {
            events,
            length: length.and_then(|value| value.to_str().ok()?.parse().ok()),
            lane: Arc::clone(lane),
            link: Arc::clone(link),
            idle: Idle { after: limits.idle, whole, last: Instant::now(), timer: None },
            flight,
            exchange: Some(exchange),
            first: None,
            tail: Tail::default(),
            state: State::Flowing,
        };
        if stream.exchange.as_ref().is_some_and(Exchange::is_done) {
            return ProxyBody::Full(stream.pass(first.unwrap_or_default()));
        }
        stream.first = first;
        ProxyBody::Stream(Box::new(stream))
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }

    pub(crate) fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BrokenAnswer>>> {
        match &self.state {
            State::Ended => return Poll::Ready(None),
            State::Told { flushes, why } => {
                // What was said must reach the client before the connection is cut.
                if !self.link.has_flushed_since(*flushes, cx) {
                    return Poll::Pending;
                }
                let broken = BrokenAnswer(why.clone());
                self.state = State::Ended;
                return Poll::Ready(Some(Err(broken)));
            }
            State::Flowing => {}
        }
        let part = match self.first.take() {
            Some(first) => Ok(Some(first)),
            None => ready!(self.poll_worker(cx)),
        };
        match part {
            Ok(Some(data)) => Poll::Ready(Some(Ok(self.pass(data)))),
            Ok(None) => match self.finish() {
                Ok(()) => {
                    self.state = State::Ended;
                    Poll::Ready(None)
                }
                Err(why) => Poll::Ready(Some(self.break_off(why))),
            },
            Err(error) => Poll::Ready(Some(self.break_off(error.to_string()))),
        }
    }

    fn poll_worker(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, UpstreamError>> {
        let Some(exchange) = &mut self.exchange else { return Poll::Ready(Ok(None)) };
        match exchange.poll_data(cx) {
            Poll::Ready(part) => {
                self.idle.last = Instant::now();
                Poll::Ready(part)
            }
            Poll::Pending => self.idle.poll(cx).map(Err),
        }
    }

    fn pass(&mut self, data: Bytes) -> Bytes {
        self.flight.bytes += data.len() as u64;
        if self.events {
            self.tail.push(&data);
        }
        // The connection to the worker is free as soon as its last byte is here, not when the client has it.
        if self.exchange.as_ref().is_some_and(Exchange::is_done) {
            // A close-framed stream never says that it is done, so this cannot fail.
            let _ = self.finish();
        }
        data
    }

    /// The worker's answer is at its end: proper, unless only a closed connection says so and the last event is missing.
    fn finish(&mut self) -> Result<(), String> {
        if let Some(exchange) = self.exchange.take() {
            if self.events && exchange.head.framing == Framing::Close && !self.tail.is_done() {
                return Err("the worker closed the stream before its last event".to_owned());
            }
            if let Some(load) = &mut self.flight.load {
                load.succeeded();
                self.lane.sockets.finish(load.worker().number, exchange);
            }
        }
        self.flight.end = "done";
        Ok(())
    }

    /// Ends a stream that broke. Returns what the client is sent: an error event, or the end of the connection.
    fn break_off(&mut self, why: String) -> Result<Bytes, BrokenAnswer> {
        self.exchange = None;
        self.flight.end = "broken";
        self.lane.shared.metrics.streams_broken.inc();
        let worker = self.flight.load.as_mut().map(|load| {
            load.failed(std::time::Instant::now());
            load.worker().name().to_owned()
        });
        let worker = worker.unwrap_or_default();
        let why = format!("the answer of worker {worker} broke off after {} bytes: {why}", self.flight.bytes);
        let number = self.flight.load.as_ref().map(|load| load.worker().number);
        self.lane.shared.watch.failures.note(What::Request, number, &why);
        tracing::warn!(request_id = ?self.flight.request_id, "{why}");
        if !self.events {
            self.state = State::Ended;
            return Err(BrokenAnswer(why));
        }
        let error = ApiError::new(http::StatusCode::BAD_GATEWAY, why.clone()).to_json();
        // An event that was cut short is ended first, or the error would be taken for the rest of it.
        let start = if self.tail.is_between_events() { "" } else { "\n\n" };
        self.state = State::Told { flushes: self.link.flushes(), why };
        Ok(Bytes::from(format!("{start}data: {error}\n\n")))
    }
}

/// The last bytes of a stream.
#[derive(Debug, Default)]
struct Tail {
    bytes: [u8; TAIL_BYTES],
    length: usize,
}

impl Tail {
    fn push(&mut self, data: &[u8]) {
        let new = &data[data.len().saturating_sub(TAIL_BYTES)..];
        let kept = self.length.min(TAIL_BYTES - new.len());
        self.bytes.copy_within(self.length - kept..self.length, 0);
        self.bytes[kept..kept + new.len()].copy_from_slice(new);
        self.length = kept + new.len();
    }

    fn get(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    fn is_between_events(&self) -> bool {
        let tail = self.get();
        tail.is_empty() || tail.ends_with(b"\n\n") || tail.ends_with(b"\r\n\r\n") || tail.ends_with(b"\r\r")
    }

    fn is_done(&self) -> bool {
        self.get().trim_ascii_end().ends_with(b"data: [DONE]")
    }
}

/// The bound on a silent stream (PX-3). One timer for the life of the stream: it is moved only when it fires too early.
#[derive(Debug)]
struct Idle {
    after: Duration,
    /// When the request as a whole is over.
    whole: Instant,
    last: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Idle {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<UpstreamError> {
        loop {
            let due = (self.last + self.after).min(self.whole);
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= due {
                return Poll::Ready(UpstreamError::Timeout { what: "further byte", after: self.after });
            }
            timer.as_mut().reset(due);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_end_of_what_was_pushed() {
        let mut tail = Tail::default();
        assert!(tail.is_between_events());
        let mut all = Vec::new();
        for part in ["data: {}\n\n", "d", "", "ata: a very long event indeed", "\n", "\n", "data: [DONE]", "\n\n"] {
            tail.push(part.as_bytes());
            all.extend_from_slice(part.as_bytes());
            assert_eq!(tail.get(), &all[all.len().saturating_sub(TAIL_BYTES)..]);
            assert_eq!(tail.is_between_events(), all.ends_with(b"\n\n"));
        }
        assert!(tail.is_done());
    }
}
