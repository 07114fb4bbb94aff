//! `kv_transfer_params`: what prefill answers, routers relay unread, and decode receives.
//!
//! The names at the top are NIXL's; ours are in one object, `pdlink`, under a seal: HMAC-SHA256 by the run's secret over
//! every field. Parameters that a client made or edited are refused before decode opens a connection for them. Decode
//! still believes only what prefill grants over the control connection, never the block ids in the JSON.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::BlockId;
use crate::control::{EarlyParams, TransferId};
use crate::security::{Secret, is_sealed, seal};

/// Version of the `pdlink` object.
pub use crate::control::PARAMS_VERSION;

/// Most blocks one transfer may have, over all KV groups: 8 M tokens at vLLM's block size 16 and one group.
pub const BLOCKS_MAX: usize = 512 * 1024;
/// Most KV groups of one cache.
pub const GROUPS_MAX: usize = 64;
const RANKS_MAX: usize = 1024;
const TEXT_BYTES_MAX: usize = 1024;
const SEAL_PURPOSE: &str = "transfer parameters";

/// The `kv_transfer_params` of one request, as an engine meets them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KvRequest {
    /// None, or none that ask for anything: prefill and decode by itself.
    Plain,
    /// `do_remote_decode`: hold the KV after prefill, under this id. `early`: decode claims it meanwhile.
    Prefill { transfer_id: TransferId, early: bool },
    /// `do_remote_prefill`: load the KV.
    Decode(Box<TransferParams>),
    /// The same, of a prompt that prefill is yet to compute, or computes now.
    Early(Box<EarlyParams>),
}

/// What decode needs to fetch one request's KV.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransferParams {
    pub do_remote_prefill: bool,
    pub do_remote_decode: bool,
    pub remote_engine_id: String,
    pub remote_request_id: String,
    pub remote_host: String,
    pub remote_port: u16,
    /// One list per KV group.
    pub remote_block_ids: Vec<Vec<BlockId>>,
    pub tp_size: u32,
    pub remote_num_tokens: u32,
    pub pdlink: PdlinkParams,
}

/// Our own part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PdlinkParams {
    pub version: u32,
    pub transfer_id: TransferId,
    /// One for each of prefill's ranks, in order. Ranks that one process holds have the same.
    pub ranks: Vec<RankEndpoint>,
    /// Digest of prefill's geometry.
    #[serde(with = "hex64")]
    pub geometry_digest: u64,
    /// Of the runtime that made them. `None`: they were made where nobody hears of new weights, in a scheduler's process;
    /// the two runtimes tell each other in any case (KV-5).
    pub weight_version: Option<u64>,
    /// See the module's header. 64 hex digits.
    pub seal: String,
}

/// Where the KV of one rank is to be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RankEndpoint {
    /// `host:port` of the control listener of the runtime that holds the rank.
    pub endpoint: String,
    /// Draws a line between a worker and its restarted self (KV-8). Hex, because JSON numbers end at 53 bits elsewhere.
    #[serde(with = "hex64")]
    pub incarnation: u64,
}

/// Why parameters were refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParamsError {
    #[error("kv_transfer_params are malformed: {0}")]
    Malformed(String),
    #[error("kv_transfer_params ask for both do_remote_prefill and do_remote_decode")]
    BothSides,
    #[error("kv_transfer_params carry no `pdlink` object: they were made by another connector or by a client")]
    Foreign,
    #[error(
        "kv_transfer_params have version {theirs}, this build speaks version {PARAMS_VERSION}; upgrade the older side"
    )]
    Version { theirs: u32 },
    #[error("kv_transfer_params are too large: {what} is {is}, at most {max} is allowed")]
    TooLarge { what: &'static str, is: usize, max: usize },
    #[error("kv_transfer_params of transfer {transfer_id} were edited on the way, or made under another run's secret")]
    BrokenSeal { transfer_id: TransferId },
    #[error(
        "the early kv_transfer_params of transfer {transfer_id} were edited on the way, or made under another run's secret"
    )]
    BrokenEarlySeal { transfer_id: TransferId },
    #[error("kv_transfer_params cannot be made from these rank cards: {0}")]
    Cards(String),
}

