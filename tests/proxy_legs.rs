//! What the two legs carry and what the client gets: bodies and headers of each dialect, byte identity, other routes.

#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/proxied.rs"]
mod proxied;

use std::sync::Arc;

use mock_worker::{MockWorker, Part, Reply, chunk, last_chunk, stream_head};
use pdlink::config::Policy;
use pdlink::proxy::{Connector, Mode};
use proxied::{PARAMS, Proxied, Setup, decode_answer, good_decode, good_prefill, prefill_answer, transfer_of};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

const BODY: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi \u00e9 é"}],"stream":false,"max_completion_tokens":7,"min_tokens":3,"temperature":0.5}"#;

#[tokio::test(flavor = "multi_thread")]
// PX-1.
async fn px_1_both_legs_carry_the_clients_body_with_their_own_fields() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let headers = [("x-request-id", "mine-1"), ("authorization", "Bearer key"), ("content-type", "application/json")];
    let answer = proxy.send(reqwest::Method::POST, "/v1/chat/completions", &headers, BODY.to_owned()).await;
    assert_eq!((answer.status, answer.body.as_str()), (200, r#"{"id":"d","choices":[{"text":"hello"}]}"#));
    assert_eq!(answer.header("x-request-id"), Some("mine-1"));

    let (first, second) = (&prefill.seen()[0], &decode.seen()[0]);
    let id = transfer_of(first);
    assert_eq!(answer.header("x-pdlink-transfer-id"), Some(id.as_str()));
    assert_eq!(
        first.text(),
        format!(
            r#"{{"stream":false,"max_tokens":1,"max_completion_tokens":1,"kv_transfer_params":{{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null,"pdlink":{{"transfer_id":"{id}"}}}},"model":"m","messages":[{{"role":"user","content":"hi \u00e9 é"}}],"temperature":0.5}}"#
        )
    );
    assert_eq!(second.text(), format!(r#"{{"kv_transfer_params":{PARAMS},{}"#, &BODY[1..]));
    for leg in [first, second] {
        assert_eq!((leg.method.as_str(), leg.path.as_str()), ("POST", "/v1/chat/completions"));
        assert_eq!(leg.header("x-request-id"), Some("mine-1"));
        assert_eq!(leg.header("authorization"), Some("Bearer key"));
        assert_eq!(leg.header("content-type"), Some("application/json"));
        assert_eq!(leg.header("x-pdlink-transfer-id"), None);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p2p_nccl_finds_its_peers_in_the_request_id() {
    let (prefill, decode) = (MockWorker::start(|_, _| decode_answer()).await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.connector = Connector::P2pNccl;
    setup.prefill[0].kv_addr = Some("10.0.0.1:14579".to_owned());
    setup.decode[0].kv_addr = Some("10.0.0.2:14580".to_owned());
    let proxy = setup.start().await;
    let body = r#"{"prompt":"a","max_tokens":5,"stream":false,"kv_transfer_params":{"remote_host":"evil"}}"#;
    let headers = [("x-request-id", "mine"), ("x-kv-target", "evil:1")];
    let answer = proxy.send(reqwest::Method::POST, "/v1/completions", &headers, body.to_owned()).await;
    assert_eq!((answer.status, answer.header("x-request-id")), (200, Some("mine")));
    // They are asked their version too.
    let leg = |worker: &MockWorker| {
        worker.seen().into_iter().find(|request| request.path == "/v1/completions").expect("a leg")
    };
    let (first, second) = (&leg(&prefill), &leg(&decode));
    let id = answer.header("x-pdlink-transfer-id").expect("an id");
    let want = format!("___prefill_addr_10.0.0.1:14579___decode_addr_10.0.0.2:14580_{id}");
    for leg in [first, second] {
        assert_eq!(leg.header("x-request-id"), Some(want.as_str()));
        assert_eq!(leg.header("x-kv-target"), Some("10.0.0.2:14580"));
    }
    assert_eq!(first.text(), r#"{"stream":false,"max_tokens":1,"prompt":"a"}"#);
    assert_eq!(second.text(), r#"{"kv_transfer_params":null,"prompt":"a","max_tokens":5,"stream":false}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn nixl_of_vllm_is_driven_by_its_own_fields_alone() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.connector = Connector::VllmNixl;
    let proxy = setup.start().await;
    assert_eq!(proxy.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 200);
    let want = json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
        "remote_block_ids": null, "remote_host": null, "remote_port": null});
    assert_eq!(prefill.seen()[0].json()["kv_transfer_params"], want);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_passed_on_chunk_by_chunk_and_byte_for_byte() {
    let events: Vec<String> = (0..5).map(|at| format!("data: {{\"at\":{at},\"odd\": \"é\\n\" }}\n\n")).collect();
    let gate = Arc::new(Semaphore::new(0));
    let (parts, waits) = (events.clone(), Arc::clone(&gate));
    let decode = MockWorker::start(move |_, _| {
        let mut script = vec![stream_head()];
        for event in &parts {
            script.extend([Part::Wait(Arc::clone(&waits)), chunk(event)]);
        }
        script.extend([chunk(": keep-alive\n\n"), chunk("data: [DONE]\n\n"), last_chunk()]);
        Reply::Raw(script)
    })
    .await;
    let prefill = good_prefill().await;
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let mut client = proxy.connect().await;
    client.send("/v1/completions", r#"{"prompt":"a","stream":true}"#).await;
    for event in &events {
        // Each event arrives before the worker is let to send the next one.
        gate.add_permits(1);
        client.until(event).await;
    }
    client.until("\r\n0\r\n\r\n").await;
    let want = format!("{}: keep-alive\n\ndata: [DONE]\n\n", events.concat());
    assert_eq!(client.chunks(), (want.into_bytes(), true));
    assert!(client.text().contains("content-type: text/event-stream; charset=utf-8\r\n"));
    assert_eq!(prefill.seen()[0].json()["stream"], false);
    assert_eq!(decode.seen()[0].json()["stream"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_used_again_on_both_sides() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        client.received.clear();
        client.send("/v1/completions", r#"{"prompt":"a"}"#).await;
        client.until("hello").await;
    }
    assert_eq!((prefill.seen().len(), decode.seen().len()), (3, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn generation_routes_have_their_names_at_the_worker() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let routes = [
        ("/v1/completions?x=1", "/v1/completions?x=1"),
        ("/completions", "/v1/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/tokens", "/v1/chat/completions/tokens"),
        ("/chat/completions/tokens", "/v1/chat/completions/tokens"),
        ("/inference/v1/generate", "/inference/v1/generate"),
    ];
    for (at, (asked, want)) in routes.iter().enumerate() {
        assert_eq!(proxy.post(asked, "{}").await.status, 200, "{asked}");
        assert_eq!((prefill.seen()[at].path.as_str(), decode.seen()[at].path.as_str()), (*want, *want));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn other_routes_go_to_a_decode_worker_as_they_are() {
    let prefill = good_prefill().await;
    let decode = MockWorker::start(|request, _| {
        Reply::Json(200, json!({"path": request.path, "body": request.text()}).to_string())
    })
    .await;
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    for (method, path, body) in [
        ("POST", "/tokenize", r#"{"prompt":"a"}"#),
        ("POST", "/detokenize", r#"{"tokens":[1]}"#),
        ("POST", "/v1/embeddings", "not json at all"),
        ("GET", "/v1/responses/r1?x=y", ""),
        ("DELETE", "/v1/files/f", ""),
        ("GET", "/version", ""),
    ] {
        let answer = proxy.send(method.parse().unwrap(), path, &[], body.to_owned()).await;
        assert_eq!(answer.json(), json!({"path": path, "body": body}));
        assert!(answer.header("x-request-id").is_some() && answer.header("x-pdlink-transfer-id").is_none());
    }
    assert!(prefill.seen().is_empty());
    assert_eq!(decode.seen()[4].method, "DELETE");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_are_merged_each_once() {
    let models = |names: &'static [&'static str]| {
        move |_: &mock_worker::Received, _| {
            let data: Vec<Value> = names.iter().map(|name| json!({"id": name, "object": "model"})).collect();
            Reply::Json(200, json!({"object": "list", "data": data}).to_string())
        }
    };
    let (prefill, decode) =
        (MockWorker::start(models(&["m", "p"])).await, MockWorker::start(models(&["m", "d"])).await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    for path in ["/v1/models", "/models"] {
        let answer = proxy.get(path).await.json();
        let ids: Vec<&str> =
            answer["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
        assert_eq!((answer["object"].as_str(), ids), (Some("list"), vec!["m", "d", "p"]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_both_legs_would_break_goes_to_decode_whole() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    for body in [
        r#"{"prompt":"a","n":4}"#,
        r#"{"prompt":["a","b"]}"#,
        r#"{"prompt":"a","use_beam_search":true,"stream":true}"#,
        r#"{"prompt":"a","prompt_logprobs":1,"stream":true}"#,
    ] {
        let answer = proxy.post("/v1/completions", body).await;
        assert_eq!((answer.status, answer.header("x-pdlink-transfer-id")), (200, None));
        assert_eq!(decode.seen().last().unwrap().text(), body);
    }
    assert!(prefill.seen().is_empty());
    let spoofed = r#"{"n":2,"kv_transfer_params":{"remote_host":"evil"}}"#;
    proxy.post("/v1/completions", spoofed).await;
    assert_eq!(decode.seen().last().unwrap().json(), json!({"n": 2, "kv_transfer_params": null}));
    assert_eq!(proxy.metric("pdlink_proxy_alone_total").await, 5.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_logprobs_come_from_prefill() {
    let prefill = MockWorker::start(|_, _| {
        Reply::Json(
            200,
            format!(
                r#"{{"choices":[{{"text":"x","prompt_logprobs":[null,{{"5":-1.5}}]}}],"kv_transfer_params":{PARAMS}}}"#
            ),
        )
    })
    .await;
    let decode = MockWorker::start(|_, _| {
        Reply::Json(200, r#"{"choices":[{"text":"abc","prompt_logprobs":null}],"usage":{"n":1}}"#.to_owned())
    })
    .await;
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let answer = proxy.post("/v1/completions", r#"{"prompt":"a","prompt_logprobs":1}"#).await;
    let want = json!({"choices": [{"text": "abc", "prompt_logprobs": [null, {"5": -1.5}]}], "usage": {"n": 1}});
    assert_eq!(answer.json(), want);
    assert_eq!(prefill.seen()[0].json()["prompt_logprobs"], 1);
    assert_eq!(decode.seen()[0].json().get("prompt_logprobs"), None);
}

#[tokio::test(flavor = "multi_thread")]
// PX-5.
async fn px_5_prefill_that_held_nothing_is_counted_and_decode_goes_on_only_if_allowed() {
    for allowed in [false, true] {
        let prefill =
            MockWorker::start(|_, _| Reply::Json(200, r#"{"id":"p","kv_transfer_params":null}"#.to_owned())).await;
        let decode = good_decode().await;
        let mut setup = Setup::new(&[&prefill], &[&decode]);
        setup.config.local_prefill = allowed;
        let proxy = setup.start().await;
        let body = r#"{"prompt":"a","max_tokens":3}"#;
        let answer = proxy.post("/v1/completions", body).await;
        if allowed {
            assert_eq!((answer.status, decode.seen()[0].text().as_str()), (200, body));
            assert_eq!(proxy.metric("pdlink_proxy_prefill_without_params_total").await, 1.0);
        } else {
            assert_eq!(answer.status, 502);
            assert!(answer.error().contains("without kv_transfer_params"));
            assert!(answer.header("x-pdlink-transfer-id").is_some());
            assert!(decode.seen().is_empty());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_workers_and_short_prompts_take_one_leg() {
    let (prefill, decode) = (good_prefill().await, good_decode().await);
    let mut setup = Setup::new(&[], &[&decode]);
    setup.mode = Mode::Plain;
    let proxy = setup.start().await;
    assert_eq!(proxy.post("/v1/completions", r#"{"prompt":"a"}"#).await.status, 200);
    let mut setup = Setup::new(&[&prefill], &[&decode]);
    setup.config.local_prefill_below_bytes = 100;
    let proxy = setup.start().await;
    proxy.post("/v1/completions", r#"{"prompt":"a"}"#).await;
    assert!(prefill.seen().is_empty());
    proxy.post("/v1/completions", format!(r#"{{"prompt":"{}"}}"#, "a".repeat(200))).await;
    assert_eq!((prefill.seen().len(), decode.seen().len()), (1, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_choose_as_they_say() {
    let session = [("x-session-id", "s-1")];
    let prompt = format!(r#"{{"prompt":"{}"}}"#, "long ".repeat(800));
    for (policy, headers, want_one) in [
        (Policy::RoundRobin, &session[..], false),
        (Policy::LeastLoaded, &session[..], true),
        (Policy::LeastLoaded, &[][..], false),
        (Policy::Session, &session[..], true),
        (Policy::Prefix, &[][..], true),
    ] {
        let (prefill, decode) = (good_prefill().await, [good_decode().await, good_decode().await]);
        let mut setup = Setup::new(&[&prefill], &[&decode[0], &decode[1]]);
        setup.config.policy = policy;
        let proxy = setup.start().await;
        mock_worker::eventually("both workers are up", || proxy.handle().inflight() == 0).await;
        for _ in 0..50 {
            if proxy.get("/health?all=true").await.status == 200 {
                break;
            }
        }
        for _ in 0..6 {
            proxy.send(reqwest::Method::POST, "/v1/completions", headers, prompt.clone()).await;
        }
        let served = decode.each_ref().map(|worker| worker.seen().len());
        assert_eq!(served.contains(&6), want_one, "{policy:?} {headers:?}: {served:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn long_bodies_reach_both_legs_whole() {
    let (prefill, decode) = (MockWorker::start(|_, _| prefill_answer()).await, good_decode().await);
    let proxy = Proxied::between(&[&prefill], &[&decode]).await;
    let prompt: String = (0..=255u8).cycle().take(300_000).map(|at| char::from(b'a' + at % 26)).collect();
    let body = json!({"prompt": prompt, "max_tokens": 3}).to_string();
    assert_eq!(proxy.post("/v1/completions", body).await.status, 200);
    assert_eq!(prefill.seen()[0].json()["prompt"], prompt.as_str());
    assert_eq!(decode.seen()[0].json()["prompt"], prompt.as_str());
}
