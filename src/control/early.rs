//! Parameters with which decode claims KV that is yet to be computed (concurrent dispatch).
//!
//! The router makes them, not prefill: it draws the transfer id, and has read out of earlier answers where the runtimes of
//! the prefill worker listen. The seal shows that the run's own router did. All that KV is judged by (geometry, weight
//! version, the prompt, the blocks) is still told over the control connection, by the two workers themselves.

use serde::Deserialize;
use serde_json::{Value, json};

use super::TransferId;
use crate::security::{Secret, is_sealed, seal};

/// Version of the `pdlink` object of `kv_transfer_params`.
pub const PARAMS_VERSION: u32 = 3;
const SEAL_PURPOSE: &str = "early parameters";

/// What decode needs to claim a transfer at a prefill worker that is only about to begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EarlyParams {
    pub transfer_id: TransferId,
    /// `host:port` of the control listener for each of prefill's ranks, in order. Ranks of one process have the same.
    pub endpoints: Vec<String>,
    /// 64 hex digits.
    pub seal: String,
}

/// The part of the `pdlink` object that is read here.
#[derive(Deserialize)]
struct Object {
    transfer_id: TransferId,
    early: Early,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Early {
    endpoints: Vec<String>,
    seal: String,
}

impl EarlyParams {
    pub fn sealed(transfer_id: TransferId, endpoints: Vec<String>, secret: &Secret) -> Self {
        let seal = seal(secret, SEAL_PURPOSE, &transcript(&transfer_id, &endpoints));
        Self { transfer_id, endpoints, seal }
    }

    /// Whether a process that holds `secret` made these parameters, and nobody has edited them since.
    pub fn check_seal(&self, secret: &Secret) -> bool {
        is_sealed(secret, SEAL_PURPOSE, &transcript(&self.transfer_id, &self.endpoints), &self.seal)
    }

    /// Reads the `pdlink` object.
    pub fn read(pdlink: &Value) -> Result<Self, serde_json::Error> {
        let Object { transfer_id, early: Early { endpoints, seal } } = Object::deserialize(pdlink)?;
        Ok(Self { transfer_id, endpoints, seal })
    }

    /// The whole `kv_transfer_params`.
    pub fn to_json(&self) -> Value {
        json!({
            "do_remote_prefill": true,
            "do_remote_decode": false,
            "pdlink": {
                "version": PARAMS_VERSION,
                "transfer_id": self.transfer_id,
                "early": {"endpoints": self.endpoints, "seal": self.seal},
            },
        })
    }
}

fn transcript<'a>(transfer_id: &'a TransferId, endpoints: &'a [String]) -> Vec<&'a [u8]> {
    std::iter::once(transfer_id.0.as_slice()).chain(endpoints.iter().map(String::as_bytes)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_survive_a_relay_and_no_edit() {
        let secret = Secret::generate().unwrap();
        let made = EarlyParams::sealed(TransferId([7; 16]), vec!["a:1".to_owned(), "b:2".to_owned()], &secret);
        let relayed: Value = serde_json::from_str(&made.to_json().to_string()).unwrap();
        let read = |value: &Value| EarlyParams::read(&value["pdlink"]).unwrap();
        assert_eq!(read(&relayed), made);
        assert!(made.check_seal(&secret) && !made.check_seal(&Secret::generate().unwrap()));
        for (pointer, edit) in [
            ("/pdlink/transfer_id", json!("08".repeat(16))),
            ("/pdlink/early/endpoints", json!(["a:1"])),
            ("/pdlink/early/endpoints", json!(["a:1b", ":2"])),
            ("/pdlink/early/endpoints/0", json!("evil:1")),
            ("/pdlink/early/seal", json!("")),
        ] {
            let mut edited = relayed.clone();
            *edited.pointer_mut(pointer).unwrap() = edit;
            assert!(!read(&edited).check_seal(&secret), "{pointer}");
        }
    }
}
