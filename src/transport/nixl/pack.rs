//! Transfers of many short runs, a slot at a time, as the side that submits sees them.
//!
//! A pull asks the peer to pack, reads its slot into one of ours, and unpacks that; a push packs, writes its slot into one that
//! the peer lent, and asks it to unpack. Each slot goes its way by itself, so that all three copies run at once.
#![forbid(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::help::{Answer, Ask, Asker, Heard};
use super::peer::Pace;
use super::staging::{Copies, Copying, Part, SLOT_RUNS_MAX, Slots, piece_bytes_max};
use crate::ffi::nixl::{NixlError, Progress, Transfer};
use crate::memory::Region;
use crate::transport::flight::Flight;
use crate::transport::{Direction, TransportError};

/// What a peer lent us, and the way to ask it.
pub(super) struct Help {
    asker: Asker,
    free: Vec<u16>,
    pub(super) slot_bytes: u64,
}

impl Help {
    pub(super) fn new(asker: Asker, slots: Vec<u16>, slot_bytes: u64) -> Self {
        Self { asker, free: slots, slot_bytes }
    }

    pub(super) fn ask(&mut self, ask: &Ask) -> io::Result<()> {
        self.asker.ask(ask)
    }

    pub(super) fn hear(&mut self) -> io::Result<Heard<Answer>> {
        self.asker.hear()
    }

    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.asker.flush()
    }
}

/// What packs need of this process.
pub(super) struct Packer {
    pub(super) own: Arc<Slots>,
    copies: Copies,
    regions: Vec<Arc<Region>>,
}

impl Packer {
    pub(super) fn new(own: Arc<Slots>, regions: &[Arc<Region>]) -> Result<Self, String> {
        let gpu = regions.first().and_then(|region| region.device());
        Ok(Self { own, copies: Copies::on(gpu)?, regions: regions.to_vec() })
    }
}

/// Runs that go in one slot.
pub(super) struct Pack {
    pub(super) flight: Arc<Flight>,
    /// Pieces of the flight that it holds, each to be accounted for.
    pieces: usize,
    ours: Vec<Part>,
    theirs: Vec<Part>,
    pub(super) bytes: u64,
    pub(super) own_slot: u16,
    pub(super) lent_slot: u16,
    stage: Stage,
    pace: Pace,
}

enum Stage {
    /// The peer was asked, and has not answered.
    Asked,
    /// The slot is ready to go.
    Ready,
    /// The slot is on its way.
    Moving(Transfer),
    Done,
}

impl Pack {
    /// Claims what fits into a slot of the next of `flight`, and takes a slot on both sides. `None`: nothing is left of it.
    pub(super) fn load(flight: &Arc<Flight>, packer: &mut Packer, help: &mut Help) -> Loaded {
        let Some(own_slot) = packer.own.take() else { return Loaded::NoSlot };
        let Some(lent_slot) = help.free.pop() else {
            packer.own.give(own_slot);
            return Loaded::NoSlot;
        };
        let slot_bytes = packer.own.slot_bytes.min(help.slot_bytes);
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        let (mut bytes, mut runs, mut pieces) = (0, 0, 0);
        while bytes + piece_bytes_max(slot_bytes) <= slot_bytes
            && runs + RUNS_PER_PIECE_MAX <= SLOT_RUNS_MAX
            && let Some(piece) = flight.claim()
        {
            let segment = &flight.runs.segments[piece.segment];
            let sources: Vec<_> = flight.runs.walk(piece).map(|run| (run.src, run.len)).collect();
            let targets = flight.runs.walk(piece).map(|run| (run.dst, run.len)).collect();
            runs += sources.len();
            let from = Part { region: segment.src_region, runs: sources };
            let to = Part { region: segment.dst_region, runs: targets };
            match flight.direction {
                Direction::Pull => (ours.push(to), theirs.push(from)),
                Direction::Push => (ours.push(from), theirs.push(to)),
            };
            bytes += piece.bytes;
            pieces += 1;
        }
        if pieces == 0 {
            packer.own.give(own_slot);
            help.free.push(lent_slot);
            return Loaded::Nothing;
        }
        let (flight, stage, pace) = (flight.clone(), Stage::Ready, Pace::default());
        Loaded::Pack(Self { flight, pieces, ours, theirs, bytes, own_slot, lent_slot, stage, pace })
    }

