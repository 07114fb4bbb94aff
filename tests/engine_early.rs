//! Concurrent dispatch through the proxy, between reference engines: the answer must be the single engine's, whatever goes
//! wrong must be an error or a retry, and nothing may be left behind.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/mock_worker.rs"]
mod mock_worker;
#[path = "support/pair.rs"]
mod pair;
#[path = "support/proxied.rs"]
mod proxied;

use std::time::Duration;

use engine::{Worker, greedy, prompt, small};
use pair::{Pair, PairShape};
use pdlink::config::{DigestPolicy, Dispatch, KvConfig, KvSendType, Path, ReferenceConfig, ReferenceLayout};
use pdlink::engine::WrapPath;
use pdlink::proxy::WorkerAddress;
use pdlink::transport::{Fault, FaultPlan, Faulty, When};
use proxied::{Proxied, Setup};
use serde_json::{Value, json};

const PATH: &str = "/v1/completions";

fn kv() -> KvConfig {
    KvConfig { part_bytes_min: 1, ..KvConfig::default() }
}

fn shape() -> PairShape {
    PairShape { kv: kv(), send_type: KvSendType::PutAsync, ..PairShape::default() }
}

/// A pair behind a proxy, which has been told where prefill's runtime listens.
struct Deployment {
    pair: Pair,
    proxy: Proxied,
}

impl Deployment {
    async fn start(shape: PairShape) -> Self {
        let pair = Pair::start(shape).await;
        let mut setup = Setup::new(&[], &[]);
        setup.prefill = vec![WorkerAddress::new(&pair.prefill.url)];
        setup.decode = vec![WorkerAddress::new(&pair.decode.url)];
        setup.config.dispatch = Dispatch::Concurrent;
        let deployment = Self { pair, proxy: setup.start().await };
        let first = deployment.proxy.post(PATH, greedy(&prompt(9, 77), 2).to_string()).await;
        assert_eq!((first.status, first.header("x-pdlink-dispatch")), (200, Some("sequential")), "{first:?}");
        deployment
    }

    async fn answer(&self, body: &Value) -> String {
        let answer = self.proxy.post(PATH, body.to_string()).await;
        assert_eq!((answer.status, answer.header("x-pdlink-dispatch")), (200, Some("concurrent")), "{answer:?}");
        answer.json()["choices"][0]["text"].as_str().expect("text").to_owned()
    }

    async fn loaded(&self) -> u64 {
        self.pair.decode.metric("pdlink_engine_prompt_tokens_total{source=\"loaded\"}").await
    }
}

