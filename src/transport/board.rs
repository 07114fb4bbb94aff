//! Words of this process that peers on its host look at: whether something still holds, without asking.
//!
//! A peer reads a word by `process_vm_readv`, which the kernel refuses once this process has begun to end: a process loses its
//! addresses before its open files, and with those its memory on a GPU. So a word that was read says two things: what it stands for
//! had not been taken back, and the memory of this process was still there. A word that cannot be read says nothing.
#![forbid(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::TransportError;
use super::flight::locked;
use super::identity::Identity;
use super::process::Process;
use super::shm::ProcessVm;
use crate::memory::to_u64;

/// Most words that are up at once; whoever finds none free is asked instead.
const WORDS: usize = 4096;
/// For the errors of those who cannot look.
const NAME: &str = "the board";
const WORD_BYTES: u64 = 8;

/// Where a process keeps its words, for its peers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoardAt {
    owner: Identity,
    address: u64,
    words: u32,
}

/// Names a word that is up. Its value is drawn at random and never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    place: u32,
    value: u64,
}

/// The words of this process.
pub struct Board {
    words: Box<[AtomicU64]>,
    free: Mutex<Vec<u32>>,
}

impl Board {
    pub fn new() -> Arc<Self> {
        let words = (0..WORDS).map(|_| AtomicU64::new(0)).collect();
        let free = (0..u32::try_from(WORDS).unwrap_or(0)).rev().collect();
        Arc::new(Self { words, free: Mutex::new(free) })
    }

    pub fn at(&self) -> io::Result<BoardAt> {
        let address = to_u64(self.words.as_ptr().addr());
        Ok(BoardAt { owner: Identity::of_self()?, address, words: u32::try_from(self.words.len()).unwrap_or(0) })
    }

    /// Puts a word up, to be taken down when it is dropped. `None`: the board is full.
    pub fn put_up(self: &Arc<Self>) -> Option<WordUp> {
        let place = locked(&self.free).pop()?;
        let value = rand::random::<u64>().max(1);
        self.words[place as usize].store(value, Ordering::SeqCst);
        Some(WordUp { board: Arc::clone(self), word: Word { place, value } })
    }
}

/// A word that is up for as long as this lives.
pub struct WordUp {
    board: Arc<Board>,
    word: Word,
}

impl WordUp {
    pub fn word(&self) -> Word {
        self.word
    }
}

impl Drop for WordUp {
    fn drop(&mut self) {
        self.board.words[self.word.place as usize].store(0, Ordering::SeqCst);
        // Nothing that happens from here on is seen by who still sees the word.
        fence(Ordering::SeqCst);
        locked(&self.board.free).push(self.word.place);
    }
}

/// The words of another process of this host.
pub struct PeerBoard {
    process: Process,
    vm: ProcessVm,
    at: BoardAt,
}

impl PeerBoard {
    /// Finds the process, and makes sure that it may be looked at.
    pub fn open(at: BoardAt) -> Result<Self, TransportError> {
        let process = Process::open(&at.owner, NAME)?;
        let board = Self { vm: ProcessVm::new(process.pid()), process, at };
        let readable = board.read(0).map_err(|error| TransportError::Unreachable {
            path: NAME,
            peer: board.process.name().to_owned(),
            reason: error.to_string(),
        });
        readable.map(|_| board)
    }

    /// Whether `word` was up, and the process there, after everything that this thread did or saw before. Takes a microsecond; while
    /// the other process changes its own mappings, as long as that takes.
    pub fn shows(&self, word: Word) -> bool {
        // What was copied before was read before.
        fence(Ordering::SeqCst);
        !self.process.gone() && self.read(word.place).is_ok_and(|value| value == word.value)
    }

    fn read(&self, place: u32) -> io::Result<u64> {
        if place >= self.at.words {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        let address = self.at.address.checked_add(u64::from(place) * WORD_BYTES);
        self.vm.read_word(address.ok_or(io::ErrorKind::InvalidInput)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_shows_until_it_is_taken_down_and_its_place_is_another_ones_then() {
        let ours = Board::new();
        let seen = PeerBoard::open(ours.at().unwrap()).unwrap();
        let up = ours.put_up().unwrap();
        let first = up.word();
        assert!(seen.shows(first));
        assert!(
            !seen.shows(Word { value: first.value ^ 1, ..first }) && !seen.shows(Word { place: u32::MAX, ..first })
        );
        drop(up);
        assert!(!seen.shows(first));
        let again = ours.put_up().unwrap();
        assert_eq!(again.word().place, first.place);
        assert!(seen.shows(again.word()) && !seen.shows(first));
    }

    #[test]
    fn a_full_board_gives_no_word_and_each_that_is_up_its_own() {
        let board = Board::new();
        let up: Vec<_> = (0..WORDS).map(|_| board.put_up().unwrap()).collect();
        assert!(board.put_up().is_none());
        let places: std::collections::HashSet<_> = up.iter().map(|up| up.word().place).collect();
        assert_eq!(places.len(), WORDS);
        drop(up);
        assert!(board.put_up().is_some());
    }

    #[test]
    fn nothing_is_seen_of_a_process_that_has_ended_or_of_memory_that_is_not_there() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let owner = Identity::of(pid).unwrap();
        assert!(
            PeerBoard::open(BoardAt { owner: owner.clone(), address: 8, words: 1 }).is_err(),
            "nothing is mapped there"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(PeerBoard::open(BoardAt { owner, address: 8, words: 1 }).is_err(), "it has ended");
    }
}
