//! Traces: one request through real engines, seen whole by a collector; and nothing where they are off or nobody listens.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::{Worker, setup, small};
use mock_worker::{MockWorker, Part, Reply, eventually};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use pdlink::config::{Role, TelemetryConfig};
use pdlink::proxy::WorkerAddress;
use prost::Message;
use proxied::{Setup, good_decode, good_prefill};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// A collector: every span that was posted to it.
struct Collector {
    server: MockWorker,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    async fn start() -> Self {
        let spans: Arc<Mutex<Vec<Span>>> = Arc::default();
        let kept = Arc::clone(&spans);
        let server = MockWorker::start(move |request, _| {
            assert_eq!((request.method.as_str(), request.path.as_str()), ("POST", "/v1/traces"));
            assert_eq!(request.header("content-type"), Some("application/x-protobuf"));
            let told = ExportTraceServiceRequest::decode(&*request.body).expect("OTLP");
            let found = told.resource_spans.into_iter().flat_map(|of| of.scope_spans).flat_map(|of| of.spans);
            kept.lock().unwrap().extend(found);
            Reply::Json(200, "{}".to_owned())
        })
        .await;
        Self { server, spans }
    }

    fn telemetry(&self, ratio: f64) -> TelemetryConfig {
        let otlp_endpoint = Some(self.server.url());
        TelemetryConfig {
            otlp_endpoint,
            trace_sample_ratio: ratio,
            watch_interval_s: 0.1,
            ..TelemetryConfig::default()
        }
    }

    fn by_name(&self) -> BTreeMap<String, Span> {
        self.spans.lock().unwrap().iter().map(|span| (span.name.clone(), span.clone())).collect()
    }
}

fn attribute(span: &Span, key: &str) -> Option<Any> {
    span.attributes.iter().find(|one| one.key == key)?.value.clone()?.value
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_is_one_trace_from_the_client_to_the_bytes_of_its_kv() {
    let collector = Collector::start().await;
    let mut before = Setup::new(&[], &[]);
    let start = async |role| {
        let setup = setup(role, small());
        let kv_addr = setup.kv_listener.local_addr().expect("bound").to_string();
        let worker = Worker::start(setup).await;
        (WorkerAddress { kv_addr: Some(kv_addr), ..WorkerAddress::new(worker.url.clone()) }, worker)
    };
    let (prefill, prefill_worker) = start(Role::Prefill).await;
    let (decode, decode_worker) = start(Role::Decode).await;
    (before.prefill, before.decode) = (vec![prefill], vec![decode]);
    before.telemetry = collector.telemetry(0.0);
    let proxy = before.start().await;
    let body = engine::greedy(&engine::prompt(64, 1), 4).to_string();
    // The client has decided that this one is traced; the next one is not.
    let parent = format!("00-{TRACE}-{PARENT}-01");
    let headers = [("traceparent", parent.as_str()), ("content-type", "application/json")];
    let answer = proxy.send(reqwest::Method::POST, "/v1/completions", &headers, body.clone()).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let transfer_id = answer.header("x-pdlink-transfer-id").expect("an id").to_owned();
    assert_eq!(proxy.post("/v1/completions", body).await.status, 200);
    eventually("the whole trace has come", || collector.by_name().len() == 7).await;

    let spans = collector.by_name();
    let below = |name: &str| hex::encode(&spans[name].parent_span_id);
    let id = |name: &str| hex::encode(&spans[name].span_id);
    assert!(spans.values().all(|span| hex::encode(&span.trace_id) == TRACE), "one trace, the client's");
    assert_eq!(collector.spans.lock().unwrap().len(), 7, "the other request was not traced");
    assert_eq!(below("request"), PARENT);
    assert_eq!((below("prefill"), below("decode")), (id("request"), id("request")));
    assert_eq!(below("kv transfer"), id("decode"));
    for part in ["wait", "copy", "validate"] {
        assert_eq!(below(part), id("kv transfer"), "{part}");
        let (part, whole) = (&spans[part], &spans["kv transfer"]);
        assert!(part.start_time_unix_nano >= whole.start_time_unix_nano, "{part:?}");
        assert!(part.end_time_unix_nano <= whole.end_time_unix_nano, "{part:?}");
    }
    assert_eq!(spans["wait"].end_time_unix_nano, spans["copy"].start_time_unix_nano);
    assert_eq!(spans["copy"].end_time_unix_nano, spans["validate"].start_time_unix_nano);
    for name in ["prefill", "decode", "kv transfer"] {
        assert_eq!(attribute(&spans[name], "pdlink.transfer_id"), Some(Any::StringValue(transfer_id.clone())));
    }
    let transfer = &spans["kv transfer"];
    assert_eq!(attribute(transfer, "pdlink.path"), Some(Any::StringValue("shm".to_owned())));
    assert!(matches!(attribute(transfer, "pdlink.bytes"), Some(Any::IntValue(bytes)) if bytes > 0), "{transfer:?}");
    assert_eq!(attribute(&spans["request"], "http.response.status_code"), Some(Any::IntValue(200)));
    drop(proxy);
    prefill_worker.stop().await;
    decode_worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_worker_gets_its_legs_span_and_without_traces_the_clients_own() {
    let collector = Collector::start().await;
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let parent = format!("00-{TRACE}-{PARENT}-01");
    let headers = [("traceparent", parent.as_str())];
    for traced in [true, false] {
        let mut setup = Setup::new(&[&prefill], &[&decode]);
        if traced {
            setup.telemetry = collector.telemetry(1.0);
        }
        let proxy = setup.start().await;
        let body = r#"{"prompt":"a"}"#.to_owned();
        assert_eq!(proxy.send(reqwest::Method::POST, "/v1/completions", &headers, body).await.status, 200);
        let (to_prefill, to_decode) = (prefill.seen().pop().expect("asked"), decode.seen().pop().expect("asked"));
        let (to_prefill, to_decode) = (to_prefill.header("traceparent"), to_decode.header("traceparent"));
        if traced {
            eventually("both legs have been told", || collector.by_name().contains_key("request")).await;
            let spans = collector.by_name();
            let line = |name: &str| Some(format!("00-{TRACE}-{}-01", hex::encode(&spans[name].span_id)));
            assert_eq!(to_prefill.map(str::to_owned), line("prefill"));
            assert_eq!(to_decode.map(str::to_owned), line("decode"));
        } else {
            assert_eq!((to_prefill, to_decode), (Some(parent.as_str()), Some(parent.as_str())));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_or_hangs_costs_no_request() {
    let hanging = MockWorker::start(|_, _| Reply::Raw(vec![Part::Hang])).await;
    for endpoint in [MockWorker::nobody(), hanging.url()] {
        let (prefill, decode) = (good_prefill().await, good_decode().await);
        let mut setup = Setup::new(&[&prefill], &[&decode]);
        setup.telemetry.otlp_endpoint = Some(endpoint);
        setup.telemetry.trace_sample_ratio = 1.0;
        let mut proxy = setup.start().await;
        for _ in 0..20 {
            assert_eq!(proxy.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 200);
        }
        let handle = proxy.take_handle();
        let ended = tokio::task::spawn_blocking(move || handle.shutdown(Duration::from_secs(20))).await;
        assert_eq!(ended.expect("no panic"), pdlink::proxy::Drained::Clean);
    }
}
