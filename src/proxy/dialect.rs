//! What the two legs carry so that the workers find each other's KV: relayed parameters, or a request id.
//!
//! Native connectors and vLLM's NixlConnector are driven by `kv_transfer_params`: prefill is asked to hold the KV,
//! answers with an object, and decode is given that object unread and unchanged. P2pNcclConnector of vLLM up to 0.23
//! knows no such field; both addresses are in the request id there. A client's own parameters never reach a worker.

use http::header;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::plan::{Plan, Shape, sampling_of};
use super::trace::TRACEPARENT;
use super::upstream::write_headers;
use super::worker::Worker;
use crate::config::Dispatch;
use crate::control::TransferId;
use crate::openai::headers::{X_PDLINK_TRANSFER_ID, X_REQUEST_ID};
use crate::openai::splice::{BodyError, Field, Fields, RequestBody, Spliced};

/// Tells P2pNcclConnector's proxies which decode worker a request is for.
const X_KV_TARGET: HeaderName = HeaderName::from_static("x-kv-target");

/// Which connector the workers run, as far as the proxy must know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Connector {
    /// pdlink's runtime: relayed parameters, and a runtime that can be told of an abort.
    #[default]
    Native,
    /// vLLM's NixlConnector: relayed parameters.
    VllmNixl,
    /// vLLM's P2pNcclConnector: addresses in the request id.
    P2pNccl,
}

impl Connector {
    /// The name that people know it by.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Native => "pdlink's connector",
            Self::VllmNixl => "vLLM's NixlConnector",
            Self::P2pNccl => "vLLM's P2pNcclConnector",
        }
    }
}

/// The last version of vLLM whose workers read addresses out of request ids.
pub const REQUEST_IDS_LAST: (u32, u32) = (0, 23);

/// Fields that the prefill leg must not have as the client sent them.
const PREFILL_DROPS: Fields = Fields::of(&[
    Field::Stream,
    Field::StreamOptions,
    Field::MaxTokens,
    Field::MaxCompletionTokens,
    Field::MinTokens,
    Field::MinCompletionTokens,
    Field::KvTransferParams,
]);
const PREFILL_DROPS_GENERATE: Fields =
    Fields::of(&[Field::Stream, Field::StreamOptions, Field::SamplingParams, Field::KvTransferParams]);
const SAMPLING_DROPS: Fields = Fields::of(&[Field::MaxTokens, Field::MinTokens]);
const DECODE_DROPS: Fields = Fields::of(&[Field::KvTransferParams]);
const DECODE_DROPS_MERGED: Fields = Fields::of(&[Field::KvTransferParams, Field::PromptLogprobs]);

