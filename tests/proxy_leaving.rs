//! Clients that leave, clients that are slow, and the end of the proxy itself: nothing is left behind.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::sync::Arc;
use std::time::{Duration, Instant};

use mock_worker::{MockWorker, Part, Reply, chunk, eventually, last_chunk, stream_head};
use pdlink::proxy::Drained;
use pdlink::security::Secret;
use proxied::{FakeRuntime, PARAMS, Proxied, Setup, good_decode, good_prefill, transfer_of};
use tokio::sync::Semaphore;

const PATH: &str = "/v1/completions";
const BODY: &str = r#"{"prompt":"a","stream":true}"#;

async fn native(prefill: &MockWorker, decode: &MockWorker) -> (FakeRuntime, Proxied) {
    let secret = Secret::generate().expect("randomness");
    let runtime = FakeRuntime::start(&secret).await;
    let mut setup = Setup::new(&[prefill], &[decode]);
    setup.prefill[0].kv_addr = Some(runtime.address.clone());
    setup.secret = secret;
    (runtime, setup.start().await)
}

#[tokio::test(flavor = "multi_thread")]
// KV-9.
async fn kv_9_a_client_that_leaves_during_prefill_frees_the_blocks() {
    let (prefill, decode) = (MockWorker::start(|_, _| Reply::Hang).await, good_decode().await);
    let (runtime, proxy) = native(&prefill, &decode).await;
    let mut client = proxy.connect().await;
    client.send(PATH, BODY).await;
    eventually("prefill is asked", || prefill.seen().len() == 1).await;
    drop(client);
    let id = transfer_of(&prefill.seen()[0]);
    eventually("the transfer is aborted", || runtime.aborted() == [id.clone()]).await;
    eventually("prefill's leg is dropped", || prefill.left() == 1).await;
    eventually("nothing is in flight", || proxy.handle().inflight() == 0).await;
    assert!(decode.seen().is_empty());
    assert_eq!(proxy.metric("pdlink_proxy_clients_left_total").await, 1.0);
    assert_eq!(proxy.metric("pdlink_proxy_worker_failed").await, 0.0, "it was nobody's fault");
}

