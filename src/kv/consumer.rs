//! Decode's driver: does what the receiving machines want done.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::channel::{Mode, Receive, ReceiveAction, ReceiveEvent};
use super::core::{Core, Event, Timer, TimerKey, micros};
use super::messages::{Claim, Granted, Place, ToDecode, ToPrefill};
use super::past::Gone;
use super::run_list::by_group;
use super::{BlockId, End, Extent, LayoutError, TransferFailure};
use crate::config::KvSendType;
use crate::control::{ControlError, TransferId};
use crate::telemetry::{Side, TransferRecord};
use crate::transport::{
    Copied, Direction, Fence, Grant, Link, RunList, TransferRequest, TransferTicket, TransportError,
};

/// How often a dead prefill worker is looked at, while it may still write here.
const FENCE_INTERVAL: Duration = Duration::from_millis(5);

/// One expected transfer, with all that its machine need not know.
pub(super) struct Receiving {
    machine: Receive,
    serial: u64,
    peer: String,
    claim: Claim,
    granted: Option<Granted>,
    blocks: Vec<Vec<BlockId>>,
    first_token: u32,
    /// What carries it, kept also after the peer was lost: it knows whether the peer's process is gone.
    link: Option<Arc<dyn Link>>,
    ticket: Option<TransferTicket>,
    /// Whether it counts as one of the peer's running copies.
    has_slot: bool,
    /// Push: prefill's permission to write.
    grant: Option<Grant>,
    timer: Option<TimerKey>,
    fence_timer: Option<TimerKey>,
    fetched: Option<Instant>,
    copy_started: Option<Instant>,
    copied: Option<Instant>,
    record: TransferRecord,
}

impl Receiving {
    pub(super) fn holds_lease(&self) -> bool {
        self.machine.holds_lease()
    }
}

impl Core {
    pub(super) fn expect(&mut self, peer: &str, claim: Claim) {
        let (now, transfer_id) = (Instant::now(), claim.transfer_id);
        let mut record = self.blank_record(transfer_id, Side::Decode);
        record.tokens = claim.tokens.into();
        let receiving = Receiving {
            machine: Receive::new(transfer_id, peer, self.kv.transfer_timeout, now),
            serial: self.next_serial(),
            peer: peer.to_owned(),
            claim: claim.clone(),
            granted: None,
            blocks: Vec::new(),
            first_token: 0,
            link: None,
            ticket: None,
            has_slot: false,
            grant: None,
            timer: None,
            fence_timer: None,
            fetched: None,
            copy_started: None,
            copied: None,
            record,
        };
        self.receiving.insert(transfer_id, receiving);
        if self.past.of(transfer_id) == Some(Gone::AbortedEarly) {
            // KV-9: the abort was faster. Prefill may hold blocks for it all the same.
            self.need_peer(peer);
            return self.drive_receiving(transfer_id, ReceiveEvent::Abort);
        }
        self.leave_older_incarnation(peer, claim.incarnation);
        self.need_peer(peer).transfers.insert(transfer_id);
        self.tell_peer(peer, &ToPrefill::Claim(claim));
        self.plan_renewal(peer);
        self.drive_receiving(transfer_id, ReceiveEvent::Tick);
    }

    /// Parameters of a later incarnation prove that the one we are connected to has ended, though we have not heard of it
    /// yet (KV-8). Parameters of an earlier one prove nothing, and are refused by the peer.
    fn leave_older_incarnation(&mut self, peer: &str, named: u64) {
        let current = self.peers.get(peer).and_then(|entry| entry.reached()).map(|reached| reached.incarnation);
        if current.is_some_and(|current| current < named) {
            let why = "the worker has restarted".to_owned();
            self.peer_down(peer, &ControlError::Closed { peer: peer.to_owned(), why });
        }
    }

    pub(super) fn fetch(&mut self, transfer_id: TransferId, blocks: Vec<Vec<BlockId>>, first_token: u32) {
        let digest = self.wants_digest();
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        receiving.record.blocks = blocks.iter().map(|group| group.len() as u64).sum();
        receiving.record.digest_checked = digest;
        receiving.blocks = blocks;
        receiving.first_token = first_token;
        receiving.fetched = Some(Instant::now());
        self.drive_receiving(transfer_id, ReceiveEvent::Fetch { digest });
    }

