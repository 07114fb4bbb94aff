//! What becomes of a hand-over that goes wrong: a named error or a prompt computed again, never wrong tokens, and never a
//! block left behind.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/pair.rs"]
mod pair;

use std::time::Duration;

use engine::{Worker, greedy, prompt, small};
use pair::{Pair, PairShape, prefill_leg};
use pdlink::config::{DigestPolicy, KvConfig, KvSendType, LoadFailurePolicy, ReferenceConfig};
use pdlink::engine::WrapPath;
use pdlink::transport::{Fault, FaultPlan, Faulty, When};
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};

const COMPLETIONS: &str = "/v1/completions";

fn faulty(faults: Vec<(When, Fault)>) -> WrapPath {
    Box::new(move |inner| Faulty::around(inner, FaultPlan { seed: 7, faults: faults.clone() }))
}

/// What decode refuses by itself stays with prefill, where another worker may come for it, until the lease ends.
fn short_lease() -> KvConfig {
    KvConfig { lease_ms: 600, transfer_timeout_ms: 500, ..KvConfig::default() }
}

fn policy(load_failure_policy: LoadFailurePolicy) -> KvConfig {
    KvConfig { load_failure_policy, ..KvConfig::default() }
}

/// The error of an answer that must have one.
async fn error(response: Response) -> (StatusCode, String) {
    let status = response.status();
    let body: Value = response.json().await.expect("JSON");
    let message = body["error"]["message"].as_str().unwrap_or_else(|| panic!("{status} is no error: {body}"));
    (status, message.to_owned())
}