impl KvRequest {
    /// Reads the value of `kv_transfer_params`. `None` and `null` are [`KvRequest::Plain`].
    pub fn parse(value: Option<&Value>) -> Result<Self, ParamsError> {
        let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(Self::Plain) };
        let object = value.as_object().ok_or_else(|| ParamsError::Malformed("not an object".to_owned()))?;
        let flag = |name: &str| match object.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(ParamsError::Malformed(format!("`{name}` is no boolean"))),
        };
        match (flag("do_remote_prefill")?, flag("do_remote_decode")?) {
            (true, true) => Err(ParamsError::BothSides),
            (false, false) => Ok(Self::Plain),
            (false, true) => {
                let pdlink = object.get("pdlink").ok_or(ParamsError::Foreign)?;
                let text = pdlink.get("transfer_id").and_then(Value::as_str);
                let text = text.ok_or_else(|| ParamsError::Malformed("`pdlink.transfer_id` is missing".to_owned()))?;
                let transfer_id = text.parse::<TransferId>().map_err(|error| malformed(&error))?;
                let early = match pdlink.get("early") {
                    None | Some(Value::Null) => false,
                    Some(Value::Bool(early)) => *early,
                    Some(_) => return Err(ParamsError::Malformed("`pdlink.early` is no boolean".to_owned())),
                };
                Ok(Self::Prefill { transfer_id, early })
            }
            (true, false) if object.get("pdlink").is_some_and(|pdlink| pdlink.get("early").is_some()) => {
                parse_early(value).map(|params| Self::Early(Box::new(params)))
            }
            (true, false) => TransferParams::parse(value).map(|params| Self::Decode(Box::new(params))),
        }
    }
}

impl TransferParams {
    /// Reads the full object. Checks shape and bounds; [`TransferParams::check_seal`] checks where it came from.
    pub fn parse(value: &Value) -> Result<Self, ParamsError> {
        if value.get("pdlink").is_none_or(Value::is_null) {
            return Err(ParamsError::Foreign);
        }
        check_version(value)?;
        check_bounds(value)?;
        Self::deserialize(value).map_err(|error| malformed(&error))
    }

    /// The object as JSON, as it goes into the response.
    pub fn to_json(&self) -> Value {
        serde_json::to_value(self).expect("strings, numbers and lists always become JSON")
    }

    /// Fills in the seal.
    pub fn sealed(mut self, secret: &Secret) -> Self {
        self.pdlink.seal = seal(secret, SEAL_PURPOSE, &[&self.sealed_bytes()]);
        self
    }

    /// Whether a process that holds `secret` made these parameters, and nobody has edited them since.
    pub fn check_seal(&self, secret: &Secret) -> Result<(), ParamsError> {
        if is_sealed(secret, SEAL_PURPOSE, &[&self.sealed_bytes()], &self.pdlink.seal) {
            return Ok(());
        }
        Err(ParamsError::BrokenSeal { transfer_id: self.pdlink.transfer_id })
    }

    fn sealed_bytes(&self) -> Vec<u8> {
        let mut unsealed = self.clone();
        unsealed.pdlink.seal.clear();
        postcard::to_stdvec(&unsealed).expect("plain data always encodes")
    }
}

/// Reads the parameters of a prompt that is yet to be computed. Whoever claims by them checks the seal.
fn parse_early(value: &Value) -> Result<EarlyParams, ParamsError> {
    check_version(value)?;
    let early = value.pointer("/pdlink").ok_or(ParamsError::Foreign)?;
    let params = EarlyParams::read(early).map_err(|error| malformed(&error))?;
    within("pdlink.early.endpoints", params.endpoints.len(), RANKS_MAX)?;
    let texts = params.endpoints.iter().chain([&params.seal]);
    within("the longest text", texts.map(String::len).max().unwrap_or(0), TEXT_BYTES_MAX)?;
    Ok(params)
}

