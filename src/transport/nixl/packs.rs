//! What goes packed to and from one peer.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use super::help::{Answer, Ask, Heard};
use super::pack::{Help, Loaded, Pack, Packer};
use super::peer::Ours;
use super::{HelpDescription, RegionDescription};
use crate::ffi::nixl::{self, MemoryType, Progress, Remote, Span};
use crate::transport::Direction;
use crate::transport::flight::Flight;

/// Flights with how many of their pieces are to be accounted for.
pub(super) type Given = Vec<(Arc<Flight>, usize)>;

/// The peer's flights that go packed, and the slots that are under way.
#[derive(Default)]
pub(super) struct Packs {
    help: Option<Help>,
    lent: Option<RegionDescription>,
    waiting: VecDeque<Arc<Flight>>,
    under_way: Vec<Pack>,
    /// Something may still be on its way into a slot that the peer lent.
    unclear: bool,
}

/// What a round needs of everybody else.
pub(super) struct Around<'a> {
    pub(super) packer: &'a mut Packer,
    pub(super) remote: Option<&'a Rc<Remote>>,
    pub(super) ours: &'a Ours,
    pub(super) memory: MemoryType,
}

impl Packs {
    /// Packs with the help that the peer has promised.
    pub(super) fn with(help: Help, description: &HelpDescription) -> Self {
        let mut packs = Self::default();
        (packs.help, packs.lent) = (Some(help), Some(description.lent));
        packs
    }

    pub(super) fn push(&mut self, flight: Arc<Flight>) {
        self.waiting.push_back(flight);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.under_way.is_empty()
    }

    /// Whether something is under way that the peer or NIXL could hold up for ever.
    pub(super) fn may_hang(&self) -> bool {
        !self.under_way.is_empty()
    }

    /// Whether NIXL has something of it.
    pub(super) fn is_moving(&self) -> bool {
        self.under_way.iter().any(Pack::is_moving)
    }

    /// The flights under way, and those that wait, which do so no longer.
    pub(super) fn flights(&mut self) -> Vec<Arc<Flight>> {
        self.under_way.iter().map(|pack| pack.flight.clone()).chain(self.waiting.drain(..)).collect()
    }

    /// Sends what is ready and loads what waits. Says whether anything happened.
    pub(super) fn post(&mut self, around: &mut Around<'_>, now: Instant) -> Result<bool, String> {
        let Some(help) = &mut self.help else { return Ok(false) };
        let text = |error: std::io::Error| format!("its socket for packing: {error}");
        help.flush().map_err(text)?;
        let mut happened = false;
        for pack in self.under_way.iter_mut().filter(|pack| pack.is_ready()) {
            happened = true;
            if pack.flight.fail_if_late(now) || pack.flight.failed() {
                pack.drop_what_is_left();
                continue;
            }
            let (Some(remote), Some(lent)) = (around.remote, self.lent) else { continue };
            let pair = spans(around, lent, help.slot_bytes, pack);
            let direction = match pack.flight.direction {
                Direction::Pull => nixl::Direction::Read,
                Direction::Push => nixl::Direction::Write,
            };
            match remote.start(direction, around.ours.memory, around.memory, &[pair]) {
                Ok((transfer, Progress::Moving)) => pack.started(transfer),
                Ok((transfer, Progress::Done)) => {
                    drop(transfer);
                    pack.arrived(around.packer, help).map_err(text)?;
                }
                Err(error) => {
                    pack.drop_what_is_left();
                    self.unclear = true;
                    return Err(error.to_string());
                }
            }
        }
        while let Some(flight) = self.waiting.front() {
            if flight.fail_if_late(now) {
                self.waiting.pop_front();
                continue;
            }
            match Pack::load(flight, around.packer, help) {
                Loaded::NoSlot => break,
                Loaded::Nothing => drop(self.waiting.pop_front()),
                Loaded::Pack(mut pack) => {
                    happened = true;
                    // In turns, so that a small transfer never waits for a long one to end.
                    if self.waiting.len() > 1 {
                        self.waiting.rotate_left(1);
                    }
                    let begun = pack.begin(around.packer, help);
                    self.under_way.push(pack);
                    begun.map_err(text)?;
                }
            }
        }
        self.sweep(around.packer);
        Ok(happened)
    }

