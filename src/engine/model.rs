//! The model that is not there: pure functions from tokens to KV bytes, and from KV bytes to the next token.
//!
//! The KV row of (layer, half, head, position) depends on every token up to that position and on the weight version, as
//! causal attention makes it. The next token depends on a digest of the context's KV as it lies in memory, so a block that
//! is lost, stale, shifted or another request's changes the answer.

use super::tokenizer::{EOS, Token};

/// Candidates per step: what sampling picks from, and the most `top_logprobs` can show.
pub(super) const CANDIDATES: usize = 20;

/// One in this many candidates is the end of the answer.
const EOS_ONE_IN: u64 = 128;

/// What answers are written in: words of lower-case letters.
const ALPHABET: &[u8; 40] = b"abcdefghijklmnopqrstuvwxyzaeinst      .,";

/// Folds two words into one that depends on each bit of both.
pub(super) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(29) ^ b.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The weights that an answer is made with: their version, and a word that stands for what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Weights {
    pub version: u64,
    word: u64,
}

impl Weights {
    /// What a worker is started with: there are no bytes, so the version stands for them.
    pub(super) fn base(version: u64) -> Self {
        Self { version, word: version }
    }

    /// Weights of this digest. Equal weights make equal answers, whatever their version.
    pub(super) fn of(version: u64, digest: [u8; 16]) -> Self {
        let (low, high) = digest.split_at(8);
        let word = |half: &[u8]| half.iter().fold(0, |word, &byte| word << 8 | u64::from(byte));
        Self { version, word: mix(word(low), word(high)) }
    }

    /// The same with an adapter of this digest.
    pub(super) fn adapted(self, adapter: Option<[u8; 16]>) -> Self {
        let with = |digest| mix(self.word, Self::of(0, digest).word);
        Self { word: adapter.map_or(self.word, with), ..self }
    }

    /// As one word.
    pub(super) fn word(self) -> u64 {
        self.word
    }

    /// The same weights, as another version.
    pub(super) fn as_version(self, version: u64) -> Self {
        Self { version, ..self }
    }
}

/// A hash of all tokens up to a position, and of the weights that read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Context(u64);

impl Context {
    /// Before the first token.
    pub(super) fn start(weights: Weights) -> Self {
        Self(mix(0x7064_6c69_6e6b, weights.word))
    }

    /// As one word.
    pub(super) fn word(self) -> u64 {
        self.0
    }

    /// After one more token.
    pub(super) fn then(self, token: Token) -> Self {
        Self(mix(self.0, u64::from(token)))
    }
}

/// Which row of the KV cache: a layer, K (0) or V (1), a head counted over all ranks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    pub layer: usize,
    pub half: usize,
    pub head: usize,
}

/// Writes the KV of one row at the position that `context` ends at.
pub(super) fn fill_row(out: &mut [u8], context: Context, row: Row) {
    let place = (row.layer as u64) << 33 | (row.half as u64) << 32 | row.head as u64;
    let key = mix(context.0, place);
    for (index, chunk) in out.chunks_mut(8).enumerate() {
        let word = mix(key, index as u64).to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

/// A token that may come next, and how likely the model says it is (natural logarithm).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    pub token: Token,
    pub logprob: f64,
}

/// How a token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    pub top_p: f64,
    /// 0 is no limit.
    pub top_k: usize,
    /// Already different for each choice of a request.
    pub seed: u64,
}

/// Everything the next token is a function of: what memory holds for the context, its length, its last token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Logits(u64);

impl Logits {
    pub(super) fn new(digest: u64, context_tokens: usize, last: Token) -> Self {
        Self(mix(mix(digest, context_tokens as u64), u64::from(last)))
    }

    /// The likeliest tokens, best first, all different. With `no_eos` the end of the answer is not among them.
    pub(super) fn candidates(self, count: usize, no_eos: bool) -> Vec<Candidate> {
        let mut found: Vec<Candidate> = Vec::with_capacity(count);
        for draw in 0..4096 {
            if found.len() == count {
                break;
            }
            let word = mix(self.0, draw);
            let token = token_of(word);
            if (no_eos && token == EOS) || found.iter().any(|other| other.token == token) {
                continue;
            }
            let logprob = -0.7 - 0.7 * found.len() as f64 - 0.4 * unit(mix(word, 1));
            found.push(Candidate { token, logprob });
        }
        found
    }

    /// Chooses the token at `step` of the answer, among `candidates`, of which there must be at least one.
    pub(super) fn choose(candidates: &[Candidate], sampling: &Sampling, step: usize) -> Candidate {
        if sampling.temperature <= 0.0 || candidates.len() == 1 {
            return candidates[0];
        }
        let kept = if sampling.top_k == 0 { candidates.len() } else { sampling.top_k.min(candidates.len()) };
        let weights: Vec<f64> = candidates[..kept].iter().map(|c| (c.logprob / sampling.temperature).exp()).collect();
        let nucleus = nucleus(&weights, sampling.top_p);
        let mut left = unit(mix(sampling.seed, step as u64)) * weights[..nucleus].iter().sum::<f64>();
        for (candidate, weight) in candidates.iter().zip(&weights[..nucleus]) {
            if left < *weight {
                return *candidate;
            }
            left -= weight;
        }
        candidates[nucleus - 1]
    }
}

