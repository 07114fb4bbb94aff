//! The spans of one request: its own, one for each leg, and one for the transfer with its three parts.
//!
//! The legs' spans are made where the legs are. Each worker is given its leg's span as `traceparent`, so that what vLLM traces
//! itself is beneath it. The transfer happens between two runtimes, which make no spans: they keep a record, with its times,
//! and the keeper's thread makes spans of that, once the request has ended. So a trace is whole without a word from vLLM.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use opentelemetry::KeyValue;
use opentelemetry::trace::{Span as _, SpanContext};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::metrics::Leg;
use super::shared::Shared;
use super::worker::Worker;
use crate::config::Dispatch;
use crate::control::{RankRecords, TransferId};
use crate::telemetry::traces::{Span, SpanBuilder, SpanKind, Status, Traces, read_parent, write_parent};
use crate::telemetry::{TransferOutcome, TransferRecord};

pub(crate) const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// Transfers whose records are still to be asked for. More are left out of their traces.
pub(crate) const QUEUE_MAX: usize = 1024;
/// A record is there soon after the answer began.
const TRIES: u32 = 5;
const AGAIN: Duration = Duration::from_millis(100);
/// Records that are asked for at the same time.
const AT_ONCE: usize = 16;

/// A transfer that belongs to a trace.
#[derive(Debug)]
pub(crate) struct Traced {
    transfer_id: TransferId,
    /// Whose runtime knows of it.
    decode: usize,
    parent: SpanContext,
}

/// What makes spans, and where transfers wait to become some.
#[derive(Debug)]
pub(crate) struct Tracing {
    traces: Traces,
    traced: mpsc::Sender<Traced>,
}

impl Tracing {
    pub(crate) fn new(traces: Traces, traced: mpsc::Sender<Traced>) -> Self {
        Self { traces, traced }
    }

    pub(crate) fn end(&self) {
        self.traces.end();
    }
}

/// The spans of a request that is under way.
#[derive(Debug)]
pub(crate) struct RequestTrace {
    shared: Arc<Shared>,
    request: Span,
    /// Of the leg that answers; it lasts as long as the answer.
    decode: Mutex<Option<Span>>,
}

impl RequestTrace {
    /// Begins the request's span, if there are traces.
    pub(crate) fn begin(shared: &Arc<Shared>, route: &'static str, headers: &HeaderMap) -> Option<Box<Self>> {
        let tracing = shared.tracing.as_ref()?;
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let parent = read_parent(text(TRACEPARENT), text(TRACESTATE));
        let mut request = tracing.traces.span("request", SpanKind::Server, &parent);
        request.set_attribute(KeyValue::new("http.route", route));
        Some(Box::new(Self { shared: Arc::clone(shared), request, decode: Mutex::default() }))
    }

    /// Begins a leg's span; its header line makes the worker's spans part of it.
    pub(crate) fn leg(&self, leg: Leg, worker: &Worker, transfer: Option<TransferId>) -> Option<(Span, Vec<u8>)> {
        let tracing = self.shared.tracing.as_ref()?;
        let name = match leg {
            Leg::prefill => "prefill",
            Leg::decode => "decode",
        };
        let mut span = tracing.traces.span(name, SpanKind::Client, self.request.span_context());
        if span.is_recording() {
            span.set_attribute(KeyValue::new("server.address", worker.origin.authority.clone()));
            if let Some(transfer) = transfer {
                span.set_attribute(KeyValue::new("pdlink.transfer_id", transfer.to_string()));
            }
        }
        let line = format!("{TRACEPARENT}: {}\r\n", write_parent(span.span_context()));
        Some((span, line.into_bytes()))
    }

    /// The leg whose answer the client gets has begun to answer.
    pub(crate) fn answers(&self, mut decode: Span) {
        decode.add_event("first byte", Vec::new());
        *self.decode() = Some(decode);
    }

    fn decode(&self) -> MutexGuard<'_, Option<Span>> {
        self.decode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The request has ended. A transfer is asked about afterwards.
    pub(crate) fn end(mut self, ended: &Ended<'_>) {
        let tracing = self.shared.tracing.as_ref();
        if !self.request.is_recording() {
            return;
        }
        self.request.set_attribute(KeyValue::new("http.response.status_code", i64::from(ended.status)));
        self.request.set_attribute(KeyValue::new("pdlink.end", ended.end));
        self.request.set_attribute(KeyValue::new("pdlink.request_id", ended.request_id.to_owned()));
        if let Some(dispatch) = ended.dispatch {
            self.request.set_attribute(KeyValue::new("pdlink.dispatch", dispatch.name()));
        }
        if ended.status >= 500 || ended.end == "broken" {
            self.request.set_status(Status::error(ended.end));
        }
        let decode = self.decode().take();
        let parent = decode.as_ref().map(|span| span.span_context().clone());
        if let Some(mut decode) = decode {
            decode.set_attribute(KeyValue::new("pdlink.bytes", i64::try_from(ended.bytes).unwrap_or(i64::MAX)));
            decode.end();
        }
        self.request.end();
        if let (Some(tracing), Some(transfer_id), Some(decode), Some(parent)) =
            (tracing, ended.transfer_id, ended.decode, parent)
        {
            // At the bound a trace goes without its transfer: nothing waits for it.
            let _ = tracing.traced.try_send(Traced { transfer_id, decode, parent });
        }
    }
}

