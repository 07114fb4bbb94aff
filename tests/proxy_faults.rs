//! Workers that die at every moment: another pair serves, or the client is told what happened and can tell.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::time::Duration;

use mock_worker::{MockWorker, Part, Reply, chunk, eventually, last_chunk, stream_head};
use pdlink::proxy::WorkerAddress;
use proxied::{PATIENCE, Proxied, Setup, decode_answer, good_decode, good_prefill, prefill_answer};

const PATH: &str = "/v1/completions";
const BODY: &str = r#"{"prompt":"a","stream":true}"#;

/// A worker that fails every request in one way.
async fn failing(how: Reply) -> MockWorker {
    MockWorker::start(move |_, _| how.clone()).await
}

/// Ways to fail before the first byte of an answer's body.
fn failures() -> Vec<(&'static str, Reply)> {
    let head = "HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n";
    vec![
        ("hangs up when asked", Reply::Close),
        ("dies inside the head", Reply::Raw(vec![Part::Bytes(b"HTTP/1.1 200 OK\r\ncont".to_vec()), Part::Die])),
        ("dies before the first byte", Reply::Raw(vec![Part::Bytes(head.as_bytes().to_vec()), Part::Die])),
        ("dies before the first chunk", Reply::Raw(vec![stream_head(), Part::Die])),
        ("does not speak HTTP", Reply::Raw(vec![Part::Bytes(b"SSH-2.0-OpenSSH\r\n\r\n".to_vec()), Part::Die])),
        ("fails", Reply::Json(500, r#"{"error":{"message":"boom"}}"#.to_owned())),
        ("is paused", Reply::Json(503, r#"{"error":{"message":"paused"}}"#.to_owned())),
    ]
}

#[tokio::test(flavor = "multi_thread")]
// PX-2.
async fn px_2_a_request_that_failed_before_its_first_byte_is_served_by_another_pair() {
    for (name, how) in failures() {
        let (good, bad) = (good_prefill().await, failing(how.clone()).await);
        let decode = good_decode().await;
        let proxy = Proxied::between(&[&bad, &good], &[&decode]).await;
        for _ in 0..4 {
            let answer = proxy.post(PATH, BODY).await;
            assert_eq!(answer.status, 200, "prefill {name}: {}", answer.body);
        }
        assert_eq!((good.seen().len(), decode.seen().len()), (4, 4), "prefill {name}");

        let (prefill, bad) = (good_prefill().await, failing(how).await);
        let proxy = Proxied::between(&[&prefill], &[&bad, &decode]).await;
        for _ in 0..4 {
            let answer = proxy.post(PATH, BODY).await;
            assert_eq!((answer.status, answer.body.contains("hello")), (200, true), "decode {name}: {}", answer.body);
        }
        assert_eq!(decode.seen().len(), 8, "decode {name}");
        assert!(proxy.metric("pdlink_proxy_retries_total").await > 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
// PX-2.
async fn px_2_an_address_where_nobody_listens_is_another_pairs_request() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.prefill.insert(0, WorkerAddress::new(MockWorker::nobody()));
    setup.decode.insert(0, WorkerAddress::new(MockWorker::nobody()));
    setup.config.attempts_max = 3;
    // Only the requests themselves may find out.
    setup.config.health_interval_s = 3600.0;
    let urls = [setup.prefill[0].url.clone(), setup.decode[0].url.clone()];
    let proxy = setup.start().await;
    for url in &urls {
        assert!(proxy.handle().worker_came_up(url));
    }
    for _ in 0..4 {
        assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
// PX-2.
async fn px_2_each_attempt_has_a_transfer_of_its_own() {
    let (prefill, bad, decode) = (good_prefill().await, failing(Reply::Close).await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&bad, &decode]).await;
    let mut answer = proxy.post(PATH, BODY).await;
    while bad.seen().is_empty() {
        answer = proxy.post(PATH, BODY).await;
    }
    let ids: Vec<String> = prefill.seen().iter().map(proxied::transfer_of).collect();
    let unique: std::collections::HashSet<&String> = ids.iter().collect();
    assert_eq!(unique.len(), ids.len());
    assert_eq!(answer.header("x-pdlink-transfer-id"), ids.last().map(String::as_str));
}

#[tokio::test(flavor = "multi_thread")]
// PX-2.
async fn px_2_what_every_worker_answers_is_the_clients_answer() {
    let boom = r#"{"error":{"message":"boom"}}"#;
    for (status, attempts) in [(500, 2), (503, 2), (400, 1), (404, 1), (422, 1), (429, 1)] {
        let (prefill, decode) = (failing(Reply::Json(status, boom.to_owned())).await, good_decode().await);
        let proxy = Proxied::between(&[&prefill], &[&decode]).await;
        let answer = proxy.post(PATH, BODY).await;
        assert_eq!((answer.status, answer.body.as_str()), (status, boom), "from prefill");
        assert!(answer.header("x-pdlink-transfer-id").is_some());
        assert_eq!((prefill.seen().len(), decode.seen().len()), (attempts, 0));

        let (prefill, decode) = (good_prefill().await, failing(Reply::Json(status, boom.to_owned())).await);
        let proxy = Proxied::between(&[&prefill], &[&decode]).await;
        let answer = proxy.post(PATH, BODY).await;
        assert_eq!((answer.status, answer.body.as_str()), (status, boom), "from decode");
        assert_eq!(decode.seen().len(), attempts);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn px_5_prefill_workers_that_died_unnoticed_are_done_without_if_decode_may_prefill() {
    let (prefill, decode) = (failing(Reply::Close).await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.local_prefill = true;
    let proxy = setup.start().await;
    let answer = proxy.post(PATH, BODY).await;
    assert_eq!((answer.status, prefill.seen().len()), (200, 2));
    assert_eq!(decode.seen()[0].text(), BODY);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_unknown_route_does_is_not_done_twice() {
    let (prefill, decode) = (good_prefill().await, failing(Reply::Json(500, "{}".to_owned())).await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    assert_eq!(proxy.post("/v1/files", "x").await.status, 500);
    assert_eq!(decode.seen().len(), 1);
    assert_eq!(proxy.get("/v1/files").await.status, 500);
    assert_eq!(decode.seen().len(), 3, "one that only reads may be asked again");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_nobody_answers_the_client_is_told_who_was_asked() {
    let (prefill, decode) = (failing(Reply::Close).await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let answer = proxy.post(PATH, BODY).await;
    assert_eq!(answer.status, 502);
    assert!(answer.error().contains(&prefill.url()), "{}", answer.error());
    assert!(answer.header("x-pdlink-transfer-id").is_some() && answer.header("x-request-id").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_ends_with_an_error_event_and_no_proper_end() {
    let whole = "data: {\"text\":\"one\"}\n\n";
    let cases = [("between events", whole.to_owned(), ""), ("inside one", format!("{whole}data: {{\"te"), "\n\n")];
    for (name, sent, gap) in cases {
        let parts = vec![stream_head(), chunk(&sent), Part::Die];
        let (prefill, decode) = (good_prefill().await, failing(Reply::Raw(parts)).await);
        let proxy = Proxied::between(&[&prefill], &[&decode]).await;
        let mut client = proxy.connect().await;
        client.send(PATH, BODY).await;
        client.read_to_end().await;
        let (data, complete) = client.chunks();
        let data = String::from_utf8(data).expect("UTF-8");
        assert!(!complete, "{name}: a broken stream must not look complete");
        let event = data.strip_prefix(&format!("{sent}{gap}data: ")).unwrap_or_else(|| panic!("{name}: {data}"));
        let error: serde_json::Value = serde_json::from_str(event.trim_end()).expect("JSON");
        assert_eq!(error["error"]["code"], 502, "{name}");
        assert!(error["error"]["message"].as_str().unwrap().contains(&decode.url()), "{name}: {error}");
        assert!(event.ends_with("\n\n") && !data.contains("[DONE]"), "{name}");
        assert_eq!(decode.seen().len(), 1, "{name}: nothing is tried again once bytes have gone out");
        assert_eq!(proxy.metric("pdlink_proxy_streams_broken_total").await, 1.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_json_answer_that_breaks_is_cut_short_for_the_client_too() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{\"id\":";
    let parts = vec![Part::Bytes(head.as_bytes().to_vec()), Part::Die];
    let (prefill, decode) = (good_prefill().await, failing(Reply::Raw(parts)).await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let answer = reqwest::Client::new().post(format!("{}{PATH}", proxy.base)).body(BODY).send().await;
    if let Ok(answer) = answer {
        assert!(answer.bytes().await.is_err(), "a short body must not pass for a whole one");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_framed_by_its_connection_must_say_that_it_is_done() {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    for (last, complete) in [("data: [DONE]\n\n", true), ("data: {}\n\n", false)] {
        let parts =
            vec![Part::Bytes(format!("{head}data: {{}}\n\n").into_bytes()), Part::Bytes(last.into()), Part::Die];
        let (prefill, decode) = (good_prefill().await, failing(Reply::Raw(parts)).await);
        let proxy = Proxied::between(&[&prefill], &[&decode]).await;
        let mut client = proxy.connect().await;
        client.send(PATH, BODY).await;
        client.until(if complete { "\r\n0\r\n\r\n" } else { "\"error\"" }).await;
        if !complete {
            client.read_to_end().await;
        }
        assert_eq!(client.chunks().1, complete, "{}", client.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
// PX-3.
async fn px_3_a_stream_that_falls_silent_is_ended() {
    let parts = vec![stream_head(), chunk("data: {}\n\n"), Part::Hang];
    let (prefill, decode) = (good_prefill().await, failing(Reply::Raw(parts)).await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.idle_timeout_s = 0.2;
    let proxy = setup.start().await;
    let mut client = proxy.connect().await;
    client.send(PATH, BODY).await;
    client.read_to_end().await;
    assert!(client.text().contains("no further byte within"), "{}", client.text());
    assert!(!client.chunks().1);
    eventually("decode's leg is dropped", || decode.left() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
// PX-2.
async fn px_2_failing_workers_are_quarantined_and_probed_back() {
    let (good, bad) = (good_prefill().await, failing(Reply::Close).await);
    let decode = good_decode().await;
    let mut setup = Setup::new(&[&bad, &good], &[&decode]);
    setup.config.quarantine_after_failures = 2;
    setup.config.quarantine_s = 0.5;
    let proxy = setup.start().await;
    let state = async || proxy.get("/admin/workers").await.json()["workers"][0]["state"].as_str().unwrap().to_owned();
    while bad.seen().len() < 2 {
        assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    }
    assert_eq!(state().await, "quarantined");
    let before = bad.seen().len();
    for _ in 0..6 {
        assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    }
    assert_eq!(bad.seen().len(), before, "in quarantine it is left alone");
    tokio::time::sleep(Duration::from_millis(600)).await;
    while bad.seen().len() == before {
        assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    }
    assert_eq!(
        (state().await.as_str(), bad.seen().len()),
        ("quarantined", before + 1),
        "one failed trial, one more term"
    );
    bad.script(|_, _| prefill_answer());
    tokio::time::sleep(Duration::from_millis(600)).await;
    while bad.seen().len() < before + 3 {
        assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    }
    assert_eq!(state().await, "up");
    assert!(proxy.metric("pdlink_proxy_worker_quarantines").await >= 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_and_comes_back_is_noticed_by_itself() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    let health = async |want: u16| {
        for _ in 0..1000 {
            if proxy.get("/health").await.status == want {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("health never was {want}");
    };
    let address = decode.kill().await;
    health(503).await;
    assert_eq!(proxy.post(PATH, BODY).await.status, 503);
    let decode = MockWorker::restart(address, |_, _| decode_answer());
    health(200).await;
    // The connections of its former life are not used again.
    assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    assert_eq!(decode.seen().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_went_stale_is_nobodys_fault() {
    let closing = |body: &str| {
        let length = body.len();
        // Kept alive by its head, and closed at once nevertheless: what a server's own idle time-out looks like.
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
        Reply::Raw(vec![Part::Bytes(answer.into_bytes()), Part::Die])
    };
    let (Reply::Json(_, prefill_text), Reply::Json(_, decode_text)) = (prefill_answer(), decode_answer()) else {
        unreachable!("both are JSON");
    };
    let prefill = MockWorker::start(move |_, _| closing(&prefill_text)).await;
    let decode = MockWorker::start(move |_, _| closing(&decode_text)).await;
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.attempts_max = 1;
    let proxy = setup.start().await;
    for _ in 0..20 {
        assert_eq!(proxy.post(PATH, BODY).await.status, 200);
    }
    assert_eq!(proxy.metric("pdlink_proxy_worker_failed").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_comes_before_the_body_was_read_is_passed_on() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = [0; 512];
            let _ = stream.read(&mut head).await;
            let health = head.starts_with(b"GET /health") || head.starts_with(b"GET /metrics");
            let answer: &[u8] = if health {
                b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            } else {
                b"HTTP/1.1 413 Too Large\r\ncontent-length: 5\r\n\r\nlarge"
            };
            let _ = stream.write_all(answer).await;
            // Holds the connection without reading on.
            if !health {
                tokio::time::sleep(PATIENCE).await;
            }
        }
    });
    let decode = good_decode().await;
    let mut setup = Setup::new(&[], &[&decode]);
    setup.prefill = vec![WorkerAddress::new(format!("http://{address}"))];
    let proxy = setup.start().await;
    let body = format!(r#"{{"prompt":"{}"}}"#, "a".repeat(30_000_000));
    let answer = proxy.post(PATH, body).await;
    assert_eq!((answer.status, answer.body.as_str()), (413, "large"));
}

#[tokio::test(flavor = "multi_thread")]
async fn trailing_bytes_of_a_worker_are_not_the_next_answer() {
    let sloppy =
        Reply::Raw(vec![Part::Bytes(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 500 X\r\n\r\n".to_vec())]);
    let (prefill, decode) = (good_prefill().await, failing(sloppy).await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    for _ in 0..5 {
        let answer = proxy.post(PATH, BODY).await;
        assert_eq!((answer.status, answer.body.as_str()), (200, "{}"));
    }
    let done = vec![stream_head(), chunk("data: [DONE]\n\n"), last_chunk()];
    decode.script(move |_, _| Reply::Raw(done.clone()));
    assert_eq!(proxy.post(PATH, BODY).await.body, "data: [DONE]\n\n");
}