/// KV-4: the token function sees what the digest would have seen.
#[tokio::test(flavor = "multi_thread")]
async fn corrupted_kv_changes_the_answer_or_fails_the_digest() {
    let tokens = prompt(40, 3);
    let alone = Worker::monolithic(small()).await;
    let want = alone.greedy(&tokens, 24).await;
    for fault in [Fault::Corrupt, Fault::Lose] {
        for (digest, send_type) in [
            (DigestPolicy::Off, KvSendType::Get),
            (DigestPolicy::Off, KvSendType::PutAsync),
            (DigestPolicy::Every, KvSendType::Get),
            (DigestPolicy::Every, KvSendType::PutAsync),
        ] {
            let wrap = || Some(faulty(vec![(When::Always, fault)]));
            let pair = Pair::start(PairShape {
                kv: KvConfig { digest, ..KvConfig::default() },
                send_type,
                wrap_prefill: wrap(),
                wrap_decode: wrap(),
                ..PairShape::default()
            })
            .await;
            let body = greedy(&tokens, 24);
            let params = pair.prefill(COMPLETIONS, &body).await;
            let response = pair.decode(COMPLETIONS, &body, params).await;
            if digest == DigestPolicy::Off {
                let answer: Value = response.json().await.unwrap();
                assert_ne!(answer["choices"][0]["text"], want, "{fault:?} by {send_type:?} was not seen");
            } else {
                let (status, message) = error(response).await;
                assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
                assert!(message.contains("digest"), "{message}");
            }
            pair.until_at_rest().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_that_fails_ends_as_the_policy_says() {
    let tokens = prompt(30, 5);
    let body = greedy(&tokens, 16);
    let want = Worker::monolithic(small()).await.greedy(&tokens, 16).await;
    for policy_is in [LoadFailurePolicy::Fail, LoadFailurePolicy::Recompute] {
        let wrap = || Some(faulty(vec![(When::Nth(1), Fault::Kill)]));
        let shape =
            PairShape { kv: policy(policy_is), wrap_prefill: wrap(), wrap_decode: wrap(), ..PairShape::default() };
        let pair = Pair::start(shape).await;
        let params = pair.prefill(COMPLETIONS, &body).await;
        let response = pair.decode(COMPLETIONS, &body, params).await;
        if policy_is == LoadFailurePolicy::Fail {
            let (status, message) = error(response).await;
            assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
            assert!(message.contains("could not be loaded"), "{message}");
            assert_eq!(pair.decode.metric("pdlink_engine_load_failures_total").await, 1);
        } else {
            let answer: Value = response.json().await.unwrap();
            assert_eq!(answer["choices"][0]["text"], want);
            assert_eq!(pair.decode.metric("pdlink_engine_load_recomputes_total").await, 1);
        }
        pair.until_at_rest().await;
        assert_eq!(pair.decode.greedy(&tokens, 16).await, want, "it serves on");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefill_worker_that_has_gone_is_a_failed_load() {
    let tokens = prompt(30, 5);
    let body = greedy(&tokens, 16);
    for policy_is in [LoadFailurePolicy::Fail, LoadFailurePolicy::Recompute] {
        let Pair { prefill, decode } = Pair::start(PairShape { kv: policy(policy_is), ..PairShape::default() }).await;
        let params = prefill.ask(COMPLETIONS, &prefill_leg(&body)).await["kv_transfer_params"].clone();
        prefill.kill().await;
        let mut leg = body.clone();
        leg["kv_transfer_params"] = params;
        let status = decode.post(COMPLETIONS, &leg).await.status();
        let want =
            if policy_is == LoadFailurePolicy::Fail { StatusCode::INTERNAL_SERVER_ERROR } else { StatusCode::OK };
        assert_eq!(status, want);
        decode.until_at_rest().await;
    }
}

/// KV-2, KV-3: what nobody came for is freed, and who comes too late gets an error.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_ended_frees_the_blocks_and_is_no_answer() {
    let kv = KvConfig { lease_ms: 300, transfer_timeout_ms: 200, ..KvConfig::default() };
    let pair = Pair::start(PairShape { kv, ..PairShape::default() }).await;
    let body = greedy(&prompt(30, 5), 16);
    let params = pair.prefill(COMPLETIONS, &body).await;
    assert_eq!(pair.prefill.metric("pdlink_engine_blocks_held").await, 8);
    pair.prefill.until_at_rest().await;
    let (status, _) = error(pair.decode(COMPLETIONS, &body, params).await).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    pair.until_at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_serve_once() {
    let pair = Pair::start(PairShape::default()).await;
    let body = greedy(&prompt(30, 5), 16);
    let params = pair.prefill(COMPLETIONS, &body).await;
    assert_eq!(pair.decode(COMPLETIONS, &body, params.clone()).await.status(), StatusCode::OK);
    pair.decode.ask("/reset_prefix_cache", &json!({})).await;
    let (status, _) = error(pair.decode(COMPLETIONS, &body, params).await).await;
    assert!(status.is_client_error() || status.is_server_error());
    pair.until_at_rest().await;
}

/// KV-5.
#[tokio::test(flavor = "multi_thread")]
async fn kv_of_another_weight_version_is_refused() {
    let pair = Pair::start(PairShape { decode_weight_version: 1, kv: short_lease(), ..PairShape::default() }).await;
    let body = greedy(&prompt(30, 5), 16);
    let params = pair.prefill(COMPLETIONS, &body).await;
    let (status, message) = error(pair.decode(COMPLETIONS, &body, params).await).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(message.contains("weight version"), "{message}");
    pair.until_at_rest().await;
}

/// KV-6.
#[tokio::test(flavor = "multi_thread")]
async fn kv_of_another_shape_is_refused_by_name() {
    let decode = ReferenceConfig { layers: 3, ..small() };
    let pair = Pair::start(PairShape { decode, kv: short_lease(), ..PairShape::default() }).await;
    let body = greedy(&prompt(30, 5), 16);
    let params = pair.prefill(COMPLETIONS, &body).await;
    let (status, message) = error(pair.decode(COMPLETIONS, &body, params).await).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(message.contains("layers"), "{message}");
    pair.until_at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_own_parameters_are_errors_and_never_tokens() {
    let pair = Pair::start(PairShape::default()).await;
    let body = greedy(&prompt(30, 5), 16);
    let good = pair.prefill(COMPLETIONS, &body).await;
    let edit = |pointer: &str, value: Value| {
        let mut params = good.clone();
        *params.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer}")) = value;
        params
    };
    let without = |name: &str| {
        let mut params = good.clone();
        params.as_object_mut().unwrap().remove(name);
        params
    };
    let cases = [
        ("a string", json!("x")),
        ("a list", json!([])),
        ("a flag that is no flag", json!({"do_remote_prefill": "yes"})),
        ("both sides", edit("/do_remote_decode", json!(true))),
        ("nothing but the flag", json!({"do_remote_prefill": true})),
        ("without ours", without("pdlink")),
        ("without block ids", without("remote_block_ids")),
        ("other block ids", edit("/remote_block_ids/0/0", json!(99))),
        ("block ids out of range", edit("/remote_block_ids/0/0", json!(4_000_000_000_u64))),
        ("negative block ids", edit("/remote_block_ids/0/0", json!(-1))),
        ("other tokens", edit("/remote_num_tokens", json!(29))),
        ("another host", edit("/remote_host", json!("192.0.2.1"))),
        ("another endpoint", edit("/pdlink/ranks/0/endpoint", json!("127.0.0.1:1"))),
        ("another transfer", edit("/pdlink/transfer_id", json!("0".repeat(32)))),
        ("another version", edit("/pdlink/version", json!(99))),
        ("another seal", edit("/pdlink/seal", json!("00".repeat(32)))),
        ("asks decode to prefill", prefill_leg(&body)["kv_transfer_params"].clone()),
    ];
    for (name, params) in cases {
        let (status, message) = error(pair.decode(COMPLETIONS, &body, params).await).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "case: {name}: {message}");
    }
    // Asking for nothing is no hand-over at all.
    for params in [Value::Null, json!({}), json!({"do_remote_prefill": false})] {
        assert_eq!(pair.decode(COMPLETIONS, &body, params).await.status(), StatusCode::OK);
    }
    pair.decode.ask("/reset_prefix_cache", &json!({})).await;
    // A body that goes wrong beside good parameters frees prefill's blocks at once, long before the lease ends.
    for (field, value) in
        [("min_tokens", json!(999)), ("n", json!(2)), ("temperature", json!("hot")), ("prompt", json!([1]))]
    {
        let params = pair.prefill(COMPLETIONS, &body).await;
        let mut wrong = body.clone();
        wrong[field] = value;
        let (status, message) = error(pair.decode(COMPLETIONS, &wrong, params).await).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{field}: {message}");
    }
    // The untouched ones still serve.
    assert_eq!(pair.decode(COMPLETIONS, &body, good).await.status(), StatusCode::OK);
    pair.until_at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn prompt_logprobs_are_computed_where_they_are_asked_for() {
    let pair = Pair::start(PairShape::default()).await;
    let mut body = greedy(&prompt(10, 5), 4);
    body["prompt_logprobs"] = json!(1);
    let params = pair.prefill(COMPLETIONS, &body).await;
    let answer: Value = pair.decode(COMPLETIONS, &body, params).await.json().await.unwrap();
    assert_eq!(answer["choices"][0]["prompt_logprobs"].as_array().map(Vec::len), Some(10));
    assert_eq!(pair.decode.metric("pdlink_engine_prompt_tokens_total{source=\"loaded\"}").await, 0);
    pair.until_at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_router_that_knows_nothing_of_us_gets_a_hand_over_too() {
    let pair = Pair::start(PairShape::default()).await;
    let body = greedy(&prompt(10, 5), 4);
    let mut leg = prefill_leg(&body);
    leg["kv_transfer_params"].as_object_mut().unwrap().remove("pdlink");
    let params = pair.prefill.ask(COMPLETIONS, &leg).await["kv_transfer_params"].clone();
    assert_eq!(pair.decode(COMPLETIONS, &body, params).await.status(), StatusCode::OK);
    pair.until_at_rest().await;
}

/// KV-9: whoever leaves, and whenever, leaves nothing behind on either side.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_leave_at_any_moment_leave_no_block_held() {
    let paced = ReferenceConfig { decode_us_per_token: 400.0, prefill_us_per_token: 30.0, ..small() };
    let slow = || Some(faulty(vec![(When::Every(2), Fault::Delay(Duration::from_millis(15)))]));
    for send_type in [KvSendType::Get, KvSendType::PutAsync] {
        let pair = Pair::start(PairShape {
            prefill: paced.clone(),
            decode: paced.clone(),
            kv: KvConfig { lease_ms: 1_500, transfer_timeout_ms: 1_000, ..KvConfig::default() },
            send_type,
            wrap_prefill: slow(),
            wrap_decode: slow(),
            ..PairShape::default()
        })
        .await;
        let one = async |round: u32| {
            let mut body = greedy(&prompt(60, round), 60);
            body["stream"] = json!(round.is_multiple_of(2));
            let both = async {
                let params = pair.prefill(COMPLETIONS, &body).await;
                pair.decode(COMPLETIONS, &body, params).await.text().await
            };
            let _ = tokio::time::timeout(Duration::from_micros(u64::from(round) * 1_500), both).await;
        };
        for rounds in (0..48).collect::<Vec<_>>().chunks(4) {
            futures_util::future::join_all(rounds.iter().map(|&round| one(round))).await;
        }
        pair.until_at_rest().await;
        let tokens = prompt(60, 1);
        let want = Worker::monolithic(small()).await.greedy(&tokens, 8).await;
        assert_eq!(pair.answer(&greedy(&tokens, 8)).await, want);
    }
}

/// Decode has too few blocks for all: requests wait for their turn with their leases kept, and all are answered.
#[tokio::test(flavor = "multi_thread")]
async fn leases_are_kept_while_requests_wait_for_blocks() {
    let decode = ReferenceConfig { num_blocks: 24, decode_us_per_token: 2_000.0, ..small() };
    let kv = KvConfig { lease_ms: 400, transfer_timeout_ms: 300, ..KvConfig::default() };
    let pair = Pair::start(PairShape { decode, kv, ..PairShape::default() }).await;
    let alone = Worker::monolithic(small()).await;
    let one = async |salt: u32| {
        let tokens = prompt(40, salt);
        let body = greedy(&tokens, 40);
        let (want, got) = tokio::join!(alone.greedy(&tokens, 40), pair.answer(&body));
        assert_eq!(got, want, "request {salt}");
    };
    futures_util::future::join_all((0..12).map(one)).await;
    pair.until_at_rest().await;
}
