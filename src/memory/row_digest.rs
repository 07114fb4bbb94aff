//! Digests of rows of bytes by their places: a sum, so that ranks, threads and the blocks of a GPU may each add up their share.
//!
//! A row is little-endian 8-byte words, the last filled up with zeros. Its digest is the wrapping sum, over its words, of a mix
//! of the word with a key made of its place. `ffi/cuda/digest_tiles.cu` computes the same on a GPU, word for word.

const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The mix of one row. `bytes` are its words, least significant byte first.
#[inline]
pub fn row(key: u64, bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<8>();
    let mut sum = 0_u64;
    let mut word_key = key;
    for word in words {
        sum = sum.wrapping_add(mix(u64::from_le_bytes(*word), word_key));
        word_key = word_key.wrapping_add(GOLDEN);
    }
    if !rest.is_empty() {
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        sum = sum.wrapping_add(mix(u64::from_le_bytes(last), word_key));
    }
    sum
}

#[inline]
fn mix(word: u64, key: u64) -> u64 {
    let x = word ^ key;
    (x & 0xFFFF_FFFF).wrapping_mul(x >> 32).wrapping_add(word.rotate_left(32))
}

/// The key of a row, by its place. The finaliser of splitmix64: neighbouring places get unrelated keys.
#[inline]
pub fn row_key(plane: u32, token: u32) -> u64 {
    let mut x = (u64::from(plane) << 32 | u64::from(token)).wrapping_add(GOLDEN);
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