/// How many of the likeliest make up `top_p` of the whole; at least one.
fn nucleus(weights: &[f64], top_p: f64) -> usize {
    let whole: f64 = weights.iter().sum();
    let mut sum = 0.0;
    for (index, weight) in weights.iter().enumerate() {
        sum += weight;
        if sum >= top_p * whole {
            return index + 1;
        }
    }
    weights.len()
}

fn token_of(word: u64) -> Token {
    if word.is_multiple_of(EOS_ONE_IN) {
        return EOS;
    }
    let index = usize::try_from((word >> 16) % ALPHABET.len() as u64).unwrap_or_default();
    Token::from(ALPHABET[index])
}

/// A word as a number in [0, 1).
fn unit(word: u64) -> f64 {
    (word >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: Row = Row { layer: 1, half: 0, head: 2 };

    fn row(context: Context, row: Row) -> [u8; 64] {
        let mut out = [0; 64];
        fill_row(&mut out, context, row);
        out
    }

    #[test]
    fn a_row_depends_on_all_tokens_before_it_and_on_nothing_after() {
        let of = |tokens: &[Token]| {
            tokens.iter().fold(Context::start(Weights::base(0)), |context, &token| context.then(token))
        };
        assert_eq!(of(&[1, 2, 3]), of(&[1, 2]).then(3));
        assert_ne!(row(of(&[1, 2, 3]), ROW), row(of(&[9, 2, 3]), ROW));
        assert_ne!(row(of(&[1, 2, 3]), ROW), row(of(&[2, 1, 3]), ROW));
        assert_ne!(row(of(&[1]), ROW), row(of(&[1, 1]), ROW));
    }

    #[test]
    fn a_row_depends_on_its_place_and_on_the_weight_version() {
        let context = Context::start(Weights::base(0)).then(7);
        let here = row(context, ROW);
        for other in [Row { layer: 2, ..ROW }, Row { half: 1, ..ROW }, Row { head: 3, ..ROW }] {
            assert_ne!(here, row(context, other), "{other:?}");
        }
        assert_ne!(here, row(Context::start(Weights::base(1)).then(7), ROW), "KV-5");
    }

    #[test]
    fn a_row_depends_on_what_the_weights_are_and_not_on_their_number() {
        let of = |weights| row(Context::start(weights).then(7), ROW);
        let (here, mut other) = ([9; 16], [9; 16]);
        other[15] = 8;
        assert_eq!(of(Weights::of(1, here)), of(Weights::of(2, here)));
        assert_ne!(of(Weights::of(1, here)), of(Weights::of(1, other)));
        assert_eq!(of(Weights::base(0).as_version(3)), of(Weights::base(0)));
    }

    #[test]
    fn candidates_are_distinct_sorted_and_words() {
        for digest in 0..200 {
            let found = Logits::new(digest, 5, 1).candidates(CANDIDATES, false);
            assert_eq!(found.len(), CANDIDATES);
            for pair in found.windows(2) {
                assert!(pair[0].logprob > pair[1].logprob);
            }
            for (index, candidate) in found.iter().enumerate() {
                assert!(found[..index].iter().all(|other| other.token != candidate.token));
                assert!(candidate.token == EOS || (0x20..0x7f).contains(&candidate.token));
            }
        }
    }

    #[test]
    fn answers_end_sometimes_but_not_when_told_not_to() {
        let first = |digest, no_eos| Logits::new(digest, 1, 1).candidates(1, no_eos)[0].token;
        let ends = (0..20_000).filter(|&digest| first(digest, false) == EOS).count();
        assert!((50..500).contains(&ends), "{ends} of 20000 end");
        assert!((0..20_000).all(|digest| first(digest, true) != EOS));
    }

    #[test]
    fn sampling_is_a_function_of_its_seed_and_greedy_ignores_it() {
        let found = Logits::new(3, 5, 1).candidates(CANDIDATES, true);
        let with = |temperature, seed| {
            let sampling = Sampling { temperature, top_p: 1.0, top_k: 0, seed };
            (0..64).map(|step| Logits::choose(&found, &sampling, step).token).collect::<Vec<_>>()
        };
        assert_eq!(with(1.0, 7), with(1.0, 7));
        assert_ne!(with(1.0, 7), with(1.0, 8));
        assert_eq!(with(0.0, 7), with(0.0, 8));
        let narrow = Sampling { temperature: 1.0, top_p: 1.0, top_k: 1, seed: 7 };
        assert!((0..64).all(|step| Logits::choose(&found, &narrow, step).token == found[0].token));
        let nucleus = Sampling { temperature: 1.0, top_p: 0.01, top_k: 0, seed: 7 };
        assert!((0..64).all(|step| Logits::choose(&found, &nucleus, step).token == found[0].token));
    }
}
