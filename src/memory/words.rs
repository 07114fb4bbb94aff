//! Reading a region as 8-byte words, through a small buffer on the stack.

use super::region::{AccessError, Region};
use super::{to_u64, to_usize};

/// Words per chunk: 4 KiB, which stays in the first-level cache while the caller works on it.
const CHUNK_WORDS: usize = 512;
const WORD_BYTES: usize = size_of::<u64>();

impl Region {
    /// Reads `len` bytes from `offset` as native-endian words and gives them to `take` in order, in chunks of up to 512
    /// words. The last word is filled up with zeros if `len` is no multiple of eight. The chunks are copies: a peer that
    /// writes meanwhile changes what is copied, never what `take` holds.
    pub fn with_words(&self, offset: u64, len: u64, mut take: impl FnMut(&[u64])) -> Result<(), AccessError> {
        self.check(offset, len)?;
        let mut chunk = [0_u64; CHUNK_WORDS];
        let mut done = 0;
        while done < len {
            let bytes = to_usize(len - done).min(CHUNK_WORDS * WORD_BYTES);
            let words = bytes.div_ceil(WORD_BYTES);
            chunk[words - 1] = 0;
            self.read_words(offset + done, &mut chunk[..words], bytes)?;
            take(&chunk[..words]);
            done += to_u64(bytes);
        }
        Ok(())
    }

    fn read_words(&self, offset: u64, words: &mut [u64], bytes: usize) -> Result<(), AccessError> {
        assert!(bytes <= size_of_val(words), "a chunk is never larger than its buffer");
        if self.device().is_some() {
            let mut copied = vec![0; bytes];
            self.copy_out(offset, &mut copied)?;
            for (word, bytes) in words.iter_mut().zip(copied.chunks(WORD_BYTES)) {
                let mut whole = [0; WORD_BYTES];
                whole[..bytes.len()].copy_from_slice(bytes);
                *word = u64::from_ne_bytes(whole);
            }
            return Ok(());
        }
        let src = self.at(offset, to_u64(bytes))?;
        let dst = words.as_mut_ptr().cast::<u8>();
        // SAFETY: `src` is `bytes` readable bytes of this region, `dst` at least as many of a buffer that we hold alone,
        // so they cannot overlap. A peer's concurrent write yields old or new bytes, and any bytes are a valid u64.
        unsafe { std::ptr::copy_nonoverlapping(src, dst, bytes) };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_in_order_and_the_last_is_zero_filled() {
        let region = Region::shared(10_000).unwrap();
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        region.copy_in(0, &bytes).unwrap();
        for (offset, len) in [(0_usize, 0_usize), (0, 8), (3, 4096), (5, 4097), (7, 9_993), (9_999, 1)] {
            let mut got = Vec::new();
            region.with_words(to_u64(offset), to_u64(len), |words| got.extend_from_slice(words)).unwrap();
            let mut want = bytes[offset..offset + len].to_vec();
            want.resize(len.next_multiple_of(8), 0);
            let want: Vec<u64> = want.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).collect();
            assert_eq!(got, want, "offset {offset}, length {len}");
        }
    }

    #[test]
    fn nothing_is_read_past_the_end() {
        let region = Region::shared(64).unwrap();
        let mut calls = 0;
        assert!(region.with_words(60, 5, |_| calls += 1).is_err());
        assert!(region.with_words(u64::MAX, 2, |_| calls += 1).is_err());
        assert_eq!(calls, 0);
    }
}