/// Room for prompts of several steps.
fn large() -> ReferenceConfig {
    ReferenceConfig { num_blocks: 4096, max_model_len: 16_384, ..small() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_is_the_single_engines_over_both_paths_in_one_chunk_or_several() {
    let alone = Worker::monolithic(large()).await;
    for path in [Path::Shm, Path::Tcp] {
        for digest in [DigestPolicy::Off, DigestPolicy::Every] {
            let kv = KvConfig { paths: Some(vec![path]), digest, ..kv() };
            let deployment = Deployment::start(PairShape { kv, prefill: large(), decode: large(), ..shape() }).await;
            for len in [2, 3, 4, 5, 8, 31, 32, 33, 129, 2048, 2049, 5000] {
                let tokens = prompt(len, u32::try_from(len).unwrap());
                let (before, want) = (deployment.loaded().await, alone.greedy(&tokens, 12).await);
                assert_eq!(deployment.answer(&greedy(&tokens, 12)).await, want, "{len} tokens over {path:?}");
                assert_eq!(deployment.loaded().await - before, len as u64, "all of it came over the link");
            }
            deployment.pair.until_at_rest().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unequal_ranks_layouts_and_block_sizes_change_nothing() {
    let base = || ReferenceConfig { kv_heads: 2, ..small() };
    let alone = Worker::monolithic(base()).await;
    let layouts = [ReferenceLayout::SplitKv, ReferenceLayout::HeadMajor, ReferenceLayout::TokenMajor];
    let cases = [
        ((1, 4, layouts[0]), (2, 4, layouts[0])),
        ((2, 4, layouts[0]), (1, 4, layouts[1])),
        ((1, 8, layouts[0]), (1, 4, layouts[0])),
        ((2, 2, layouts[2]), (4, 8, layouts[1])),
    ];
    for ((p_tp, p_block, p_layout), (d_tp, d_block, d_layout)) in cases {
        let side = |block_size, layout| ReferenceConfig { block_size, layout, ..base() };
        let (prefill, decode) = (side(p_block, p_layout), side(d_block, d_layout));
        let deployment =
            Deployment::start(PairShape { prefill, decode, prefill_tp: p_tp, decode_tp: d_tp, ..shape() }).await;
        let name = format!("{p_tp} ranks of {p_block} {p_layout:?} to {d_tp} of {d_block} {d_layout:?}");
        for len in [1, 3, 4, 8, 9, 16, 17, 40] {
            // Prompts share their beginnings, so that decode finds more and more of them cached.
            let tokens = prompt(len, 1);
            let want = alone.greedy(&tokens, 8).await;
            assert_eq!(deployment.answer(&greedy(&tokens, 8)).await, want, "{len} tokens, {name}");
        }
        deployment.pair.until_at_rest().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_prefix_on_either_side_shortens_the_work_and_changes_nothing() {
    let alone = Worker::monolithic(small()).await;
    let deployment = Deployment::start(shape()).await;
    let tokens = prompt(42, 9);
    let (body, want) = (greedy(&tokens, 16), alone.greedy(&tokens, 16).await);
    let start = deployment.loaded().await;
    assert_eq!(deployment.answer(&body).await, want, "cold");
    assert_eq!(deployment.loaded().await - start, 42);
    assert_eq!(deployment.answer(&body).await, want, "warm on both sides");
    assert_eq!(deployment.loaded().await - start, 44, "only what is behind ten full blocks was loaded");
    deployment.pair.decode.ask("/reset_prefix_cache", &json!({})).await;
    assert_eq!(deployment.answer(&body).await, want, "warm on prefill alone: what it had cached is pushed too");
    assert_eq!(deployment.loaded().await - start, 86);
    deployment.pair.until_at_rest().await;
    deployment.pair.prefill.ask("/reset_prefix_cache", &json!({})).await;
    assert_eq!(deployment.answer(&body).await, want, "warm on decode alone");
    deployment.pair.until_at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_each_get_their_own_answer_streams_and_chats_too() {
    let deployment = Deployment::start(shape()).await;
    let alone = Worker::monolithic(small()).await;
    let one = async |salt: u32| {
        let tokens = prompt(20 + salt as usize, salt);
        let body = greedy(&tokens, 24);
        let (want, got) = tokio::join!(alone.greedy(&tokens, 24), deployment.answer(&body));
        assert_eq!(got, want, "request {salt}");
    };
    futures_util::future::join_all((0..24).map(one)).await;
    let chat = json!({
        "model": engine::MODEL, "messages": [{"role": "user", "content": "Tell me"}], "max_completion_tokens": 20,
        "temperature": 0.9, "seed": 4,
    });
    let want = alone.ask("/v1/chat/completions", &chat).await;
    let mut stream = chat.clone();
    stream["stream"] = json!(true);
    let got = deployment.proxy.post("/v1/chat/completions", stream.to_string()).await;
    let events = got.body.split_terminator("\n\n").filter_map(|event| event.strip_prefix("data: {"));
    let events: Vec<Value> = events.map(|event| serde_json::from_str(&format!("{{{event}")).unwrap()).collect();
    let text: String = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, want["choices"][0]["message"]["content"]);
    deployment.pair.until_at_rest().await;
}

fn faulty(faults: Vec<(When, Fault)>) -> WrapPath {
    Box::new(move |inner| Faulty::around(inner, FaultPlan { seed: 7, faults: faults.clone() }))
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_4_a_part_that_went_wrong_fails_the_digest() {
    for fault in [Fault::Corrupt, Fault::Lose] {
        // The first part of a request: the one transfer of the first request went well.
        let wrap_prefill = Some(faulty(vec![(When::Nth(2), fault)]));
        let kv = KvConfig { digest: DigestPolicy::Every, ..kv() };
        let deployment = Deployment::start(PairShape { kv, wrap_prefill, ..shape() }).await;
        let answer = deployment.proxy.post(PATH, greedy(&prompt(42, 3), 8).to_string()).await;
        let retried = deployment.proxy.metric("pdlink_proxy_retries_total").await;
        assert!(answer.status == 200 && retried >= 1.0, "{fault:?}: {answer:?}, {retried} retries");
        let want = Worker::monolithic(small()).await.greedy(&prompt(42, 3), 8).await;
        assert_eq!(answer.json()["choices"][0]["text"], want);
        deployment.pair.until_at_rest().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_drops_or_delays_parts_costs_a_retry_at_most() {
    let tokens = prompt(60, 5);
    let want = Worker::monolithic(small()).await.greedy(&tokens, 8).await;
    let delay = Fault::Delay(Duration::from_millis(30));
    let plans = [
        vec![(When::Always, delay)],
        vec![(When::Nth(2), Fault::Drop)],
        vec![(When::Nth(3), Fault::Drop)],
        vec![(When::Always, Fault::Duplicate)],
    ];
    for faults in plans {
        let name = format!("{faults:?}");
        let kv = KvConfig { transfer_timeout_ms: 500, lease_ms: 2000, ..kv() };
        let deployment = Deployment::start(PairShape { kv, wrap_prefill: Some(faulty(faults)), ..shape() }).await;
        for round in 0..3 {
            let answer = deployment.proxy.post(PATH, greedy(&tokens, 8).to_string()).await;
            assert_eq!(answer.status, 200, "{name}, round {round}: {answer:?}");
            assert_eq!(answer.json()["choices"][0]["text"], want, "{name}, round {round}");
        }
        deployment.pair.until_at_rest().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_breaks_is_an_error_that_names_it() {
    let wrap_prefill = Some(faulty(vec![(When::Nth(2), Fault::Kill)]));
    let deployment = Deployment::start(PairShape { wrap_prefill, ..shape() }).await;
    let answer = deployment.proxy.post(PATH, greedy(&prompt(60, 5), 8).to_string()).await;
    assert!(answer.status == 500 && answer.body.contains("the copy over shm"), "{answer:?}");
    deployment.pair.until_at_rest().await;
}

/// A pair whose prompts take long enough to be left at any moment.
async fn slow() -> Deployment {
    let prefill = ReferenceConfig { prefill_us_per_token: 20.0, ..large() };
    let delay = faulty(vec![(When::Always, Fault::Delay(Duration::from_millis(5)))]);
    Deployment::start(PairShape { prefill, decode: large(), wrap_prefill: Some(delay), ..shape() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_9_clients_that_leave_at_any_moment_leave_nothing_behind() {
    let deployment = slow().await;
    for wait_ms in (0..200).step_by(7) {
        let body = greedy(&prompt(4500, wait_ms), 200).to_string();
        let mut client = deployment.proxy.connect().await;
        client.send(PATH, &body).await;
        tokio::time::sleep(Duration::from_millis(wait_ms.into())).await;
    }
    deployment.pair.until_at_rest().await;
    let tokens = prompt(50, 3);
    let want = Worker::monolithic(small()).await.greedy(&tokens, 8).await;
    let answer = deployment.proxy.post(PATH, greedy(&tokens, 8).to_string()).await;
    assert_eq!(answer.json()["choices"][0]["text"], want, "it serves on");
}

#[tokio::test(flavor = "multi_thread")]
async fn px_2_prefills_own_refusal_reaches_the_client() {
    let prefill = ReferenceConfig { max_model_len: 64, ..small() };
    let deployment = Deployment::start(PairShape { prefill, ..shape() }).await;
    let answer = deployment.proxy.post(PATH, greedy(&prompt(100, 4), 8).to_string()).await;
    assert!(answer.status == 400 && answer.body.contains("64"), "{answer:?}");
    deployment.pair.until_at_rest().await;
    assert_eq!(deployment.proxy.metric("pdlink_proxy_worker_failed").await, 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_8_a_prefill_worker_that_dies_in_the_middle_is_an_error_and_decode_is_free() {
    let Deployment { pair: Pair { prefill, decode }, proxy } = slow().await;
    let body = greedy(&prompt(4500, 8), 8).to_string();
    let asked = async { proxy.post(PATH, body).await };
    let killed = async {
        decode.until("pdlink_engine_requests_loading", 1).await;
        prefill.kill().await;
    };
    let (answer, ()) = tokio::join!(asked, killed);
    assert!(answer.status >= 500, "{answer:?}");
    decode.until_at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kv_8_a_decode_worker_that_dies_in_the_middle_frees_prefill() {
    let Deployment { pair: Pair { prefill, decode }, proxy } = slow().await;
    let body = greedy(&prompt(4500, 8), 8).to_string();
    let asked = async { proxy.post(PATH, body).await };
    let killed = async {
        decode.until("pdlink_engine_requests_loading", 1).await;
        decode.kill().await;
    };
    // It ends its requests as aborted, or just hangs up.
    let _ = tokio::join!(asked, killed);
    prefill.until_at_rest().await;
}
