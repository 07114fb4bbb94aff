//! Bearer tokens of admin routes.

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Whether two tokens are equal, in time that depends on neither's content nor on where they differ: both are hashed
/// first, and the hashes are compared in constant time.
pub fn tokens_equal(given: &[u8], expected: &[u8]) -> bool {
    let hash = |token: &[u8]| {
        let mut mac = Hmac::<Sha256>::new_from_slice(b"pdlink admin token").expect("HMAC takes a key of any length");
        mac.update(token);
        mac
    };
    hash(given).verify(&hash(expected).finalize().into_bytes()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_equal_only_to_themselves() {
        assert!(tokens_equal(b"secret", b"secret"));
        for other in [&b"secreT"[..], b"secre", b"secret ", b""] {
            assert!(!tokens_equal(other, b"secret"));
        }
    }
}
