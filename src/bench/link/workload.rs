//! What is copied: equal runs that lie scattered at both ends, in a window that wanders through the memory.

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::memory::{to_u64, to_usize};
use crate::transport::{Run, RunList, Segment};

/// Walks through a span, one window after the other, from its start again at its end.
#[derive(Debug)]
pub(super) struct Window {
    span: u64,
    len: u64,
    at: u64,
}

impl Window {
    pub(super) fn new(span: u64, len: u64) -> Self {
        assert!(len <= span, "a window fits into its span");
        Self { span, len, at: span }
    }

    /// Where the next window starts.
    pub(super) fn next(&mut self) -> u64 {
        self.at += self.len;
        if self.at + self.len > self.span {
            self.at = 0;
        }
        self.at
    }
}

/// `bytes` bytes from `at` on, as runs of `run_bytes` whose order differs at the two ends: no two can be coalesced.
pub(in crate::bench) fn scattered(at: u64, bytes: u64, run_bytes: u64) -> RunList {
    let count = (bytes / run_bytes).max(1);
    let mut rng = StdRng::seed_from_u64(count);
    let mut order = |shift: u64| {
        let mut slots: Vec<u64> = (0..count).collect();
        slots.shuffle(&mut rng);
        slots.rotate_left(to_usize(shift % count));
        slots
    };
    let (src, dst) = (order(0), order(1));
    let runs = src.iter().zip(&dst).map(|(src, dst)| Run {
        src: at + src * run_bytes,
        dst: at + dst * run_bytes,
        len: run_bytes,
    });
    RunList { segments: vec![Segment::new(0, 0, runs.collect())] }
}

/// Bytes that depend on where they are and on nothing that compresses.
pub(in crate::bench) fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    StdRng::seed_from_u64(seed ^ to_u64(len)).fill(&mut bytes[..]);
    bytes
}

/// Whether `got` is what lies `at` bytes into memory that is `block` over and over.
pub(in crate::bench) fn is_noise(got: &[u8], at: u64, block: &[u8]) -> bool {
    let (mut at, mut left) = (to_usize(at) % block.len(), got);
    while !left.is_empty() {
        let (part, rest) = left.split_at(left.len().min(block.len() - at));
        if *part != block[at..at + part.len()] {
            return false;
        }
        (at, left) = (0, rest);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_repeats_a_block_is_known_from_any_place_on() {
        let block = noise(100, 1);
        let memory = block.repeat(4);
        assert!(is_noise(&memory[30..330], 30, &block) && is_noise(&memory[230..260], 230, &block));
        let mut wrong = memory[30..330].to_vec();
        wrong[299] ^= 1;
        assert!(!is_noise(&wrong, 30, &block) && !is_noise(&memory[30..330], 31, &block));
    }

    #[test]
    fn every_byte_of_the_window_is_moved_once() {
        let runs = scattered(4096, 64 * 1024, 4096);
        let covered = |end: fn(&Run) -> u64| {
            let mut starts: Vec<u64> = runs.segments[0].runs.iter().map(end).collect();
            starts.sort_unstable();
            starts
        };
        let want: Vec<u64> = (1..=16).map(|slot| slot * 4096).collect();
        assert_eq!(covered(|run| run.src), want);
        assert_eq!(covered(|run| run.dst), want);
    }

    #[test]
    fn windows_wander_and_never_leave_the_span() {
        let mut window = Window::new(10, 4);
        assert_eq!([window.next(), window.next(), window.next()], [0, 4, 0]);
    }
}