    /// Looks at what NIXL and the peer have. Says whether anything happened or went wrong, and what is given up with that.
    pub(super) fn poll(&mut self, packer: &mut Packer, now: Instant) -> (Result<bool, String>, Given) {
        let heard = if self.under_way.iter().any(Pack::is_asked) { self.hear() } else { Ok(false) };
        match heard {
            Ok(heard) => (self.look(packer, now).map(|moved| moved || heard), Given::new()),
            Err(reason) => (Err(reason), self.lost(packer)),
        }
    }

    /// Takes in what the peer has answered.
    fn hear(&mut self) -> Result<bool, String> {
        let mut heard = false;
        while let Some(help) = &mut self.help {
            match help.hear().map_err(|error| format!("its answer about packed runs: {error}"))? {
                Heard::Nothing => break,
                Heard::End => return Err("it packs no more".to_owned()),
                Heard::Message(answer) => self.answered(&answer)?,
            }
            heard = true;
        }
        Ok(heard)
    }

    fn look(&mut self, packer: &mut Packer, now: Instant) -> Result<bool, String> {
        let mut happened = false;
        for pack in &mut self.under_way {
            if pack.stands_still(now) {
                return Err("it does not answer".to_owned());
            }
            match pack.poll() {
                Ok(Progress::Moving) => {}
                Ok(Progress::Done) => {
                    happened = true;
                    match &mut self.help {
                        Some(help) => {
                            pack.arrived(packer, help).map_err(|error| error.to_string())?;
                        }
                        None => pack.drop_what_is_left(),
                    }
                }
                Err(error) => {
                    pack.drop_what_is_left();
                    self.unclear = true;
                    return Err(error.to_string());
                }
            }
        }
        self.sweep(packer);
        Ok(happened)
    }

    fn answered(&mut self, answer: &Answer) -> Result<(), String> {
        let (Answer::Done { slot } | Answer::NotGranted { slot, .. }) = *answer else {
            return Err("it lent slots twice".to_owned());
        };
        let pack = self.under_way.iter_mut().find(|pack| pack.waits_for(slot));
        pack.ok_or_else(|| format!("it answered about slot {slot}, which it was not asked about"))?.answered(answer);
        Ok(())
    }

    /// Accounts for what is done and gives its slots back.
    fn sweep(&mut self, packer: &mut Packer) {
        let mut index = 0;
        while let Some(pack) = self.under_way.get(index) {
            if !pack.is_done() {
                index += 1;
                continue;
            }
            let (flight, pieces) = self.under_way.swap_remove(index).unload(packer, self.help.as_mut());
            (0..pieces).for_each(|_| flight.account(Ok(())));
        }
    }

    /// Gives up what is under way. For the caller to account for.
    pub(super) fn abandon(&mut self, packer: &mut Packer) -> Given {
        self.unclear |= self.may_hang();
        self.under_way.drain(..).map(|pack| pack.unload(packer, None)).collect()
    }

    /// The peer helps no more: gives up what it was asked.
    fn lost(&mut self, packer: &mut Packer) -> Given {
        self.help = None;
        let (asked, rest) = std::mem::take(&mut self.under_way).into_iter().partition(Pack::is_asked);
        self.under_way = rest;
        let asked: Vec<Pack> = asked;
        asked.into_iter().map(|pack| pack.unload(packer, None)).collect()
    }
}

impl Drop for Packs {
    fn drop(&mut self) {
        if let Some(help) = self.help.as_mut().filter(|_| !self.unclear && self.under_way.is_empty()) {
            // If it does not arrive, the slots rest a while before another peer gets them.
            let _ = help.ask(&Ask::Bye);
        }
    }
}

/// Where a slot's bytes are here and there.
fn spans(around: &Around<'_>, lent: RegionDescription, lent_slot_bytes: u64, pack: &Pack) -> (Span, Span) {
    let own = &around.packer.own;
    let here = own.region.address() + own.offset(pack.own_slot);
    let there = lent.address.wrapping_add(u64::from(pack.lent_slot) * lent_slot_bytes);
    (
        Span { address: here, len: pack.bytes, device: around.ours.device },
        Span { address: there, len: pack.bytes, device: lent.device },
    )
}