/// The body of the prefill leg: one token, no stream, and the request to hold the KV.
pub(crate) fn prefill_body<'a>(
    connector: Connector,
    plan: Plan,
    body: &'a RequestBody,
    transfer: TransferId,
    dispatch: Dispatch,
) -> Result<Spliced<'a>, BodyError> {
    let mut inserted = Vec::with_capacity(320);
    inserted.extend_from_slice(br#""stream":false"#);
    if plan.shape == Shape::Generate {
        inserted.extend_from_slice(br#","sampling_params":"#);
        match sampling_of(plan.shape, body)? {
            Some(sampling) => {
                inserted.extend_from_slice(&sampling.splice(SAMPLING_DROPS, br#""max_tokens":1"#).join());
            }
            None => inserted.extend_from_slice(br#"{"max_tokens":1}"#),
        }
    } else {
        inserted.extend_from_slice(br#","max_tokens":1"#);
        if body.names(Field::MaxCompletionTokens) {
            inserted.extend_from_slice(br#","max_completion_tokens":1"#);
        }
    }
    if connector != Connector::P2pNccl {
        inserted.extend_from_slice(
            br#","kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null"#,
        );
        if connector == Connector::Native {
            inserted.extend_from_slice(br#","pdlink":{"transfer_id":""#);
            inserted.extend_from_slice(&hex(transfer));
            inserted.push(b'"');
            if dispatch == Dispatch::Concurrent {
                inserted.extend_from_slice(br#","early":true"#);
            }
            inserted.push(b'}');
        }
        inserted.push(b'}');
    }
    let drops = if plan.shape == Shape::Generate { PREFILL_DROPS_GENERATE } else { PREFILL_DROPS };
    Ok(body.splice(drops, &inserted))
}

/// The body of the decode leg: the client's own, with prefill's parameters.
pub(crate) fn decode_body<'a>(plan: Plan, body: &'a RequestBody, params: Option<&[u8]>) -> Spliced<'a> {
    let drops = if plan.merge_logprobs { DECODE_DROPS_MERGED } else { DECODE_DROPS };
    match params {
        Some(params) => {
            let inserted = [br#""kv_transfer_params":"#.as_slice(), params].concat();
            body.splice(drops, &inserted)
        }
        // Nothing to put in: the client's body as it is, but for parameters of its own.
        None if !body.names(Field::KvTransferParams) && !plan.merge_logprobs => {
            Spliced { head: Vec::new(), kept: vec![body.text()] }
        }
        None => body.splice(drops, br#""kv_transfer_params":null"#),
    }
}

/// The client's headers, as header lines for either leg, without those that the proxy writes itself: with traces, the legs'
/// parent too.
pub(crate) fn common_headers(client: &HeaderMap, has_traces: bool) -> Vec<u8> {
    write_headers(client, |name| {
        (has_traces && name == TRACEPARENT)
            || [&X_REQUEST_ID, &X_PDLINK_TRANSFER_ID, &X_KV_TARGET, &header::ACCEPT_ENCODING].contains(&name)
    })
}

/// Header lines of both legs of one pair: what is common, and the ids.
pub(crate) fn pair_headers(
    connector: Connector,
    common: &[u8],
    request_id: &HeaderValue,
    pair: Option<(&Worker, &Worker, TransferId)>,
) -> Vec<u8> {
    let mut lines = Vec::with_capacity(common.len() + 256);
    lines.extend_from_slice(common);
    lines.extend_from_slice(b"x-request-id: ");
    match (connector, pair) {
        (Connector::P2pNccl, Some((prefill, decode, transfer))) => {
            let decode = decode.address.kv_addr.as_deref().unwrap_or_default();
            let prefill = prefill.address.kv_addr.as_deref().unwrap_or_default();
            for part in ["___prefill_addr_", prefill, "___decode_addr_", decode, "_"] {
                lines.extend_from_slice(part.as_bytes());
            }
            lines.extend_from_slice(&hex(transfer));
            lines.extend_from_slice(b"\r\nx-kv-target: ");
            lines.extend_from_slice(decode.as_bytes());
        }
        _ => lines.extend_from_slice(request_id.as_bytes()),
    }
    lines.extend_from_slice(b"\r\n");
    lines
}

/// The 32 digits of a transfer id, without going through a formatter.
pub(crate) fn hex(transfer: TransferId) -> [u8; 32] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0; 32];
    for (pair, byte) in text.chunks_exact_mut(2).zip(transfer.0) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 15)];
    }
    text
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::Mode;
    use super::*;

    const ID: TransferId = TransferId([0xab; 16]);

    fn legs(connector: Connector, shape: Shape, text: &str, params: Option<&[u8]>) -> (String, String) {
        let body = RequestBody::scan(Bytes::copy_from_slice(text.as_bytes())).expect("valid");
        let plan = Plan::of(shape, &body, Mode::Disaggregated, 0).expect("valid");
        let prefill = prefill_body(connector, plan, &body, ID, Dispatch::Sequential).expect("valid").join();
        let decode = decode_body(plan, &body, params).join();
        (String::from_utf8(prefill).expect("UTF-8"), String::from_utf8(decode).expect("UTF-8"))
    }

    #[test]
    fn both_bodies_are_splices_of_the_clients() {
        let text = r#"{"model":"m","messages":[{"role":"user"}],"stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":9,"min_tokens":2,"kv_transfer_params":{"remote_host":"evil"},"temperature":0}"#;
        let (prefill, decode) = legs(Connector::Native, Shape::Chat, text, Some(br#"{"x":1}"#));
        assert_eq!(
            prefill,
            r#"{"stream":false,"max_tokens":1,"max_completion_tokens":1,"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null,"pdlink":{"transfer_id":"abababababababababababababababab"}},"model":"m","messages":[{"role":"user"}],"temperature":0}"#
        );
        assert_eq!(
            decode,
            r#"{"kv_transfer_params":{"x":1},"model":"m","messages":[{"role":"user"}],"stream":true,"stream_options":{"include_usage":true},"max_completion_tokens":9,"min_tokens":2,"temperature":0}"#
        );
    }

    #[test]
    fn prefill_is_told_of_an_early_claim() {
        let body = RequestBody::scan(Bytes::from_static(br#"{"prompt":"a"}"#)).expect("valid");
        let plan = Plan::of(Shape::Completion, &body, Mode::Disaggregated, 0).expect("valid");
        let leg = prefill_body(Connector::Native, plan, &body, ID, Dispatch::Concurrent).expect("valid").join();
        let leg = String::from_utf8(leg).expect("UTF-8");
        assert!(leg.contains(r#""pdlink":{"transfer_id":"abababababababababababababababab","early":true}}"#), "{leg}");
    }

    #[test]
    fn nixl_gets_its_six_keys_and_p2p_nccl_gets_none() {
        let (prefill, _) = legs(Connector::VllmNixl, Shape::Completion, r#"{"prompt":"a"}"#, None);
        assert_eq!(
            prefill,
            r#"{"stream":false,"max_tokens":1,"kv_transfer_params":{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null},"prompt":"a"}"#
        );
        let (prefill, decode) = legs(Connector::P2pNccl, Shape::Completion, r#"{"prompt":"a","max_tokens":5}"#, None);
        assert_eq!(prefill, r#"{"stream":false,"max_tokens":1,"prompt":"a"}"#);
        assert_eq!(decode, r#"{"prompt":"a","max_tokens":5}"#);
        let (_, decode) =
            legs(Connector::P2pNccl, Shape::Completion, r#"{"kv_transfer_params":{},"prompt":"a"}"#, None);
        assert_eq!(decode, r#"{"kv_transfer_params":null,"prompt":"a"}"#);
    }

    #[test]
    fn generate_has_its_limits_inside_the_sampling_parameters() {
        let text = r#"{"token_ids":[1,2],"sampling_params":{"max_tokens":7,"seed":1,"min_tokens":2},"stream":true}"#;
        let (prefill, decode) = legs(Connector::P2pNccl, Shape::Generate, text, None);
        assert_eq!(prefill, r#"{"stream":false,"sampling_params":{"max_tokens":1,"seed":1},"token_ids":[1,2]}"#);
        assert_eq!(decode, text);
    }

    #[test]
    fn prompt_logprobs_leave_decodes_body() {
        let text = r#"{"prompt":"a","prompt_logprobs":2}"#;
        let (prefill, decode) = legs(Connector::VllmNixl, Shape::Completion, text, Some(b"{}"));
        assert!(prefill.ends_with(r#""prompt":"a","prompt_logprobs":2}"#));
        assert_eq!(decode, r#"{"kv_transfer_params":{},"prompt":"a"}"#);
    }
}