/// The version is read first: another version's object may have another shape.
fn check_version(value: &Value) -> Result<(), ParamsError> {
    let theirs = value.pointer("/pdlink/version").and_then(Value::as_u64);
    let theirs = theirs.ok_or_else(|| ParamsError::Malformed("`pdlink.version` is missing".to_owned()))?;
    if theirs == u64::from(PARAMS_VERSION) {
        return Ok(());
    }
    Err(ParamsError::Version { theirs: u32::try_from(theirs).unwrap_or(u32::MAX) })
}

fn within(what: &'static str, is: usize, max: usize) -> Result<(), ParamsError> {
    if is > max { Err(ParamsError::TooLarge { what, is, max }) } else { Ok(()) }
}

fn malformed(error: &dyn std::fmt::Display) -> ParamsError {
    ParamsError::Malformed(error.to_string())
}

/// Refuses what is too large before anything is copied out of it.
fn check_bounds(value: &Value) -> Result<(), ParamsError> {
    let count = |pointer: &str| value.pointer(pointer).and_then(Value::as_array).map_or(0, Vec::len);
    let list = |pointer: &str| value.pointer(pointer).and_then(Value::as_array).into_iter().flatten();
    let blocks = list("/remote_block_ids").map(|group| group.as_array().map_or(0, Vec::len)).sum();
    within("remote_block_ids", blocks, BLOCKS_MAX)?;
    within("the number of KV groups", count("/remote_block_ids"), GROUPS_MAX)?;
    within("pdlink.ranks", count("/pdlink/ranks"), RANKS_MAX)?;
    let texts = ["/remote_engine_id", "/remote_request_id", "/remote_host", "/pdlink/seal"];
    let endpoints = list("/pdlink/ranks").filter_map(|rank| rank.get("endpoint"));
    let longest = texts.iter().filter_map(|pointer| value.pointer(pointer)).chain(endpoints);
    let longest = longest.filter_map(Value::as_str).map(str::len).max().unwrap_or(0);
    within("the longest text", longest, TEXT_BYTES_MAX)
}

