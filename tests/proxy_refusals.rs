//! What is refused, and how: every refusal is an error in OpenAI's form and touches no worker.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::time::Duration;

use mock_worker::{MockWorker, Reply};
use proxied::{Proxied, Setup, good_decode, good_prefill};
use tokio::io::AsyncWriteExt;

const PATH: &str = "/v1/completions";

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_cannot_be_served_are_refused_by_name() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let deep = format!("{{\"a\":{}", "[".repeat(100_000));
    let cases: &[(&str, &str, Option<&str>)] = &[
        ("", "ends too early", None),
        ("{", "ends too early", None),
        ("{\"prompt\":\"a\"", "ends too early", None),
        ("{\"prompt\":\"a\"} x", "expected the end", None),
        ("[1,2]", "expected a JSON object", None),
        ("\"text\"", "expected a JSON object", None),
        ("null", "expected a JSON object", None),
        (&deep, "nested deeper", None),
        (r#"{"model":7}"#, "`model` must be a string", Some("model")),
        (r#"{"stream":"yes"}"#, "`stream` must be true or false", Some("stream")),
        (r#"{"n":"2"}"#, "`n` must be a number", Some("n")),
        (r#"{"max_tokens":{}}"#, "`max_tokens` must be a number", Some("max_tokens")),
        (r#"{"m\u0061x_tokens":{}}"#, "`max_tokens` must be a number", Some("max_tokens")),
        (r#"{"prompt":7}"#, "`prompt` must be", Some("prompt")),
    ];
    for (body, message, param) in cases {
        let answer = proxy.post(PATH, *body).await;
        assert_eq!(answer.status, 400, "case: {body:.40}");
        assert!(answer.error().contains(message), "case: {body:.40}: {}", answer.error());
        assert_eq!(answer.json()["error"]["param"].as_str(), *param);
        assert!(answer.header("x-request-id").is_some());
    }
    let mut client = proxy.connect().await;
    client
        .stream
        .write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 6\r\n\r\n{\"\xff\":1")
        .await
        .unwrap();
    client.until("invalid UTF-8").await;
    assert!(prefill.seen().is_empty() && decode.seen().is_empty());
    assert_eq!(proxy.handle().inflight(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_a_model_is_the_workers_to_judge() {
    let prefill =
        MockWorker::start(|_, _| Reply::Json(400, r#"{"error":{"message":"model please"}}"#.to_owned())).await;
    let decode = good_decode().await;
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let answer = proxy.post(PATH, r#"{"prompt":"a"}"#).await;
    assert_eq!((answer.status, answer.body.as_str()), (400, r#"{"error":{"message":"model please"}}"#));
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_routes_and_wrong_methods_are_told_apart() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    for (method, path, status) in [
        ("GET", "/nowhere", 404),
        ("POST", "/v2/completions", 404),
        ("GET", PATH, 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
        ("GET", "/update_weights", 405),
        ("DELETE", "/v1/models", 405),
    ] {
        let answer = proxy.send(method.parse().unwrap(), path, &[], String::new()).await;
        assert_eq!(answer.status, status, "{method} {path}");
        answer.error();
        assert_eq!(answer.header("allow").is_some(), status == 405, "{method} {path}");
    }
    assert!(decode.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_and_bodies_have_limits() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    // 100 MB against the default of 64 MiB: announced, and in chunks that announce nothing.
    let answer = proxy.post(PATH, " ".repeat(100_000_000)).await;
    assert_eq!(answer.status, 413);
    assert!(answer.error().contains("body_bytes_max"));
    let parts = (0..100).map(|_| Ok::<_, std::io::Error>(vec![b' '; 1_000_000]));
    let body = reqwest::Body::wrap_stream(futures_util::stream::iter(parts));
    let answer = reqwest::Client::new().post(format!("{}{PATH}", proxy.base)).body(body).send().await.unwrap();
    assert_eq!(answer.status(), 413);

    let mut client = proxy.connect().await;
    let head = format!("POST {PATH} HTTP/1.1\r\nhost: x\r\nx-long: {}\r\n\r\n", "y".repeat(200_000));
    client.stream.write_all(head.as_bytes()).await.expect("read, if only to be dropped");
    client.read_to_end().await;
    assert!(error_of(&client, 431).contains("head of the request is too large"), "{}", client.text());
    let many: String = (0..200).map(|number| format!("x-{number}: y\r\n")).collect();
    let heads: [(u16, &[u8]); 5] = [
        (431, &format!("POST {PATH} HTTP/1.1\r\n{many}\r\n").into_bytes()),
        (431, &format!("GET /{} HTTP/1.1\r\nhost: x\r\n\r\n", "y".repeat(65_530)).into_bytes()),
        (400, b"\x16\x03\x01 this is not HTTP\r\n\r\n"),
        (400, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nno colon\r\n\r\n"),
        (400, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: many\r\n\r\n"),
    ];
    for (status, head) in heads {
        let mut client = proxy.connect().await;
        client.stream.write_all(head).await.unwrap();
        client.read_to_end().await;
        assert!(error_of(&client, status).contains("request"), "{}", client.text());
    }
    let mut client = proxy.connect().await;
    client.stream.write_all(b"GET /nowhere HTTP/1.1\r\nhost: x\r\n\r\n\x01\r\n\r\n").await.unwrap();
    client.read_to_end().await;
    assert_eq!(client.text().matches("HTTP/1.1 ").count(), 2, "one answer each: {}", client.text());
    assert!(client.text().ends_with("\"code\":400}}"), "{}", client.text());
    assert_eq!(proxy.post(PATH, r#"{"prompt":"a"}"#).await.status, 200);
    assert_eq!(prefill.seen().len(), 1);
}

/// The message of the error that is all this client was answered.
fn error_of(client: &proxied::RawClient, status: u16) -> String {
    let text = client.text();
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
    assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{text}");
    let error: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(error["error"]["code"], status, "{text}");
    error["error"]["message"].as_str().expect("a message").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
// PX-3.
async fn px_3_a_body_that_never_comes_is_408() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.body_timeout_s = 0.2;
    let proxy = setup.start().await;
    let mut client = proxy.connect().await;
    client.stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{").await.unwrap();
    client.until("TimeoutError").await;
    assert!(client.text().starts_with("HTTP/1.1 408 "));
    // A head that never ends has the same bound: the connection is closed.
    let mut client = proxy.connect().await;
    client.stream.write_all(b"POST /v1/comp").await.unwrap();
    client.read_to_end().await;
    assert_eq!(proxy.handle().inflight(), 0);
}

#[tokio::test(flavor = "multi_thread")]
// PX-3.
async fn px_3_workers_that_never_answer_are_504() {
    let (prefill, hanging) = (good_prefill().await, MockWorker::start(|_, _| Reply::Hang).await);
    let mut setup = Setup::new(&[&prefill], &[&hanging]);
    setup.config.first_byte_timeout_s = 0.2;
    let proxy = setup.start().await;
    let answer = proxy.post(PATH, r#"{"prompt":"a"}"#).await;
    assert_eq!(answer.status, 504);
    assert!(answer.error().contains(&hanging.url()) && answer.header("x-pdlink-transfer-id").is_some());

    let decode = good_decode().await;
    let mut setup = Setup::new(&[&hanging], &[&decode]);
    setup.config.prefill_timeout_s = 0.2;
    let proxy = setup.start().await;
    assert_eq!(proxy.post(PATH, r#"{"prompt":"a"}"#).await.status, 504);
    let mut setup = Setup::new(&[&hanging], &[&decode]);
    setup.config.request_timeout_s = 0.2;
    let proxy = setup.start().await;
    assert_eq!(proxy.post(PATH, r#"{"prompt":"a"}"#).await.status, 504);
    mock_worker::eventually("the legs are dropped", || hanging.left() == 3).await;
    assert!(decode.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
// PX-4.
async fn px_4_at_the_bound_new_requests_are_told_to_come_back() {
    let (prefill, decode) = (MockWorker::start(|_, _| Reply::Hang).await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.inflight_max = 2;
    let proxy = setup.start().await;
    let (mut one, mut two) = (proxy.connect().await, proxy.connect().await);
    one.send(PATH, r#"{"prompt":"a"}"#).await;
    two.send(PATH, r#"{"prompt":"a"}"#).await;
    mock_worker::eventually("both are in flight", || prefill.seen().len() == 2).await;
    let answer = proxy.post(PATH, r#"{"prompt":"a"}"#).await;
    assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
    answer.error();
    // Health and metrics are no requests of that kind.
    assert_eq!(proxy.get("/health").await.status, 200);
    assert_eq!(proxy.metric("pdlink_proxy_refused_full_total").await, 1.0);
    drop((one, two));
    mock_worker::eventually("there is room again", || proxy.handle().inflight() == 0).await;
    tokio::time::sleep(Duration::from_millis(1)).await;
    prefill.script(|_, _| proxied::prefill_answer());
    assert_eq!(proxy.post(PATH, r#"{"prompt":"a"}"#).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
// PX-5.
async fn px_5_without_prefill_workers_it_is_503_unless_decode_may_prefill() {
    for allowed in [false, true] {
        let decode = good_decode().await;
        let mut setup = Setup::new(&[], &[&decode]);
        setup.prefill = vec![pdlink::proxy::WorkerAddress::new(MockWorker::nobody())];
        setup.config.local_prefill = allowed;
        setup.config.attempts_max = 1;
        setup.unwell = true;
        let proxy = setup.start().await;
        proxy.handle().worker_went_down(&url_of_prefill(&proxy).await);
        let answer = proxy.post(PATH, r#"{"prompt":"a"}"#).await;
        if allowed {
            assert_eq!((answer.status, answer.header("x-pdlink-transfer-id")), (200, None));
        } else {
            assert_eq!((answer.status, answer.header("retry-after")), (503, Some("1")));
            assert!(answer.error().contains("local_prefill"));
        }
        assert_eq!(proxy.get("/health").await.status, 503);
    }
}

async fn url_of_prefill(proxy: &Proxied) -> String {
    proxy.get("/admin/workers").await.json()["workers"][0]["url"].as_str().expect("a URL").to_owned()
}