    pub(super) fn release(&mut self, transfer_id: TransferId) {
        self.drive_receiving(transfer_id, ReceiveEvent::Release);
    }

    /// What a prefill worker says.
    pub(super) fn hear_peer(&mut self, peer: &str, message: ToDecode) {
        let transfer_id = message.transfer_id();
        if self.receiving.get(&transfer_id).is_none_or(|receiving| receiving.peer != peer) {
            // Late: the transfer was ended here, and prefill told, before this was on its way.
            return;
        }
        let event = match message {
            ToDecode::Granted(granted) => return self.granted(peer, granted),
            ToDecode::Refused { failure, .. } => ReceiveEvent::Refused(failure),
            ToDecode::Confirmed { digest, .. } => ReceiveEvent::Confirmed { digest },
            ToDecode::Pushed { digest, .. } => {
                if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
                    receiving.copied = Some(Instant::now());
                }
                ReceiveEvent::Pushed { digest }
            }
            ToDecode::Over { how, fenced, .. } => ReceiveEvent::Over { how, fenced },
            ToDecode::Ended { how, .. } => ReceiveEvent::PeerEnded(how),
        };
        self.drive_receiving(transfer_id, event);
    }

    fn granted(&mut self, peer: &str, granted: Granted) {
        let transfer_id = granted.transfer_id;
        let ours = self.weight_version();
        let Some(reached) = self.peers.get(peer).and_then(|entry| entry.reached()) else { return };
        let mode = if reached.send_type == KvSendType::Get { Mode::Pull } else { Mode::Push };
        let (engine_id, link, path) = (reached.engine_id.clone(), Arc::clone(&reached.link), reached.path);
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        receiving.record.peer_engine_id = Some(engine_id);
        receiving.record.path = Some(path);
        receiving.record.weight_version = granted.weight_version;
        receiving.link = Some(link);
        let theirs = granted.weight_version;
        let tokens_differ = granted.tokens != receiving.claim.tokens;
        receiving.granted = Some(granted);
        let event = if theirs != ours {
            ReceiveEvent::Outdated(TransferFailure::WeightVersion { peer: peer.to_owned(), theirs, ours })
        } else if tokens_differ {
            let why = "another number of tokens was granted than asked for".to_owned();
            ReceiveEvent::Outdated(TransferFailure::BadReference { peer: peer.to_owned(), transfer_id, why })
        } else {
            ReceiveEvent::Granted(mode)
        };
        self.drive_receiving(transfer_id, event);
    }

    pub(super) fn abort_receiving(&mut self, transfer_id: TransferId) -> bool {
        let known = self.receiving.contains_key(&transfer_id);
        self.drive_receiving(transfer_id, ReceiveEvent::Abort);
        known
    }

    pub(super) fn receiving_peer_lost(&mut self, transfer_id: TransferId, failure: TransferFailure) {
        if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
            // The peer's entry is gone, and with it its count of running copies.
            receiving.has_slot = false;
        }
        self.drive_receiving(transfer_id, ReceiveEvent::PeerLost(failure));
    }

    pub(super) fn tick_receiving(&mut self, transfer_id: TransferId, now: Instant) {
        if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
            receiving.timer = None;
            self.drive_receiving_at(transfer_id, ReceiveEvent::Tick, now);
        }
    }

    pub(super) fn stop_receiving(&mut self) {
        for transfer_id in self.receiving.keys().copied().collect::<Vec<_>>() {
            self.drive_receiving(transfer_id, ReceiveEvent::ShutDown);
        }
    }

    /// KV-5: KV of other weights is of no use any more, wherever it is on its way.
    pub(super) fn outdate_receiving(&mut self, ours: u64) {
        let outdated = self.receiving.iter().filter(|(_, receiving)| receiving.claim.weight_version != ours);
        for transfer_id in outdated.map(|(id, _)| *id).collect::<Vec<_>>() {
            let Some(receiving) = self.receiving.get(&transfer_id) else { continue };
            let (peer, theirs) = (receiving.peer.clone(), receiving.claim.weight_version);
            let failure = TransferFailure::WeightVersion { peer, theirs, ours };
            self.drive_receiving(transfer_id, ReceiveEvent::Outdated(failure));
        }
    }

    pub(super) fn receiving_digested(&mut self, transfer_id: TransferId, serial: u64, digest: u64) {
        if self.receiving.get(&transfer_id).is_some_and(|receiving| receiving.serial == serial) {
            self.drive_receiving(transfer_id, ReceiveEvent::DigestReady(digest));
        }
    }

    pub(super) fn fenced(&mut self, transfer_id: TransferId, serial: u64, fenced: bool) {
        if self.receiving.get(&transfer_id).is_some_and(|receiving| receiving.serial == serial) {
            self.drive_receiving(transfer_id, ReceiveEvent::Fenced(fenced));
        }
    }

    pub(super) fn pull_done(&mut self, transfer_id: TransferId, serial: u64, result: Result<Copied, TransportError>) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id).filter(|receiving| receiving.serial == serial)
        else {
            return;
        };
        receiving.ticket = None;
        receiving.copied = Some(Instant::now());
        let result = match result {
            Ok(copied) => {
                receiving.record.bytes = copied.bytes;
                receiving.record.posts = copied.posts;
                receiving.copy_started = Some(copied.started);
                receiving.copied = Some(copied.finished);
                Ok(())
            }
            Err(error) => Err(copy_failure(receiving, &error)),
        };
        self.free_slot(transfer_id);
        self.drive_receiving(transfer_id, ReceiveEvent::CopyDone(result));
    }

    fn drive_receiving(&mut self, transfer_id: TransferId, event: ReceiveEvent) {
        self.drive_receiving_at(transfer_id, event, Instant::now());
    }

    fn drive_receiving_at(&mut self, transfer_id: TransferId, event: ReceiveEvent, now: Instant) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let actions = match receiving.machine.on(event, now) {
            Ok(actions) => actions,
            Err(error) => return tracing::warn!(%transfer_id, %error, "ignored"),
        };
        for action in actions {
            self.do_receiving(transfer_id, action);
        }
        if let Some(receiving) = self.receiving.get(&transfer_id) {
            let (old, at) = (receiving.timer, receiving.machine.deadline());
            let timer = self.set_timer(old, at, Timer::Transfer(Side::Decode, transfer_id));
            if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
                receiving.timer = timer;
            }
        }
    }

    fn do_receiving(&mut self, transfer_id: TransferId, action: ReceiveAction) {
        let Some(receiving) = self.receiving.get(&transfer_id) else { return };
        let (peer, serial, first_token) = (receiving.peer.clone(), receiving.serial, receiving.first_token);
        match action {
            ReceiveAction::StartCopy { digest } => {
                if digest {
                    self.tell_peer(&peer, &ToPrefill::Copying { transfer_id, first_token });
                }
                self.take_slot(transfer_id);
            }
            ReceiveAction::CancelCopy => self.cancel_pull(transfer_id),
            ReceiveAction::StartDigest => {
                let (blocks, tokens) = (receiving.blocks.clone(), receiving.claim.tokens);
                self.start_digest(Side::Decode, transfer_id, serial, blocks, first_token, tokens);
            }
            ReceiveAction::TellLanded { digest } => {
                self.tell_peer(&peer, &ToPrefill::Landed { transfer_id, first_token, digest });
            }
            ReceiveAction::TellPlace { .. } => self.take_slot(transfer_id),
            ReceiveAction::TellAccepted => self.tell_peer(&peer, &ToPrefill::Accepted(transfer_id)),
            ReceiveAction::TellEnded(how) => self.tell_peer(&peer, &ToPrefill::Ended { transfer_id, how }),
            ReceiveAction::Fence => self.fence(transfer_id),
            ReceiveAction::Report(end) => self.end_receiving(transfer_id, end),
        }
    }

    /// Starts the copy, or queues it: no more than `kv.inflight_max` run to one peer.
    fn take_slot(&mut self, transfer_id: TransferId) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let Some(peer) = self.peers.get_mut(&receiving.peer) else { return };
        if peer.copying >= self.kv.inflight_max {
            return peer.waiting.push_back(transfer_id);
        }
        peer.copying += 1;
        receiving.has_slot = true;
        self.start_copy(transfer_id);
    }

    fn free_slot(&mut self, transfer_id: TransferId) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        if !std::mem::take(&mut receiving.has_slot) {
            return;
        }
        let name = receiving.peer.clone();
        if let Some(peer) = self.peers.get_mut(&name) {
            peer.copying -= 1;
        }
        self.start_waiting(&name);
    }

    fn start_waiting(&mut self, name: &str) {
        // Bounded: each turn takes one from the queue, and those that ended meanwhile are passed over.
        while let Some(peer) = self.peers.get_mut(name).filter(|peer| peer.copying < self.kv.inflight_max) {
            let Some(next) = peer.waiting.pop_front() else { return };
            let waits = |receiving: &Receiving| {
                !receiving.has_slot && matches!(receiving.machine.state(), "copying" | "placed")
            };
            if self.receiving.get(&next).is_some_and(waits) {
                self.take_slot(next);
            }
        }
    }

    fn start_copy(&mut self, transfer_id: TransferId) {
        let runs = match self.runs(transfer_id) {
            Ok(runs) => runs,
            Err(failure) => return self.copy_impossible(transfer_id, failure),
        };
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let Some(link) = receiving.link.clone() else { return };
        receiving.copy_started = Some(Instant::now());
        receiving.record.runs = runs.runs() as u64;
        if receiving.machine.state() == "placed" {
            return self.place(transfer_id, &runs);
        }
        let (serial, events) = (receiving.serial, self.events.clone());
        let deadline = Instant::now() + self.kv.transfer_timeout;
        let request = TransferRequest { direction: Direction::Pull, runs, grant: None, deadline };
        let done = move |result| {
            let _ = events.send(Event::Copied { side: Side::Decode, transfer_id, serial, result });
        };
        receiving.ticket = Some(link.submit(request, Box::new(done)));
    }

    fn runs(&self, transfer_id: TransferId) -> Result<RunList, TransferFailure> {
        let lost = |peer: &str| TransferFailure::PeerLost { peer: peer.to_owned(), why: "it is gone".to_owned() };
        let Some(receiving) = self.receiving.get(&transfer_id) else { return Err(lost("prefill")) };
        let reached = self.peers.get(&receiving.peer).and_then(|peer| peer.reached());
        let (Some(reached), Some(granted)) = (reached, &receiving.granted) else { return Err(lost(&receiving.peer)) };
        let extent = Extent {
            src_blocks: &by_group(&granted.blocks),
            dst_blocks: &by_group(&receiving.blocks),
            first_token: receiving.first_token,
            tokens: granted.tokens,
        };
        let bad = |error: LayoutError| TransferFailure::BadReference {
            peer: receiving.peer.clone(),
            transfer_id,
            why: error.to_string(),
        };
        reached.plan.runs(extent).map_err(bad)
    }

    /// Push: permits prefill to write into exactly the ranges of `runs`, and tells it where.
    fn place(&mut self, transfer_id: TransferId, runs: &RunList) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let Some(reached) = self.peers.get(&receiving.peer).and_then(|peer| peer.reached()) else { return };
        receiving.record.bytes = runs.bytes();
        receiving.record.posts = runs.segments.len() as u64;
        let grant = match self.transports[reached.transport].grant(runs) {
            Ok(grant) => grant,
            Err(error) => {
                let failure = copy_failure(receiving, &error);
                return self.copy_impossible(transfer_id, failure);
            }
        };
        let place = Place {
            transfer_id,
            blocks: receiving.blocks.clone(),
            first_token: receiving.first_token,
            path: reached.path,
            grant: grant.token(),
            digest: receiving.record.digest_checked,
        };
        receiving.grant = Some(grant);
        let peer = receiving.peer.clone();
        self.tell_peer(&peer, &ToPrefill::Place(place));
    }

    /// A copy that never began: nothing of it can land.
    fn copy_impossible(&mut self, transfer_id: TransferId, failure: TransferFailure) {
        let Some(receiving) = self.receiving.get(&transfer_id) else { return };
        if receiving.machine.state() == "placed" {
            // Prefill was not told where to write: told to end, it has nothing to stop.
            let peer = receiving.peer.clone();
            let how = super::messages::Ending::Failed(failure.clone());
            self.tell_peer(&peer, &ToPrefill::Ended { transfer_id, how: how.clone() });
            return self.drive_receiving(transfer_id, ReceiveEvent::Over { how, fenced: true });
        }
        self.drive_receiving(transfer_id, ReceiveEvent::CopyDone(Err(failure)));
    }

    fn cancel_pull(&mut self, transfer_id: TransferId) {
        let Some(receiving) = self.receiving.get(&transfer_id) else { return };
        match (&receiving.link, receiving.ticket) {
            (Some(link), Some(ticket)) => link.cancel(ticket),
            // Still in the queue: nothing was written.
            _ => self.drive_receiving(transfer_id, ReceiveEvent::CopyDone(Ok(()))),
        }
    }

    /// Push: takes prefill's permission back. Where the path cannot hold prefill back, its word that it stopped is
    /// waited for, or the end of its process (KV-7).
    fn fence(&mut self, transfer_id: TransferId) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let serial = receiving.serial;
        // Without a grant prefill was never told where to write.
        let fence = receiving.grant.take().map_or(Fence::Fenced, Grant::revoke);
        match fence {
            Fence::Fenced => {
                let _ = self.events.send(Event::Fenced { transfer_id, serial, fenced: true });
            }
            Fence::AskPeer => self.look_for_fence(transfer_id, Instant::now()),
        }
    }

    pub(super) fn look_for_fence(&mut self, transfer_id: TransferId, now: Instant) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        receiving.fence_timer = None;
        if receiving.link.as_ref().is_none_or(|link| link.peer_gone()) {
            return self.drive_receiving(transfer_id, ReceiveEvent::Fenced(true));
        }
        let timer = self.set_timer(None, Some(now + FENCE_INTERVAL), Timer::Fence(transfer_id));
        if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
            receiving.fence_timer = timer;
        }
    }

    fn end_receiving(&mut self, transfer_id: TransferId, end: End) {
        self.free_slot(transfer_id);
        let Some(mut receiving) = self.receiving.remove(&transfer_id) else { return };
        self.set_timer(receiving.timer, None, Timer::Transfer(Side::Decode, transfer_id));
        self.set_timer(receiving.fence_timer, None, Timer::Fence(transfer_id));
        if let Some(peer) = self.peers.get_mut(&receiving.peer) {
            peer.transfers.remove(&transfer_id);
        }
        if let Some(link) = receiving.link.take() {
            self.let_go(link);
        }
        let record = &mut receiving.record;
        record.wait_us = micros(receiving.fetched, receiving.copy_started);
        record.copy_us = micros(receiving.copy_started, receiving.copied);
        record.validate_us = micros(receiving.copied, Some(Instant::now()));
        if end == End::Released {
            record.path = None;
        }
        self.report(transfer_id, end, 0, receiving.record);
    }

    /// What is left when waiting has come to its bound: said to be unfenced, since nobody knows.
    pub(super) fn give_up_receiving(&mut self) {
        for transfer_id in self.receiving.keys().copied().collect::<Vec<_>>() {
            self.drive_receiving(transfer_id, ReceiveEvent::Fenced(false));
        }
    }
}

fn copy_failure(receiving: &Receiving, error: &TransportError) -> TransferFailure {
    let path = receiving.record.path.map_or("no path", |path| path.name()).to_owned();
    TransferFailure::Copy { peer: receiving.peer.clone(), path, why: error.to_string() }
}