    /// Sets out: a pull with a question, a push with a copy.
    pub(super) fn begin(&mut self, packer: &mut Packer, help: &mut Help) -> io::Result<()> {
        self.flight.posted(1);
        match self.flight.direction {
            Direction::Pull => self.ask(help),
            Direction::Push => {
                self.copy(packer, Copying::IntoSlot);
                Ok(())
            }
        }
    }

    fn ask(&mut self, help: &mut Help) -> io::Result<()> {
        self.stage = Stage::Asked;
        let (slot, parts) = (self.lent_slot, std::mem::take(&mut self.theirs));
        help.ask(&match self.flight.direction {
            Direction::Pull => Ask::Gather { slot, parts },
            Direction::Push => Ask::Scatter { slot, grant: self.flight.grant, parts },
        })
    }

    fn copy(&mut self, packer: &mut Packer, copying: Copying) {
        let Packer { own, copies, regions } = packer;
        if let Err(error) = copies.copy(copying, regions, &self.ours, (&own.region, own.offset(self.own_slot))) {
            let (peer, reason) = ("this process".to_owned(), error.to_string());
            self.flight.fail(TransportError::Unreachable { path: "nixl", peer, reason });
        }
        self.stage = match copying {
            Copying::IntoSlot if !self.flight.failed() => Stage::Ready,
            Copying::IntoSlot | Copying::OutOfSlot => Stage::Done,
        };
    }

    pub(super) fn is_ready(&self) -> bool {
        matches!(self.stage, Stage::Ready)
    }

    pub(super) fn is_moving(&self) -> bool {
        matches!(self.stage, Stage::Moving(_))
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.stage, Stage::Done)
    }

    pub(super) fn is_asked(&self) -> bool {
        matches!(self.stage, Stage::Asked)
    }

    /// Ends it: its transfer has failed.
    pub(super) fn drop_what_is_left(&mut self) {
        self.stage = Stage::Done;
    }

    pub(super) fn waits_for(&self, slot: u16) -> bool {
        self.lent_slot == slot && matches!(self.stage, Stage::Asked)
    }

    /// Whether it has not moved for too long, over a transfer that has ended otherwise.
    pub(super) fn stands_still(&mut self, now: Instant) -> bool {
        matches!(self.stage, Stage::Asked | Stage::Moving(_)) && self.pace.stands_still(&self.flight, now)
    }

    /// The slot has set out.
    pub(super) fn started(&mut self, transfer: Transfer) {
        self.stage = Stage::Moving(transfer);
    }

    /// Whether what was on its way has come.
    pub(super) fn poll(&mut self) -> Result<Progress, NixlError> {
        match &mut self.stage {
            Stage::Moving(transfer) => transfer.poll(),
            _ => Ok(Progress::Moving),
        }
    }

    /// The slot has arrived: what comes next.
    pub(super) fn arrived(&mut self, packer: &mut Packer, help: &mut Help) -> io::Result<()> {
        let ended = self.flight.failed();
        self.stage = Stage::Done;
        match self.flight.direction {
            _ if ended => Ok(()),
            Direction::Pull => {
                self.copy(packer, Copying::OutOfSlot);
                Ok(())
            }
            Direction::Push => self.ask(help),
        }
    }

    /// The peer has answered.
    pub(super) fn answered(&mut self, answer: &Answer) {
        if let Answer::NotGranted { region, offset, len, .. } = *answer {
            self.flight.fail(TransportError::NotGranted { region, offset, len });
        }
        self.stage = match self.flight.direction {
            Direction::Pull if !self.flight.failed() => Stage::Ready,
            Direction::Pull | Direction::Push => Stage::Done,
        };
    }

    /// Gives the slots back. Nothing may be on its way in them.
    pub(super) fn unload(self, packer: &mut Packer, help: Option<&mut Help>) -> (Arc<Flight>, usize) {
        packer.own.give(self.own_slot);
        if let Some(help) = help {
            help.free.push(self.lent_slot);
        }
        (self.flight, self.pieces)
    }
}

/// What came of loading a slot.
pub(super) enum Loaded {
    Pack(Pack),
    /// The flight has no piece left.
    Nothing,
    /// All slots are in use.
    NoSlot,
}

/// Most runs of a piece that is packed.
pub(super) const RUNS_PER_PIECE_MAX: usize = SLOT_RUNS_MAX / 4;