/// How a request ended.
pub(crate) struct Ended<'a> {
    pub(crate) status: u16,
    pub(crate) end: &'static str,
    pub(crate) bytes: u64,
    pub(crate) request_id: &'a str,
    pub(crate) dispatch: Option<Dispatch>,
    pub(crate) transfer_id: Option<TransferId>,
    /// The worker that answered.
    pub(crate) decode: Option<usize>,
}

/// Ends a leg's span.
pub(crate) fn end_leg(span: Option<Span>, failure: Option<&str>) {
    let Some(mut span) = span else { return };
    if let Some(failure) = failure {
        span.set_status(Status::error(failure.to_owned()));
    }
    span.end();
}

/// Makes spans of transfers, some at a time so that a worker that hangs holds up its own alone, for as long as the proxy lives.
pub(crate) async fn tell_transfers(shared: Arc<Shared>, mut queue: mpsc::Receiver<Traced>) {
    let mut asking = JoinSet::new();
    loop {
        tokio::select! {
            traced = queue.recv(), if asking.len() < AT_ONCE => match traced {
                Some(traced) => _ = asking.spawn(ask_and_tell(Arc::clone(&shared), traced)),
                None => return,
            },
            Some(_) = asking.join_next() => {}
        }
    }
}

async fn ask_and_tell(shared: Arc<Shared>, traced: Traced) {
    let (Some(tracing), Some(Some(runtime))) = (&shared.tracing, shared.runtimes.get(traced.decode)) else { return };
    for _ in 0..TRIES {
        match runtime.records(traced.transfer_id).await {
            Ok(found) if !found.records.is_empty() => return tell(&tracing.traces, &traced, &found),
            // It may be a moment late: decode answers before its account of the transfer is closed.
            Ok(_) => tokio::time::sleep(AGAIN).await,
            Err(error) => {
                tracing::debug!(%error, transfer_id = %traced.transfer_id, "a trace goes without its transfer");
                return;
            }
        }
    }
}

/// One span for the transfer, with the times of the rank that took longest, and one for each of its parts.
fn tell(traces: &Traces, traced: &Traced, RankRecords { records, unheard }: &RankRecords) {
    let took = |record: &TransferRecord| record.wait_us + record.copy_us + record.validate_us;
    let Some(slowest) = records.iter().max_by_key(|record| took(record)) else { return };
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let sum = |of: fn(&TransferRecord) -> u64| number(records.iter().map(of).sum());
    let attributes = vec![
        KeyValue::new("pdlink.transfer_id", traced.transfer_id.to_string()),
        KeyValue::new("pdlink.path", slowest.path.map_or("none", |path| path.name())),
        KeyValue::new("pdlink.dispatch", slowest.dispatch.name()),
        KeyValue::new("pdlink.bytes", sum(|record| record.bytes)),
        KeyValue::new("pdlink.runs", sum(|record| record.runs)),
        KeyValue::new("pdlink.posts", sum(|record| record.posts)),
        KeyValue::new("pdlink.ranks", number(records.len() as u64)),
        KeyValue::new("pdlink.ranks_unheard", number(unheard.len() as u64)),
        KeyValue::new("pdlink.blocks", number(slowest.blocks)),
        KeyValue::new("pdlink.tokens", number(slowest.tokens)),
        KeyValue::new("pdlink.exposed_us", number(slowest.exposed_us)),
        KeyValue::new("pdlink.weight_version", number(slowest.weight_version)),
    ];
    let end = UNIX_EPOCH + Duration::from_micros(slowest.ended_unix_us);
    let begin = end - Duration::from_micros(took(slowest));
    let builder = |name: &'static str, from: SystemTime| SpanBuilder::from_name(name).with_start_time(from);
    let mut transfer = traces.build(builder("kv transfer", begin).with_attributes(attributes), &traced.parent);
    if let TransferOutcome::Failed(why) = &slowest.outcome {
        transfer.set_status(Status::error(why.clone()));
    }
    let mut at = begin;
    for (part, micros) in [("wait", slowest.wait_us), ("copy", slowest.copy_us), ("validate", slowest.validate_us)] {
        let mut span = traces.build(builder(part, at), transfer.span_context());
        at += Duration::from_micros(micros);
        span.end_with_timestamp(at);
    }
    transfer.end_with_timestamp(end);
}