#[tokio::test(flavor = "multi_thread")]
// KV-9.
async fn kv_9_a_client_that_leaves_while_decode_is_asked_frees_the_blocks() {
    // Decode has the request but has not answered: before its head, and after its head but before its first byte.
    for before in [vec![], vec![stream_head()]] {
        let parts: Vec<Part> = before.into_iter().chain([Part::Hang]).collect();
        let prefill = good_prefill().await;
        let decode = MockWorker::start(move |_, _| Reply::Raw(parts.clone())).await;
        let (runtime, proxy) = native(&prefill, &decode).await;
        let mut client = proxy.connect().await;
        client.send(PATH, BODY).await;
        eventually("decode is asked", || decode.seen().len() == 1).await;
        drop(client);
        let id = transfer_of(&prefill.seen()[0]);
        eventually("the transfer is aborted", || runtime.aborted() == [id.clone()]).await;
        eventually("decode's leg is dropped", || decode.left() == 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
// KV-9.
async fn kv_9_a_client_that_leaves_mid_stream_is_decodes_to_tell() {
    let parts = vec![stream_head(), chunk("data: {}\n\n"), Part::Hang];
    let (prefill, decode) = (good_prefill().await, MockWorker::start(move |_, _| Reply::Raw(parts.clone())).await);
    let (runtime, proxy) = native(&prefill, &decode).await;
    let mut client = proxy.connect().await;
    client.send(PATH, BODY).await;
    client.until("data: {}").await;
    drop(client);
    eventually("decode's leg is dropped", || decode.left() == 1).await;
    eventually("nothing is in flight", || proxy.handle().inflight() == 0).await;
    assert!(runtime.aborted().is_empty(), "decode has the KV: its own runtime answers for it");
}

#[tokio::test(flavor = "multi_thread")]
// KV-9.
async fn kv_9_a_decode_worker_that_refuses_or_dies_frees_the_blocks() {
    for reply in [Reply::Json(400, "{}".to_owned()), Reply::Json(500, "{}".to_owned()), Reply::Close] {
        let (prefill, decode) = (good_prefill().await, MockWorker::start(move |_, _| reply.clone()).await);
        let (runtime, proxy) = native(&prefill, &decode).await;
        assert_ne!(proxy.post(PATH, BODY).await.status, 200);
        let ids: Vec<String> = prefill.seen().iter().map(transfer_of).collect();
        eventually("each attempt's transfer is aborted", || {
            let aborted = runtime.aborted();
            aborted.len() == ids.len() && ids.iter().all(|id| aborted.contains(id))
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
// KV-9.
async fn kv_9_a_runtime_that_no_flag_named_is_found_in_its_own_parameters() {
    let secret = Secret::generate().expect("randomness");
    let runtime = FakeRuntime::start(&secret).await;
    let (host, port) = runtime.address.rsplit_once(':').expect("host and port");
    let params = PARAMS.replace(
        r#""remote_host":"127.0.0.1","remote_port":1"#,
        &format!(r#""remote_host":"{host}","remote_port":{port}"#),
    );
    let prefill =
        MockWorker::start(move |_, _| Reply::Json(200, format!(r#"{{"kv_transfer_params":{params}}}"#))).await;
    let decode = MockWorker::start(|_, _| Reply::Json(400, "{}".to_owned())).await;
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.secret = secret;
    let proxy = setup.start().await;
    assert_eq!(proxy.post(PATH, BODY).await.status, 400);
    let id = transfer_of(&prefill.seen()[0]);
    eventually("the transfer is aborted", || runtime.aborted() == [id.clone()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_went_well_is_not_aborted() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let (runtime, proxy) = native(&prefill, &decode).await;
    for _ in 0..5 {
        assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    }
    assert_eq!(proxy.metric("pdlink_proxy_aborts_total").await, 0.0);
    assert!(runtime.aborted().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
// PX-4.
async fn px_4_a_slow_client_stops_the_reading_and_memory_stays_flat() {
    const PART: usize = 64 << 10;
    const PARTS: usize = 2048;
    let event = format!("data: {}\n\n", "x".repeat(PART));
    let mut parts = vec![stream_head()];
    parts.extend(std::iter::repeat_n(chunk(&event), PARTS));
    parts.push(last_chunk());
    let (prefill, decode) = (good_prefill().await, MockWorker::start(move |_, _| Reply::Raw(parts.clone())).await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("proc");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line").trim().to_owned();
        line.split(' ').next().and_then(|kib| kib.parse::<usize>().ok()).expect("a number") << 10
    };
    let mut client = proxy.connect().await;
    client.send(PATH, BODY).await;
    client.until("data: ").await;
    // The worker's script alone is 128 MB; it is in memory already. What the proxy would buffer would come on top.
    let before = resident();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let grown = resident().saturating_sub(before);
    assert!(grown < 48 << 20, "memory grew by {grown} bytes while the client did not read");
    client.received = Vec::with_capacity(PARTS * (PART + 64));
    client.until("\r\n0\r\n\r\n").await;
    assert!(client.received.len() > (PARTS - 64) * PART);
}

#[tokio::test(flavor = "multi_thread")]
// PX-3.
async fn px_3_a_client_that_takes_nothing_is_cut_off() {
    let event = format!("data: {}\n\n", "x".repeat(1 << 20));
    let mut parts = vec![stream_head()];
    parts.extend(std::iter::repeat_n(chunk(&event), 64));
    parts.push(Part::Hang);
    let (prefill, decode) = (good_prefill().await, MockWorker::start(move |_, _| Reply::Raw(parts.clone())).await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.idle_timeout_s = 0.5;
    let proxy = setup.start().await;
    let mut client = proxy.connect().await;
    client.send(PATH, BODY).await;
    client.until("data: ").await;
    eventually("the request is over", || proxy.handle().inflight() == 0).await;
    eventually("decode's leg is dropped", || decode.left() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_lets_requests_end_and_takes_no_new_ones() {
    let gate = Arc::new(Semaphore::new(0));
    let parts = vec![
        stream_head(),
        chunk("data: 1\n\n"),
        Part::Wait(Arc::clone(&gate)),
        chunk("data: [DONE]\n\n"),
        last_chunk(),
    ];
    let (prefill, decode) = (good_prefill().await, MockWorker::start(move |_, _| Reply::Raw(parts.clone())).await);
    let mut proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let mut idle = proxy.connect().await;
    let mut client = proxy.connect().await;
    client.send(PATH, BODY).await;
    client.until("data: 1").await;
    let handle = proxy.take_handle();
    let address = handle.address();
    let ending = tokio::task::spawn_blocking(move || handle.shutdown(proxied::PATIENCE));
    // Idle connections end at once, and nobody is let in.
    idle.read_to_end().await;
    let refused = async || tokio::net::TcpStream::connect(address).await.is_err();
    let started = Instant::now();
    while !refused().await {
        assert!(started.elapsed() < proxied::PATIENCE, "the listener stayed open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    gate.add_permits(1);
    client.until("\r\n0\r\n\r\n").await;
    assert!(client.chunks().1);
    client.read_to_end().await;
    assert_eq!(ending.await.expect("joined"), Drained::Clean);
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_cuts_off_what_outlasts_its_grace() {
    let parts = vec![stream_head(), chunk("data: 1\n\n"), Part::Hang];
    let (prefill, decode) = (good_prefill().await, MockWorker::start(move |_, _| Reply::Raw(parts.clone())).await);
    let mut proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let mut client = proxy.connect().await;
    client.send(PATH, BODY).await;
    client.until("data: 1").await;
    let handle = proxy.take_handle();
    let ended = tokio::task::spawn_blocking(move || handle.shutdown(Duration::from_millis(200))).await;
    assert_eq!(ended.expect("joined"), Drained::Cut { requests: 1 });
    client.read_to_end().await;
    assert!(!client.chunks().1);
    eventually("decode's leg is dropped", || decode.left() == 1).await;
}
