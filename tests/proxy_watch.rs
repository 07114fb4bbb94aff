//! The live page of the admin routes: who may see it, what it shows, and that viewers cost nothing.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::time::Duration;

use mock_worker::{MockWorker, Part, Reply, eventually};
use proxied::{PATIENCE, Proxied, Setup, good_decode, good_prefill};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

const REQUEST: &str = r#"{"model":"m","prompt":"hello","max_tokens":4}"#;

/// The picture, once `holds` does.
async fn picture(proxy: &Proxied, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
    for _ in 0..400 {
        let answer = proxy.get("/admin/overview").await;
        if answer.status == 200 && holds(&answer.json()) {
            return answer.json();
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("it never came about that {what}: {}", proxy.get("/admin/overview").await.body);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_comes_whole_and_may_talk_to_nobody_else() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let page = proxy.get("/").await;
    assert_eq!((page.status, page.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let policy = page.header("content-security-policy").expect("a policy").to_owned();
    assert!(policy.starts_with("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
    let nonce = policy.split("'nonce-").nth(1).and_then(|rest| rest.split('\'').next()).expect("a nonce");
    assert!(page.body.contains(&format!("<script nonce=\"{nonce}\">")));
    assert!(!proxy.get("/").await.body.contains(nonce), "each page has a nonce of its own");
    assert_eq!(proxy.post("/", "").await.status, 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_token_the_page_is_for_its_holders_and_changes_are_for_bearers() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.admin_token = Some("s3cret".to_owned());
    let proxy = setup.start().await;
    // The base64 of `me:s3cret` and of `me:guess`.
    let (good, bad) = ("Basic bWU6czNjcmV0", "Basic bWU6Z3Vlc3M=");
    for path in ["/", "/admin/live", "/admin/overview"] {
        let stranger = proxy.get(path).await;
        assert_eq!(stranger.status, 401, "{path}");
        assert!(stranger.header("www-authenticate").is_some_and(|asks| asks.starts_with("Basic ")), "{path}");
        let get = async |authorization| {
            let headers = [("authorization", authorization)];
            proxy.send(reqwest::Method::GET, path, &headers, String::new()).await
        };
        assert_eq!(get(bad).await.status, 401, "{path}");
        if path != "/admin/live" {
            assert_ne!(get(good).await.status, 401, "{path}");
            assert_ne!(get("Bearer s3cret").await.status, 401, "{path}");
        }
    }
    // A browser sends a password along with other sites' requests: it must not change anything.
    let pause = proxy.send(reqwest::Method::POST, "/pause", &[("authorization", good)], String::new()).await;
    assert_eq!(pause.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_port_of_their_own_the_admin_routes_take_the_page_along() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.admin_port = true;
    let proxy = setup.start().await;
    assert_eq!(proxy.get("/").await.status, 404);
    let admin = proxy.handle().admin_address().expect("an admin port");
    let page = reqwest::get(format!("http://{admin}/")).await.expect("an answer");
    assert_eq!(page.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_queues_failures_and_the_short_pool_are_in_the_picture() {
    let queues = |running: u32, waiting: u32| {
        Reply::Json(
            200,
            format!(
                "vllm:num_requests_running 0\npdlink_engine_requests_running {running}\npdlink_engine_requests_waiting {waiting}\n"
            ),
        )
    };
    let prefill = MockWorker::start_all(move |request, _| match request.path.as_str() {
        "/health" => Reply::Json(200, String::new()),
        "/metrics" => queues(2, 9),
        _ => proxied::prefill_answer(),
    })
    .await;
    let decode = MockWorker::start(|_, _| Reply::Json(500, r#"{"error":"the disk is full"}"#.to_owned())).await;
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.prefill[0].name = Some("prefill_0".to_owned());
    setup.prefill[0].gpus = vec![4, 5];
    let proxy = setup.start().await;
    assert_eq!(proxy.post("/v1/completions", REQUEST).await.status, 500);
    let told = picture(&proxy, "the queue and the failure are seen", |told| {
        told["workers"][0]["waiting"] == 9.0 && told["failures"].as_array().is_some_and(|failures| !failures.is_empty())
    })
    .await;
    let worker = &told["workers"][0];
    assert_eq!(
        (&worker["name"], &worker["gpus"], &worker["state"]),
        (&json!("prefill_0"), &json!([4, 5]), &json!("up"))
    );
    let failure = &told["failures"][0];
    assert_eq!((&failure["what"], &failure["worker"]), (&json!("request"), &json!(1)));
    assert!(failure["cause"].as_str().is_some_and(|cause| cause.contains("answered 500")), "{failure}");
    let told = picture(&proxy, "the hint is shown", |told| told["balance"]["hint"]["kind"] == "short").await;
    assert_eq!(told["balance"]["hint"]["pool"], "prefill");
    assert!(proxy.metric("pdlink_proxy_pool_shortfall{role=\"prefill\"}").await >= 1.0);
    assert_eq!(proxy.metric("pdlink_proxy_pool_shortfall{role=\"decode\"}").await, 0.0);
    assert!(proxy.metric("pdlink_proxy_pool_queue{role=\"prefill\",queue=\"waiting\"}").await > 0.5);
}

#[tokio::test(flavor = "multi_thread")]
async fn pictures_come_as_events_until_the_proxy_drains() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let mut viewer = proxy.connect().await;
    viewer.stream.write_all(b"GET /admin/live HTTP/1.1\r\nhost: test\r\n\r\n").await.expect("the proxy reads");
    viewer.until("content-type: text/event-stream").await;
    viewer.until("event: past").await;
    viewer.until("event: picture").await;
    let before = viewer.received.len();
    while viewer.text()[before..].matches("event: picture").count() < 2 {
        let read = timeout(PATIENCE, tokio::io::AsyncReadExt::read_buf(&mut viewer.stream, &mut viewer.received));
        assert!(read.await.expect("in time").expect("no reset") > 0, "the stream ended");
    }
    let (events, _) = viewer.chunks();
    let events = String::from_utf8(events).expect("UTF-8");
    let data = events.lines().rfind(|line| line.starts_with("data: {") && line.ends_with('}')).expect("a picture");
    let told: Value = serde_json::from_str(&data["data: ".len()..]).expect("JSON");
    assert_eq!(told["workers"].as_array().map(Vec::len), Some(2));
    assert_eq!(proxy.metric("pdlink_proxy_viewers").await, 1.0);
    let handle = proxy.take_handle();
    let ended = tokio::task::spawn_blocking(move || handle.shutdown(PATIENCE)).await.expect("no panic");
    assert_eq!(ended, pdlink::proxy::Drained::Clean, "a viewer holds up no end");
    viewer.read_to_end().await;
}

// PX-4.
#[tokio::test(flavor = "multi_thread")]
async fn px_4_viewers_that_read_nothing_and_viewers_beyond_the_bound_cost_nothing() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.idle_timeout_s = 2.0;
    let proxy = setup.start().await;
    let mut viewers = Vec::new();
    for _ in 0..64 {
        let mut viewer = proxy.connect().await;
        viewer.stream.write_all(b"GET /admin/live HTTP/1.1\r\nhost: test\r\n\r\n").await.expect("the proxy reads");
        viewer.until("event: picture").await;
        viewers.push(viewer);
    }
    let refused = proxy.get("/admin/live").await;
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("2")));
    assert!(refused.error().contains("64 viewers"));
    // Requests are served beside them, and their seats come back.
    assert_eq!(proxy.post("/v1/completions", REQUEST).await.status, 200);
    drop(viewers);
    let mut left = 64.0;
    for _ in 0..400 {
        left = proxy.metric("pdlink_proxy_viewers").await;
        if left == 0.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(left, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_metrics_hang_holds_up_nobodys_picture() {
    let hanging = MockWorker::start_all(|request, _| match request.path.as_str() {
        "/health" => Reply::Json(200, String::new()),
        "/metrics" => Reply::Raw(vec![Part::Hang]),
        _ => proxied::prefill_answer(),
    })
    .await;
    let decode = good_decode().await;
    let proxy = Proxied::between(&[&hanging], &[&decode]).await;
    eventually("it was asked", || hanging.asked("/metrics") > 0).await;
    let at = |told: &Value| told["totals"]["at_unix_ms"].as_u64().expect("a time");
    let first = at(&picture(&proxy, "there is one", |_| true).await);
    picture(&proxy, "there is a later one", |told| at(told) > first + 200).await;
}
