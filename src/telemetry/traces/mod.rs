//! Traces, as OpenTelemetry has them: W3C's `traceparent` read and written, spans handed out, and sent to a collector as OTLP over
//! HTTP. Off unless `[telemetry] otlp_endpoint` is given.
//!
//! Spans wait in a bounded queue for a thread of their own. A collector that is away or slow costs spans, never a request.

mod post;

use std::time::Duration;

use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider};

pub use opentelemetry::trace::{SpanBuilder, SpanKind, Status};
pub use opentelemetry_sdk::trace::Span;

use crate::config::TelemetryConfig;

/// Where a collector takes traces, below its address.
const TRACES_PATH: &str = "/v1/traces";
/// Spans that wait to be sent. More are dropped, and the SDK says so once.
const QUEUE_MAX: usize = 4096;
const SEND_EVERY: Duration = Duration::from_secs(1);
/// How long a collector may take, and the last spans at the end.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there are no traces.
#[derive(Debug, thiserror::Error)]
#[error(
    "`telemetry.otlp_endpoint` {endpoint:?} cannot be used: {why}; write http://HOST:4318, as of a collector beside this host"
)]
pub struct TraceError {
    endpoint: String,
    why: String,
}

/// Makes spans, and sends them. Clones share all.
#[derive(Debug, Clone)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

impl Traces {
    /// What the settings ask for; `None` where traces are off.
    pub fn start(config: &TelemetryConfig) -> Result<Option<Self>, TraceError> {
        let Some(endpoint) = &config.otlp_endpoint else { return Ok(None) };
        let fail = |why: String| TraceError { endpoint: endpoint.clone(), why };
        let base = endpoint.trim_end_matches('/');
        let url = if base.ends_with(TRACES_PATH) { base.to_owned() } else { format!("{base}{TRACES_PATH}") };
        let client = post::Client::to(&url, SEND_TIMEOUT).map_err(|why| fail(why.to_owned()))?;
        let exporter = SpanExporter::builder().with_http().with_http_client(client).with_endpoint(url);
        let exporter = exporter.with_timeout(SEND_TIMEOUT).build().map_err(|error| fail(error.to_string()))?;
        let batches = BatchConfigBuilder::default().with_max_queue_size(QUEUE_MAX).with_scheduled_delay(SEND_EVERY);
        let processor = BatchSpanProcessor::builder(exporter).with_batch_config(batches.build()).build();
        let resource = Resource::builder()
            .with_service_name(config.service_name.clone())
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        let ratio = config.trace_sample_ratio.clamp(0.0, 1.0);
        let provider = SdkTracerProvider::builder()
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(ratio))))
            .with_resource(resource.build())
            .with_span_processor(processor)
            .build();
        let tracer = provider.tracer("pdlink");
        Ok(Some(Self { provider, tracer }))
    }

    /// A span that begins now.
    pub fn span(&self, name: &'static str, kind: SpanKind, parent: &SpanContext) -> Span {
        self.build(self.tracer.span_builder(name).with_kind(kind), parent)
    }

    /// A span with times of its own.
    pub fn build(&self, span: SpanBuilder, parent: &SpanContext) -> Span {
        let context = Context::new();
        let context = if parent.is_valid() { context.with_remote_span_context(parent.clone()) } else { context };
        span.start_with_context(&self.tracer, &context)
    }

    /// Sends what waits, within a bound, and takes no more.
    pub fn end(&self) {
        if let Err(error) = self.provider.shutdown_with_timeout(SEND_TIMEOUT) {
            tracing::debug!(%error, "the last spans may not have been sent");
        }
    }
}

/// Reads a client's `traceparent` and `tracestate` (W3C Trace Context). What is malformed begins a trace of its own.
pub fn read_parent(traceparent: Option<&str>, tracestate: Option<&str>) -> SpanContext {
    let read = |text: &str| {
        let mut parts = text.trim().split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let is_hex = |part: &str, length| {
            part.len() == length && part.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let known = is_hex(version, 2) && version != "ff" && (version != "00" || parts.next().is_none());
        if !known || !is_hex(trace, 32) || !is_hex(span, 16) || !is_hex(flags, 2) {
            return None;
        }
        let (trace, span) = (TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?);
        // Only what is known of the flags is passed on.
        let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()? & 1);
        let state = tracestate.and_then(|state| state.parse::<TraceState>().ok()).unwrap_or_default();
        Some(SpanContext::new(trace, span, flags, true, state)).filter(SpanContext::is_valid)
    };
    traceparent.and_then(read).unwrap_or(SpanContext::NONE)
}

/// The header line value that makes a span the parent of what comes after.
pub fn write_parent(span: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags().to_u8() & 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_is_read_and_written_as_w3c_has_it() {
        let given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let read = read_parent(Some(given), Some("vendor=1"));
        assert!(read.is_valid() && read.is_remote() && read.is_sampled());
        assert_eq!((write_parent(&read).as_str(), read.trace_state().get("vendor")), (given, Some("1")));
        // A later version may have more parts, and is read as far as it is known.
        let later = read_parent(Some("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more"), None);
        assert!(later.is_valid() && !later.is_sampled());
    }

    #[test]
    fn what_is_malformed_begins_a_trace_of_its_own() {
        for bad in [
            "",
            "00",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333é-01",
        ] {
            assert!(!read_parent(Some(bad), None).is_valid(), "{bad}");
        }
        assert!(!read_parent(None, Some("vendor=1")).is_valid());
    }

    #[test]
    fn traces_are_off_until_a_collector_is_named_and_a_bad_one_is_refused() {
        assert!(Traces::start(&TelemetryConfig::default()).expect("off").is_none());
        for bad in ["collector:4318", "https://collector:4318", "http://", "http://a b:1"] {
            let config = TelemetryConfig { otlp_endpoint: Some(bad.to_owned()), ..TelemetryConfig::default() };
            let error = Traces::start(&config).expect_err(bad).to_string();
            assert!(error.contains("telemetry.otlp_endpoint") && error.contains(bad), "{error}");
        }
    }
}
