//! `[proxy] dispatch = "concurrent"`: both legs at once, and what becomes of both when one of them goes wrong.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mock_worker::{MockWorker, Part, Reply, chunk, eventually, last_chunk, stream_head};
use pdlink::config::Dispatch;
use pdlink::control::EarlyParams;
use pdlink::proxy::{Connector, Mode, ProxySetup, serve};
use pdlink::security::Secret;
use proxied::{FakeRuntime, Proxied, Setup, config, decode_answer, good_decode, transfer_of};
use tokio::sync::Semaphore;

const PATH: &str = "/v1/completions";
const BODY: &str = r#"{"prompt":"a","max_tokens":4}"#;

fn params(endpoint: &str) -> String {
    format!(
        r#"{{"do_remote_prefill":true,"remote_host":"127.0.0.1","remote_port":1,"pdlink":{{"ranks":[{{"endpoint":"{endpoint}"}}]}}}}"#
    )
}

fn prefill_answer(endpoint: &str) -> Reply {
    let params = params(endpoint);
    Reply::Json(200, format!(r#"{{"id":"p","choices":[{{"text":"x"}}],"kv_transfer_params":{params}}}"#))
}

/// Workers whose first request is answered well, and the others as a test says.
struct Scene {
    prefill: MockWorker,
    decode: MockWorker,
    runtime: FakeRuntime,
    secret: Secret,
    proxy: Proxied,
}

impl Scene {
    /// Ready for a request that is dispatched concurrently.
    async fn new(prefill: Reply, decode: Reply) -> Self {
        let scene = Self::fresh(prefill, decode).await;
        let first = scene.proxy.post(PATH, BODY).await;
        assert_eq!((first.status, first.header("x-pdlink-dispatch")), (200, Some("sequential")));
        scene
    }

    async fn fresh(prefill: Reply, decode: Reply) -> Self {
        let secret = Secret::generate().expect("randomness");
        let runtime = FakeRuntime::start(&secret).await;
        let good = prefill_answer(&runtime.address);
        let prefill =
            MockWorker::start(move |_, number| if number == 0 { good.clone() } else { prefill.clone() }).await;
        let decode =
            MockWorker::start(move |_, number| if number == 0 { decode_answer() } else { decode.clone() }).await;
        let mut setup = Setup::new(&[&prefill], &[&decode]);
        setup.config.dispatch = Dispatch::Concurrent;
        setup.config.attempts_max = 1;
        setup.secret = secret.clone();
        Self { proxy: setup.start().await, prefill, decode, runtime, secret }
    }

    /// The transfer of the request after the first.
    fn transfer(&self) -> String {
        transfer_of(&self.prefill.seen()[1])
    }

    async fn is_aborted(&self) {
        let id = self.transfer();
        eventually("the transfer is aborted", || self.runtime.aborted() == [id.clone()]).await;
        eventually("nothing is in flight", || self.proxy.handle().inflight() == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_request_teaches_where_to_claim_and_the_next_goes_out_on_both_legs() {
    let scene = Scene::new(Reply::Hang, decode_answer()).await;
    assert!(!scene.prefill.seen()[0].text().contains("early"));
    let mut client = scene.proxy.connect().await;
    client.send(PATH, BODY).await;
    // Prefill never answers, and decode has been asked all the same.
    eventually("both are asked", || scene.prefill.seen().len() == 2 && scene.decode.seen().len() == 2).await;
    assert_eq!(scene.prefill.seen()[1].json()["kv_transfer_params"]["pdlink"]["early"], true);
    let asked = scene.decode.seen()[1].json();
    let early = EarlyParams::read(&asked["kv_transfer_params"]["pdlink"]).expect("early parameters");
    assert!(early.check_seal(&scene.secret));
    assert_eq!(
        (early.transfer_id.to_string(), &early.endpoints[..]),
        (scene.transfer(), &[scene.runtime.address.clone()][..])
    );
    assert_eq!((asked["prompt"].as_str(), asked["max_tokens"].as_u64()), (Some("a"), Some(4)));
    assert_eq!(scene.proxy.metric("pdlink_proxy_dispatches_total{dispatch=\"sequential\"}").await, 1.0);
    assert_eq!(scene.proxy.metric("pdlink_proxy_dispatches_total{dispatch=\"concurrent\"}").await, 1.0);
    drop(client);
    scene.is_aborted().await;
    eventually("prefill's leg is dropped", || scene.prefill.left() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_decodes_own_and_waits_for_prefill() {
    let gate = Arc::new(Semaphore::new(0));
    let body = r#"{"id":"p","choices":[],"kv_transfer_params":{"pdlink":{}}}"#;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n", body.len());
    let prefill = Reply::Raw(vec![Part::Wait(gate.clone()), Part::Bytes(format!("{head}{body}").into_bytes())]);
    let decode = Reply::Raw(vec![stream_head(), chunk("data: 1\n\n"), chunk("data: [DONE]\n\n"), last_chunk()]);
    let scene = Scene::new(prefill, decode).await;
    let mut client = scene.proxy.connect().await;
    client.send(PATH, r#"{"prompt":"a","stream":true}"#).await;
    eventually("both are asked", || scene.prefill.seen().len() == 2 && scene.decode.seen().len() == 2).await;
    gate.add_permits(1);
    client.until("data: [DONE]").await;
    assert!(client.text().contains("x-pdlink-dispatch: concurrent"), "{}", client.text());
    assert!(scene.runtime.aborted().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn px_2_prefills_refusal_is_the_clients_and_takes_decodes_leg_with_it() {
    let refusal = r#"{"error":{"message":"too long","code":400}}"#;
    let scene = Scene::new(Reply::Json(400, refusal.to_owned()), Reply::Hang).await;
    let answer = scene.proxy.post(PATH, BODY).await;
    assert_eq!((answer.status, answer.body.as_str()), (400, refusal));
    eventually("decode's leg is dropped", || scene.decode.left() == 1).await;
    scene.is_aborted().await;
    assert_eq!(scene.proxy.metric("pdlink_proxy_worker_failed").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn px_2_decodes_refusal_is_the_clients_and_takes_prefills_leg_with_it() {
    let refusal = r#"{"error":{"message":"no such model","code":404}}"#;
    let scene = Scene::new(Reply::Hang, Reply::Json(404, refusal.to_owned())).await;
    let answer = scene.proxy.post(PATH, BODY).await;
    assert_eq!((answer.status, answer.body.as_str()), (404, refusal));
    eventually("prefill's leg is dropped", || scene.prefill.left() == 1).await;
    scene.is_aborted().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn px_2_a_decode_that_failed_of_prefill_is_not_to_blame() {
    for prefill in [Reply::Json(500, r#"{"error":{"message":"of prefill"}}"#.to_owned()), Reply::Close] {
        let scene = Scene::new(prefill, Reply::Json(500, r#"{"error":{"message":"of decode"}}"#.to_owned())).await;
        let answer = scene.proxy.post(PATH, BODY).await;
        assert!(answer.status >= 500 && !answer.body.contains("of decode"), "{}", answer.body);
        scene.is_aborted().await;
        assert_eq!(scene.proxy.metric("pdlink_proxy_worker_failed").await, 1.0, "prefill alone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn px_2_a_failed_pair_is_tried_again_in_turn_under_another_id() {
    let decodes = Arc::new(AtomicUsize::new(0));
    let count = decodes.clone();
    let runtime = FakeRuntime::start(&Secret::loopback()).await;
    let good = prefill_answer(&runtime.address);
    let prefill = MockWorker::start(move |_, _| good.clone()).await;
    let answer_second = move |_: &mock_worker::Received, _| {
        if count.fetch_add(1, Ordering::SeqCst) == 1 { Reply::Json(500, "{}".to_owned()) } else { decode_answer() }
    };
    let decode = MockWorker::start(answer_second).await;
    let other = good_decode().await;
    let mut setup = Setup::new(&[&prefill], &[&decode, &other]);
    setup.config.dispatch = Dispatch::Concurrent;
    setup.config.policy = pdlink::config::Policy::RoundRobin;
    let proxy = setup.start().await;
    while decodes.load(Ordering::SeqCst) < 2 {
        assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    }
    let ids: Vec<String> = prefill.seen().iter().map(transfer_of).collect();
    assert!((1..ids.len()).all(|at| !ids[..at].contains(&ids[at])), "{ids:?}");
    assert!(proxy.metric("pdlink_proxy_retries_total").await >= 1.0);
    eventually("the failed pair's transfer is aborted", || !runtime.aborted().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_9_a_client_that_leaves_takes_both_legs_with_it() {
    for decode in [Reply::Hang, Reply::Raw(vec![stream_head(), Part::Hang])] {
        let scene = Scene::new(Reply::Hang, decode).await;
        let mut client = scene.proxy.connect().await;
        client.send(PATH, BODY).await;
        eventually("both are asked", || scene.prefill.seen().len() == 2 && scene.decode.seen().len() == 2).await;
        drop(client);
        eventually("both legs are dropped", || scene.prefill.left() == 1 && scene.decode.left() == 1).await;
        scene.is_aborted().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connectors_that_cannot_are_refused_at_start() {
    for connector in [Connector::VllmNixl, Connector::P2pNccl] {
        let setup = Setup::new(&[], &[]);
        let refused = serve(ProxySetup {
            listener: std::net::TcpListener::bind("127.0.0.1:0").unwrap(),
            admin_listener: None,
            config: pdlink::config::ProxyConfig { dispatch: Dispatch::Concurrent, ..config() },
            telemetry: pdlink::config::TelemetryConfig::default(),
            prefill: vec![pdlink::proxy::WorkerAddress::new("http://127.0.0.1:1")],
            decode: vec![pdlink::proxy::WorkerAddress::new("http://127.0.0.1:2")],
            connector,
            mode: Mode::Disaggregated,
            weights: pdlink::config::WeightsConfig::default(),
            secret: setup.secret,
            registry: Default::default(),
            health_failures_max: 2,
        });
        let why = refused.unwrap_err();
        assert!(why.is_configuration() && why.to_string().contains("dispatch"), "{why}");
    }
}
