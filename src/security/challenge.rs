//! Challenge and answer: a keyed hash over what both sides said so far.

use hmac::{Hmac, Mac};
use rand::TryRngCore;
use rand::rngs::OsRng;
use sha2::Sha256;

use super::{Secret, SecretError};

pub const NONCE_BYTES: usize = 32;
pub const PROOF_BYTES: usize = 32;

/// A fresh random challenge. Never used twice, so that an answer overheard once is worth nothing.
pub type Nonce = [u8; NONCE_BYTES];

/// HMAC-SHA256 under the run's secret.
pub type Proof = [u8; PROOF_BYTES];

/// Draws a challenge from the kernel.
pub fn nonce() -> Result<Nonce, SecretError> {
    let mut bytes = [0; NONCE_BYTES];
    OsRng.try_fill_bytes(&mut bytes).map_err(|error| SecretError::NoRandomness { detail: error.to_string() })?;
    Ok(bytes)
}

/// Proves knowledge of `secret` for one `purpose` and transcript. Purposes keep an answer of one side from being sent
/// back as the other's, and make the result fit to be a derived key too: one that leaks gives nothing else away.
pub fn prove(secret: &Secret, purpose: &str, transcript: &[&[u8]]) -> Proof {
    mac(secret, purpose, transcript).finalize().into_bytes().into()
}

/// Whether `proof` is what [`prove`] gives; compares in constant time.
pub fn proves(secret: &Secret, purpose: &str, transcript: &[&[u8]], proof: &[u8]) -> bool {
    mac(secret, purpose, transcript).verify_slice(proof).is_ok()
}

/// A proof as text, for what travels in JSON: 64 hex digits.
pub fn seal(secret: &Secret, purpose: &str, transcript: &[&[u8]]) -> String {
    hex::encode(prove(secret, purpose, transcript))
}

/// Whether `text` is what [`seal`] gives.
pub fn is_sealed(secret: &Secret, purpose: &str, transcript: &[&[u8]], text: &str) -> bool {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let pairs = text.as_bytes().chunks(2);
    let proof: Option<Vec<u8>> = pairs.map(|pair| Some(digit(pair.first()?)? * 16 + digit(pair.get(1)?)?)).collect();
    proof.is_some_and(|proof| proves(secret, purpose, transcript, &proof))
}

/// Every part is preceded by its length: no two transcripts run together into the same bytes.
fn mac(secret: &Secret, purpose: &str, transcript: &[&[u8]]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.bytes()).expect("HMAC takes a key of any length");
    for part in std::iter::once(&purpose.as_bytes()).chain(transcript) {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_holds_for_its_secret_purpose_and_transcript_only() {
        let (ours, other) = (Secret::generate().unwrap(), Secret::generate().unwrap());
        let proof = prove(&ours, "client", &[b"ab", b"c"]);
        assert!(proves(&ours, "client", &[b"ab", b"c"], &proof));
        assert!(!proves(&other, "client", &[b"ab", b"c"], &proof));
        assert!(!proves(&ours, "server", &[b"ab", b"c"], &proof));
        assert!(!proves(&ours, "client", &[b"a", b"bc"], &proof), "parts must not run together");
        assert!(!proves(&ours, "client", &[b"ab", b"c"], &proof[..31]));
    }

    #[test]
    fn challenges_differ() {
        assert_ne!(nonce().unwrap(), nonce().unwrap());
    }
}