pub(super) mod hex64 {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(in crate::kv) fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{value:016x}"))
    }

    pub(in crate::kv) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        // `from_str_radix` takes a sign; a digest has none.
        let plain = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let value = plain.then(|| u64::from_str_radix(&text, 16).ok()).flatten();
        value.ok_or_else(|| D::Error::custom("expected 16 hex digits"))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn example(secret: &Secret) -> TransferParams {
        TransferParams {
            do_remote_prefill: true,
            do_remote_decode: false,
            remote_engine_id: "engine".to_owned(),
            remote_request_id: "cmpl-1".to_owned(),
            remote_host: "127.0.0.1".to_owned(),
            remote_port: 14_579,
            remote_block_ids: vec![vec![BlockId(17), BlockId(18)]],
            tp_size: 1,
            remote_num_tokens: 30,
            pdlink: PdlinkParams {
                version: PARAMS_VERSION,
                transfer_id: TransferId([7; 16]),
                ranks: vec![RankEndpoint { endpoint: "127.0.0.1:14579".to_owned(), incarnation: u64::MAX - 1 }],
                geometry_digest: 3,
                weight_version: Some(0),
                seal: String::new(),
            },
        }
        .sealed(secret)
    }

    #[test]
    fn an_object_survives_a_router_that_parses_and_prints_it() {
        let secret = Secret::generate().unwrap();
        let params = example(&secret);
        let relayed: Value = serde_json::from_str(&params.to_json().to_string()).unwrap();
        let KvRequest::Decode(read) = KvRequest::parse(Some(&relayed)).unwrap() else { panic!("not a decode leg") };
        assert_eq!(*read, params);
        read.check_seal(&secret).unwrap();
    }

    #[test]
    fn keys_that_a_router_adds_at_the_top_do_no_harm() {
        let secret = Secret::generate().unwrap();
        let mut value = example(&secret).to_json();
        value["remote_prefill_cached_tokens"] = json!(0);
        TransferParams::parse(&value).unwrap().check_seal(&secret).unwrap();
    }

    #[test]
    fn every_edited_field_breaks_the_seal() {
        let secret = Secret::generate().unwrap();
        let edits = [
            ("/remote_engine_id", json!("other")),
            ("/remote_request_id", json!("other")),
            ("/remote_host", json!("10.0.0.1")),
            ("/remote_port", json!(1)),
            ("/remote_block_ids", json!([[17, 19]])),
            ("/tp_size", json!(2)),
            ("/remote_num_tokens", json!(31)),
            ("/pdlink/transfer_id", json!("08".repeat(16))),
            ("/pdlink/ranks/0/incarnation", json!("0000000000000001")),
            ("/pdlink/ranks/0/endpoint", json!("10.0.0.1:14579")),
            ("/pdlink/ranks", json!([])),
            ("/pdlink/geometry_digest", json!("0000000000000004")),
            ("/pdlink/weight_version", json!(1)),
            ("/pdlink/seal", json!("00".repeat(32))),
            ("/pdlink/seal", json!("")),
            ("/pdlink/seal", json!("0")),
        ];
        for (pointer, edit) in edits {
            let mut value = example(&secret).to_json();
            *value.pointer_mut(pointer).unwrap() = edit;
            let params = TransferParams::parse(&value).unwrap();
            assert!(matches!(params.check_seal(&secret), Err(ParamsError::BrokenSeal { .. })), "{pointer}");
        }
        let other = Secret::generate().unwrap();
        assert!(example(&secret).check_seal(&other).is_err(), "another run's parameters");
    }

    #[test]
    fn malformed_objects_are_named_and_never_taken() {
        let good = example(&Secret::loopback()).to_json();
        let edited = |pointer: &str, edit: Value| {
            let mut value = good.clone();
            *value.pointer_mut(pointer).unwrap() = edit;
            TransferParams::parse(&value)
        };
        assert!(matches!(edited("/pdlink", Value::Null), Err(ParamsError::Foreign)));
        assert!(matches!(edited("/pdlink/version", json!(1)), Err(ParamsError::Version { theirs: 1 })));
        assert!(matches!(edited("/pdlink/version", json!("1")), Err(ParamsError::Malformed(_))));
        assert!(matches!(edited("/remote_port", json!(70_000)), Err(ParamsError::Malformed(_))));
        assert!(matches!(edited("/remote_block_ids", json!([[-1]])), Err(ParamsError::Malformed(_))));
        assert!(matches!(
            edited("/remote_block_ids", json!(vec![[1]; GROUPS_MAX + 1])),
            Err(ParamsError::TooLarge { .. })
        ));
        assert!(matches!(edited("/remote_host", json!("h".repeat(2000))), Err(ParamsError::TooLarge { .. })));
        assert!(matches!(
            edited("/pdlink/ranks/0/incarnation", json!("+00000000000001")),
            Err(ParamsError::Malformed(_))
        ));
        assert!(matches!(edited("/pdlink/transfer_id", json!("x")), Err(ParamsError::Malformed(_))));
        let nil = json!([vec![0; BLOCKS_MAX + 1]]);
        assert!(matches!(edited("/remote_block_ids", nil), Err(ParamsError::TooLarge { .. })));
    }

    #[test]
    fn the_leg_is_told_by_the_flags() {
        let id = "0123456789abcdef0123456789abcdef";
        let prefill = json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
            "remote_block_ids": null, "remote_host": null, "remote_port": null, "pdlink": {"transfer_id": id}});
        assert_eq!(
            KvRequest::parse(Some(&prefill)),
            Ok(KvRequest::Prefill { transfer_id: id.parse().unwrap(), early: false })
        );
        assert_eq!(KvRequest::parse(None), Ok(KvRequest::Plain));
        assert_eq!(KvRequest::parse(Some(&Value::Null)), Ok(KvRequest::Plain));
        assert_eq!(KvRequest::parse(Some(&json!({}))), Ok(KvRequest::Plain));
        let both = json!({"do_remote_decode": true, "do_remote_prefill": true});
        assert_eq!(KvRequest::parse(Some(&both)), Err(ParamsError::BothSides));
        assert!(matches!(KvRequest::parse(Some(&json!([1]))), Err(ParamsError::Malformed(_))));
        let foreign = json!({"do_remote_decode": true});
        assert_eq!(KvRequest::parse(Some(&foreign)), Err(ParamsError::Foreign));
    }
}
