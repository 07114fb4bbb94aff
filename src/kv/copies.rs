//! Decode's copies: queued, started or permitted, cancelled, fenced, digested.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::TransferFailure;
use super::channel::ReceiveEvent;
use super::consumer::Receiving;
use super::core::{Core, Event, Timer};
use super::digesting::Work;
use super::messages::{Ending, Place, ToPrefill};
use crate::control::TransferId;
use crate::telemetry::Side;
use crate::transport::{Copied, Direction, Fence, Grant, RunList, TransferRequest, TransportError};

/// How often a dead prefill worker is looked at, while it may still write here.
const FENCE_INTERVAL: Duration = Duration::from_millis(5);

impl Core {
    /// Works out what moves, says so if prefill is to digest it meanwhile, and starts the copy when its turn comes.
    pub(super) fn begin_copy(&mut self, transfer_id: TransferId, part: usize) {
        let from = match self.first_tokens(transfer_id, part) {
            Ok(from) => from,
            Err(failure) => return self.copy_impossible(transfer_id, part, failure),
        };
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let of_part = &mut receiving.parts[part];
        of_part.from.clone_from(&from);
        if receiving.digest && receiving.machine.state(part) == "copying" {
            let peer = of_part.peer.clone();
            self.tell_peer(&peer, &ToPrefill::Copying { transfer_id, from });
        }
        self.take_slot(transfer_id, part);
    }

