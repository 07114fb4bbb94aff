//! A prefill engine and a decode engine, and both legs of a request driven by hand.
#![allow(dead_code, reason = "each test file uses its own part")]

use pdlink::config::{KvConfig, KvSendType, ReferenceConfig};
use pdlink::engine::{EngineSetup, WrapPath};
use pdlink::kv::Role;
use reqwest::Response;
use serde_json::{Value, json};

use super::engine::{Worker, setup, small};

/// How the two are made.
pub(crate) struct PairShape {
    pub prefill: ReferenceConfig,
    pub decode: ReferenceConfig,
    pub prefill_tp: u32,
    pub decode_tp: u32,
    pub send_type: KvSendType,
    pub kv: KvConfig,
    pub decode_weight_version: u64,
    /// Put around each path of prefill and of decode.
    pub wrap_prefill: Option<WrapPath>,
    pub wrap_decode: Option<WrapPath>,
}

impl Default for PairShape {
    fn default() -> Self {
        Self {
            prefill: small(),
            decode: small(),
            prefill_tp: 1,
            decode_tp: 1,
            send_type: KvSendType::default(),
            kv: KvConfig::default(),
            decode_weight_version: 0,
            wrap_prefill: None,
            wrap_decode: None,
        }
    }
}

pub(crate) struct Pair {
    pub prefill: Worker,
    pub decode: Worker,
}

impl Pair {
    pub(crate) async fn start(shape: PairShape) -> Self {
        let side = |role, reference, tp, wrap_path| EngineSetup {
            tp,
            kv: shape.kv.clone(),
            send_type: shape.send_type,
            wrap_path,
            ..setup(role, reference)
        };
        let prefill = side(Role::Prefill, shape.prefill, shape.prefill_tp, shape.wrap_prefill);
        let mut decode = side(Role::Decode, shape.decode, shape.decode_tp, shape.wrap_decode);
        decode.weight_version = shape.decode_weight_version;
        Self { prefill: Worker::start(prefill).await, decode: Worker::start(decode).await }
    }

    /// The prefill leg, as the proxy makes it. Returns what goes to decode.
    pub(crate) async fn prefill(&self, path: &str, body: &Value) -> Value {
        let answer = self.prefill.ask(path, &prefill_leg(body)).await;
        let params = answer["kv_transfer_params"].clone();
        assert_eq!(params["do_remote_prefill"], true, "{answer}");
        params
    }

    /// The decode leg.
    pub(crate) async fn decode(&self, path: &str, body: &Value, params: Value) -> Response {
        let mut body = body.clone();
        body["kv_transfer_params"] = params;
        self.decode.post(path, &body).await
    }

    /// Both legs of a completion; the text.
    pub(crate) async fn answer(&self, body: &Value) -> String {
        let params = self.prefill("/v1/completions", body).await;
        let response = self.decode("/v1/completions", body, params).await;
        let (status, text) = (response.status(), response.text().await.expect("a body"));
        assert!(status.is_success(), "{status}: {text}");
        let answer: Value = serde_json::from_str(&text).expect("JSON");
        answer["choices"][0]["text"].as_str().expect("text").to_owned()
    }

    /// Waits until neither side has anything left (KV-2).
    pub(crate) async fn until_at_rest(&self) {
        self.prefill.until_at_rest().await;
        self.decode.until_at_rest().await;
    }
}

/// A client's body as prefill gets it.
pub(crate) fn prefill_leg(body: &Value) -> Value {
    let mut leg = body.clone();
    let fields = leg.as_object_mut().expect("an object");
    for name in ["min_tokens", "stream_options", "stream"] {
        fields.remove(name);
    }
    fields.insert("max_tokens".to_owned(), json!(1));
    if fields.contains_key("max_completion_tokens") {
        fields.insert("max_completion_tokens".to_owned(), json!(1));
    }
    let transfer_id = format!("{:032x}", rand::random::<u128>());
    leg["kv_transfer_params"] = json!({
        "do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null, "remote_block_ids": null,
        "remote_host": null, "remote_port": null, "pdlink": {"transfer_id": transfer_id},
    });
    leg
}
