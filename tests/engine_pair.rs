//! Two engines, no proxy: the KV of a prompt is handed over, and the answer must be the single engine's.

#[path = "support/engine.rs"]
mod engine;
#[path = "support/pair.rs"]
mod pair;

use engine::{Worker, greedy, prompt, small};
use pair::{Pair, PairShape};
use pdlink::config::{KvConfig, KvSendType, Path, ReferenceConfig, ReferenceLayout};
use serde_json::json;

const SEND_TYPES: [KvSendType; 3] = [KvSendType::Get, KvSendType::Put, KvSendType::PutAsync];

fn over(path: Path) -> KvConfig {
    KvConfig { paths: Some(vec![path]), ..KvConfig::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_is_the_single_engines_on_both_paths_and_by_all_send_types() {
    let alone = Worker::monolithic(small()).await;
    for path in [Path::Shm, Path::Tcp] {
        for send_type in SEND_TYPES {
            let shape = PairShape { send_type, kv: over(path), ..PairShape::default() };
            let pair = Pair::start(shape).await;
            let lengths = (1..=14).chain([31, 32, 33, 127, 128, 129]);
            for (count, len) in (1..).zip(lengths) {
                let tokens = prompt(len, u32::try_from(len).unwrap());
                let want = alone.greedy(&tokens, 12).await;
                let got = pair.answer(&greedy(&tokens, 12)).await;
                assert_eq!(got, want, "{len} tokens over {path:?} by {send_type:?}");
                let computed = pair.decode.metric("pdlink_engine_prompt_tokens_total{source=\"computed\"}").await;
                assert_eq!(computed, count, "decode computes the last token of a prompt, and no other");
            }
            pair.until_at_rest().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unequal_ranks_layouts_and_block_sizes_change_nothing() {
    let base = || ReferenceConfig { kv_heads: 2, ..small() };
    let alone = Worker::monolithic(base()).await;
    let layouts = [ReferenceLayout::SplitKv, ReferenceLayout::HeadMajor, ReferenceLayout::TokenMajor];
    // (prefill's ranks, block size, layout; decode's)
    let cases = [
        ((1, 4, layouts[0]), (2, 4, layouts[0])),
        ((2, 4, layouts[0]), (1, 4, layouts[1])),
        ((1, 4, layouts[1]), (4, 4, layouts[2])),
        ((4, 4, layouts[2]), (2, 4, layouts[0])),
        ((1, 8, layouts[0]), (1, 4, layouts[0])),
        ((2, 2, layouts[2]), (1, 8, layouts[1])),
        ((1, 16, layouts[1]), (4, 2, layouts[1])),
    ];
    for ((p_tp, p_block, p_layout), (d_tp, d_block, d_layout)) in cases {
        let side = |block_size, layout| ReferenceConfig { block_size, layout, ..base() };
        let pair = Pair::start(PairShape {
            prefill: side(p_block, p_layout),
            decode: side(d_block, d_layout),
            prefill_tp: p_tp,
            decode_tp: d_tp,
            ..PairShape::default()
        })
        .await;
        let name = format!("{p_tp} ranks of {p_block} {p_layout:?} to {d_tp} of {d_block} {d_layout:?}");
        for len in [1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 40] {
            // Prompts share their beginnings, so that decode finds more and more of them cached.
            let tokens = prompt(len, 1);
            let want = alone.greedy(&tokens, 8).await;
            assert_eq!(pair.answer(&greedy(&tokens, 8)).await, want, "{len} tokens, {name}");
        }
        pair.until_at_rest().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_prefix_on_either_side_shortens_the_work_and_changes_nothing() {
    let alone = Worker::monolithic(small()).await;
    let pair = Pair::start(PairShape::default()).await;
    let tokens = prompt(42, 9);
    let want = alone.greedy(&tokens, 16).await;
    assert_eq!(pair.answer(&greedy(&tokens, 16)).await, want, "cold");
    let loaded = async || pair.decode.metric("pdlink_engine_prompt_tokens_total{source=\"loaded\"}").await;
    assert_eq!(loaded().await, 42);
    assert_eq!(pair.answer(&greedy(&tokens, 16)).await, want, "warm on both sides");
    assert_eq!(loaded().await, 44, "only what is behind ten full blocks was loaded");
    pair.decode.ask("/reset_prefix_cache", &json!({})).await;
    assert_eq!(pair.answer(&greedy(&tokens, 16)).await, want, "warm on prefill alone");
    assert_eq!(loaded().await, 86);
    pair.until_at_rest().await;
    pair.prefill.ask("/reset_prefix_cache", &json!({})).await;
    assert_eq!(pair.answer(&greedy(&tokens, 16)).await, want, "warm on decode alone");
    assert_eq!(pair.decode.greedy(&tokens, 16).await, want, "decode by itself");
    pair.until_at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_each_get_their_own_answer() {
    let pair = Pair::start(PairShape::default()).await;
    let alone = Worker::monolithic(small()).await;
    let one = async |salt: u32| {
        let tokens = prompt(20 + salt as usize, salt);
        let body = greedy(&tokens, 24);
        let (want, got) = tokio::join!(alone.greedy(&tokens, 24), pair.answer(&body));
        assert_eq!(got, want, "request {salt}");
    };
    futures_util::future::join_all((0..24).map(one)).await;
    pair.until_at_rest().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_streams_and_sampling_are_handed_over_too() {
    let alone = Worker::monolithic(small()).await;
    let pair = Pair::start(PairShape::default()).await;
    let chat = json!({
        "model": engine::MODEL, "messages": [{"role": "user", "content": "Tell me"}], "max_completion_tokens": 20,
        "temperature": 0.9, "seed": 4, "logprobs": true, "top_logprobs": 2, "stop": ["zq"], "min_tokens": 3,
    });
    let want = alone.ask("/v1/chat/completions", &chat).await;
    let params = pair.prefill("/v1/chat/completions", &chat).await;
    let got = pair.decode("/v1/chat/completions", &chat, params).await.json::<serde_json::Value>().await.unwrap();
    assert_eq!(got["choices"], want["choices"]);
    let mut stream = chat.clone();
    stream["stream"] = json!(true);
    let params = pair.prefill("/v1/chat/completions", &chat).await;
    stream["kv_transfer_params"] = params;
    let events = pair.decode.stream("/v1/chat/completions", &stream).await;
    let text: String = events.iter().map(|e| e["choices"][0]["delta"]["content"].as_str().unwrap()).collect();
    assert_eq!(text, want["choices"][0]["message"]["content"]);
    pair.until_at_rest().await;
}