    /// Starts the copy, or queues it: no more than `kv.inflight_max` run to one peer.
    fn take_slot(&mut self, transfer_id: TransferId, part: usize) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let of_part = &mut receiving.parts[part];
        if of_part.granted.is_none() {
            // Still being computed: prefill's own speed bounds how many of these move, and their turn must not be held up by
            // what waits for it.
            return self.start_copy(transfer_id, part);
        }
        let Some(peer) = self.peers.get_mut(&of_part.peer) else { return };
        if peer.copying >= self.kv.inflight_max {
            return peer.waiting.push_back((transfer_id, part));
        }
        peer.copying += 1;
        of_part.has_slot = true;
        self.start_copy(transfer_id, part);
    }

    fn free_slot(&mut self, transfer_id: TransferId, part: usize) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let of_part = &mut receiving.parts[part];
        if std::mem::take(&mut of_part.has_slot) {
            let peer = of_part.peer.clone();
            self.free_slot_at(&peer);
        }
    }

    pub(super) fn free_slot_at(&mut self, name: &str) {
        if let Some(peer) = self.peers.get_mut(name) {
            peer.copying -= 1;
        }
        // Bounded: each turn takes one from the queue, and those that ended meanwhile are passed over.
        while let Some(peer) = self.peers.get_mut(name).filter(|peer| peer.copying < self.kv.inflight_max) {
            let Some((next, part)) = peer.waiting.pop_front() else { return };
            let waits = |receiving: &Receiving| {
                receiving.parts.get(part).is_some_and(|part| !part.has_slot && part.peer == name)
                    && matches!(receiving.machine.state(part), "copying" | "placed")
            };
            if self.receiving.get(&next).is_some_and(waits) {
                self.take_slot(next, part);
            }
        }
    }

    fn start_copy(&mut self, transfer_id: TransferId, part: usize) {
        let runs = match self.with_extent(transfer_id, part, |plan, extent| plan.runs(extent)) {
            Ok(runs) => runs,
            Err(failure) => return self.copy_impossible(transfer_id, part, failure),
        };
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let is_placed = receiving.machine.state(part) == "placed";
        let (serial, of_part) = (receiving.serial, &mut receiving.parts[part]);
        let Some(link) = of_part.link.clone() else { return };
        of_part.moved.started = Some(Instant::now());
        of_part.moved.runs = runs.runs() as u64;
        if is_placed {
            return self.place(transfer_id, part, &runs);
        }
        let events = self.events.clone();
        let deadline = Instant::now() + self.kv.transfer_timeout;
        let request = TransferRequest { direction: Direction::Pull, runs, grant: None, deadline };
        let done = move |result| {
            let _ = events.send(Event::Copied { side: Side::Decode, transfer_id, part, serial, result });
        };
        of_part.ticket = Some(link.submit(request, Box::new(done)));
    }

    pub(super) fn pull_done(
        &mut self,
        transfer_id: TransferId,
        serial: u64,
        part: usize,
        result: Result<Copied, TransportError>,
    ) {
        let Some(receiving) = self.receiving_of(transfer_id, serial) else { return };
        let of_part = &mut receiving.parts[part];
        of_part.ticket = None;
        of_part.moved.finished = Some(Instant::now());
        let result = match result {
            Ok(copied) => {
                of_part.moved.note(&copied);
                Ok(())
            }
            Err(error) => Err(of_part.copy_failure(&error)),
        };
        self.free_slot(transfer_id, part);
        self.drive_receiving(transfer_id, part, ReceiveEvent::CopyDone(result));
    }

    /// Push: permits prefill to write into exactly the ranges of `runs`, and tells it where.
    fn place(&mut self, transfer_id: TransferId, part: usize, runs: &RunList) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let of_part = &mut receiving.parts[part];
        let Some(path) = of_part.path else { return };
        of_part.moved.bytes = runs.bytes();
        of_part.moved.posts = runs.segments.len() as u64;
        let grant = match self.transports[of_part.transport].grant(runs) {
            Ok(grant) => grant,
            Err(error) => {
                let failure = of_part.copy_failure(&error);
                return self.copy_impossible(transfer_id, part, failure);
            }
        };
        let place = Place {
            transfer_id,
            blocks: receiving.blocks.clone(),
            first_token: receiving.first_token,
            from: of_part.from.clone(),
            path,
            grant: grant.token(),
            digest: receiving.digest,
        };
        of_part.grant = Some(grant);
        let peer = of_part.peer.clone();
        self.tell_peer(&peer, &ToPrefill::Place(place));
    }

    /// A copy that never began: nothing of it can land.
    fn copy_impossible(&mut self, transfer_id: TransferId, part: usize, failure: TransferFailure) {
        let Some(receiving) = self.receiving.get(&transfer_id) else { return };
        if receiving.machine.state(part) == "placed" {
            // Prefill was not told where to write: told to end, it has nothing to stop.
            let peer = receiving.parts[part].peer.clone();
            let how = Ending::Failed(failure.clone());
            self.tell_peer(&peer, &ToPrefill::Ended { transfer_id, how: how.clone() });
            return self.drive_receiving(transfer_id, part, ReceiveEvent::Over { how, fenced: true });
        }
        self.drive_receiving(transfer_id, part, ReceiveEvent::CopyDone(Err(failure)));
    }

    pub(super) fn cancel_pull(&mut self, transfer_id: TransferId, part: usize) {
        let Some(receiving) = self.receiving.get(&transfer_id) else { return };
        match (&receiving.parts[part].link, receiving.parts[part].ticket) {
            (Some(link), Some(ticket)) => link.cancel(ticket),
            // Still in the queue: nothing was written.
            _ => self.drive_receiving(transfer_id, part, ReceiveEvent::CopyDone(Ok(()))),
        }
    }

    /// Push: takes prefill's permission back. Where the path cannot hold prefill back, its word that it stopped is
    /// waited for, or the end of its process (KV-7).
    pub(super) fn fence(&mut self, transfer_id: TransferId, part: usize) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let serial = receiving.serial;
        // Without a grant prefill was never told where to write.
        let fence = receiving.parts[part].grant.take().map_or(Fence::Fenced, Grant::revoke);
        match fence {
            Fence::Fenced => {
                let _ = self.events.send(Event::Fenced { transfer_id, part, serial, fenced: true });
            }
            Fence::AskPeer => self.look_for_fence(transfer_id, part, Instant::now()),
        }
    }

    pub(super) fn fenced(&mut self, transfer_id: TransferId, serial: u64, part: usize, fenced: bool) {
        if self.receiving_of(transfer_id, serial).is_some() {
            self.drive_receiving(transfer_id, part, ReceiveEvent::Fenced(fenced));
        }
    }

    pub(super) fn look_for_fence(&mut self, transfer_id: TransferId, part: usize, now: Instant) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let of_part = &mut receiving.parts[part];
        of_part.fence_timer = None;
        if of_part.link.as_ref().is_none_or(|link| link.peer_gone()) {
            return self.drive_receiving(transfer_id, part, ReceiveEvent::Fenced(true));
        }
        let timer = self.set_timer(None, Some(now + FENCE_INTERVAL), Timer::Fence(transfer_id, part));
        if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
            receiving.parts[part].fence_timer = timer;
        }
    }

    pub(super) fn digest_received(&mut self, transfer_id: TransferId, part: usize) {
        let Some(receiving) = self.receiving.get(&transfer_id) else { return };
        let of_part = &receiving.parts[part];
        let Some(plan) = &of_part.plan else { return };
        self.start_digest(Work {
            side: Side::Decode,
            transfer_id,
            part,
            serial: receiving.serial,
            blocks: receiving.blocks.clone(),
            from: of_part.from.clone(),
            tokens: receiving.tokens,
            scope: Arc::clone(&plan.taken),
        });
    }
}
