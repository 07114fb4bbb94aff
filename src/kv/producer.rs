//! Prefill's driver: does what the sending machines want done. Holds no rule of its own but which claims fit which offer.

use std::sync::Arc;
use std::time::Instant;

use super::channel::{Send, SendAction, SendEvent};
use super::clients::PushPath;
use super::core::{Core, Event, Timer, TimerKey, micros};
use super::digest::{Span, digest};
use super::messages::{Claim, Ending, Granted, Place, ToDecode, ToPrefill};
use super::past::Gone;
use super::run_list::by_group;
use super::{BlockId, Extent, Offer, TransferFailure};
use crate::control::TransferId;
use crate::telemetry::{Side, TransferRecord};
use crate::transport::{Copied, Direction, Link, TransferRequest, TransferTicket, TransportError};

/// KV of at most this many bytes is digested on the runtime's own thread: waking another would take longer.
const DIGEST_HERE_BYTES_MAX: u64 = 256 * 1024;

/// One offered transfer, with all that its machine need not know.
pub(super) struct Sending {
    machine: Send,
    serial: u64,
    offer: Offer,
    weight_version: u64,
    /// The decode worker that has claimed it.
    client: Option<u64>,
    place: Option<Place>,
    push: Option<(Arc<dyn Link>, TransferTicket)>,
    /// First token that a digest covers.
    first_token: u32,
    timer: Option<TimerKey>,
    offered: Instant,
    claimed: Option<Instant>,
    copy_started: Option<Instant>,
    landed: Option<Instant>,
    record: TransferRecord,
}

impl Core {
    pub(super) fn offer(&mut self, offer: Offer, weight_version: u64) {
        let (now, transfer_id) = (Instant::now(), offer.transfer_id);
        let mut record = self.blank_record(transfer_id, Side::Prefill);
        record.blocks = offer.blocks.iter().map(|group| group.len() as u64).sum();
        record.tokens = offer.tokens.into();
        record.weight_version = weight_version;
        let sending = Sending {
            machine: Send::new(transfer_id, self.kv.lease, now),
            serial: self.next_serial(),
            offer,
            weight_version,
            client: None,
            place: None,
            push: None,
            first_token: 0,
            timer: None,
            offered: now,
            claimed: None,
            copy_started: None,
            landed: None,
            record,
        };
        self.sending.insert(transfer_id, sending);
        if self.past.of(transfer_id) == Some(Gone::AbortedEarly) {
            // KV-9: the abort was faster than the offer.
            self.drive_sending(transfer_id, SendEvent::Abort);
        } else if weight_version != self.weight_version() {
            self.outdate(transfer_id, self.weight_version());
        } else {
            self.drive_sending(transfer_id, SendEvent::Tick);
        }
    }

    /// What a decode worker says.
    pub(super) fn hear_client(&mut self, client: u64, message: ToPrefill) {
        if let ToPrefill::Renew(transfer_ids) = message {
            for transfer_id in transfer_ids {
                if self.is_claimed_by(transfer_id, client) {
                    self.drive_sending(transfer_id, SendEvent::Renew);
                }
            }
            return;
        }
        let Some(transfer_id) = message.transfer_id() else { return };
        match message {
            ToPrefill::Claim(claim) => self.claim(client, &claim),
            message if !self.is_claimed_by(transfer_id, client) => {
                self.hear_of_unclaimed(client, transfer_id, &message);
            }
            ToPrefill::Copying { first_token, .. } => {
                if self.note_first_token(transfer_id, first_token) {
                    self.drive_sending(transfer_id, SendEvent::Copying);
                }
            }
            ToPrefill::Landed { first_token, digest, .. } => {
                if self.note_first_token(transfer_id, first_token) {
                    if let Some(sending) = self.sending.get_mut(&transfer_id) {
                        sending.landed = Some(Instant::now());
                        sending.record.digest_checked = digest.is_some();
                    }
                    self.drive_sending(transfer_id, SendEvent::Landed { digest });
                }
            }
            ToPrefill::Place(place) => {
                if self.note_first_token(transfer_id, place.first_token) {
                    let digest = place.digest;
                    if let Some(sending) = self.sending.get_mut(&transfer_id) {
                        sending.record.digest_checked = digest;
                        sending.place = Some(place);
                    }
                    self.drive_sending(transfer_id, SendEvent::Place { digest });
                }
            }
            ToPrefill::Accepted(_) => self.drive_sending(transfer_id, SendEvent::Accepted),
            ToPrefill::Ended { how, .. } => self.drive_sending(transfer_id, SendEvent::PeerEnded(how)),
            ToPrefill::Renew(_) => {}
        }
    }

    fn is_claimed_by(&self, transfer_id: TransferId, client: u64) -> bool {
        self.sending.get(&transfer_id).is_some_and(|sending| sending.client == Some(client))
    }

    /// A message about a transfer that its sender does not hold: late, foreign or made up (KV-3).
    fn hear_of_unclaimed(&mut self, client: u64, transfer_id: TransferId, message: &ToPrefill) {
        match message {
            // Decode may give up before its claim was answered, or without having claimed.
            ToPrefill::Ended { how, .. } => {
                if self.sending.get(&transfer_id).is_some_and(|sending| sending.client.is_none()) {
                    self.drive_sending(transfer_id, SendEvent::PeerEnded(how.clone()));
                }
            }
            ToPrefill::Place(_) => {
                let how = Ending::Failed(self.why_not(transfer_id));
                self.tell_client(client, &ToDecode::Over { transfer_id, how, fenced: true });
            }
            _ => self.tell_client(client, &self.refusal(transfer_id)),
        }
    }

    /// An abort is told as one, also to a claim that comes after it.
    fn refusal(&self, transfer_id: TransferId) -> ToDecode {
        if !self.sending.contains_key(&transfer_id) && self.past.of(transfer_id) == Some(Gone::Aborted) {
            return ToDecode::Ended { transfer_id, how: Ending::Aborted };
        }
        ToDecode::Refused { transfer_id, failure: self.why_not(transfer_id) }
    }

    /// Why nothing is held under this id for whoever asks.
    fn why_not(&self, transfer_id: TransferId) -> TransferFailure {
        let peer = self.shared.engine_id.clone();
        if self.sending.contains_key(&transfer_id) {
            return TransferFailure::AlreadyClaimed { peer, transfer_id };
        }
        match self.past.of(transfer_id) {
            Some(Gone::Expired) => TransferFailure::Expired { peer, transfer_id },
            _ => TransferFailure::Unknown { peer, transfer_id },
        }
    }

    fn tell_client(&self, client: u64, message: &ToDecode) {
        if let Some(client) = self.clients.get(&client) {
            client.tell(message);
        }
    }

    fn claim(&mut self, client: u64, claim: &Claim) {
        let transfer_id = claim.transfer_id;
        if let Err(failure) = self.check_claim(client, claim) {
            tracing::debug!(%transfer_id, %failure, "claim refused");
            let refusal = match failure {
                TransferFailure::Unknown { .. } => self.refusal(transfer_id),
                failure => ToDecode::Refused { transfer_id, failure },
            };
            return self.tell_client(client, &refusal);
        }
        let (Some(sending), Some(entry)) = (self.sending.get_mut(&transfer_id), self.clients.get_mut(&client)) else {
            return;
        };
        sending.client = Some(client);
        sending.claimed = Some(Instant::now());
        sending.record.peer_engine_id = Some(entry.engine_id.clone());
        sending.machine.claimed_by(&entry.name());
        entry.transfers.insert(transfer_id);
        self.drive_sending(transfer_id, SendEvent::Claim);
    }

    /// Holds a claim against what was offered: every reference that is stale, foreign or edited has its own name.
    fn check_claim(&self, client: u64, claim: &Claim) -> Result<(), TransferFailure> {
        let (shared, transfer_id) = (&self.shared, claim.transfer_id);
        let peer = || shared.engine_id.clone();
        if claim.incarnation != shared.incarnation {
            let (named, current) = (claim.incarnation, shared.incarnation);
            return Err(TransferFailure::StaleIncarnation { peer: peer(), named, current });
        }
        if let Some(Err(why)) = self.clients.get(&client).map(|client| client.fit.as_ref()) {
            return Err(TransferFailure::Incompatible { peer: peer(), why: why.clone() });
        }
        let sending = self.sending.get(&transfer_id).ok_or_else(|| self.why_not(transfer_id))?;
        if !sending.machine.is_unclaimed() {
            return Err(TransferFailure::AlreadyClaimed { peer: peer(), transfer_id });
        }
        let bad = |why: String| Err(TransferFailure::BadReference { peer: peer(), transfer_id, why });
        if claim.geometry_digest != shared.geometry_digest {
            return bad("its parameters were made for another model or geometry".to_owned());
        }
        if claim.tokens != sending.offer.tokens {
            return bad(format!("{} tokens are asked for, {} were offered", claim.tokens, sending.offer.tokens));
        }
        if claim.weight_version != sending.weight_version {
            let (theirs, ours) = (sending.weight_version, claim.weight_version);
            return bad(format!("weight version {ours} is asked for, {theirs} was offered"));
        }
        // KV-5: as it was made, as prefill serves now, and as decode serves.
        for version in [shared.weight_version.load(std::sync::atomic::Ordering::Relaxed), claim.decode_weight_version] {
            if version != sending.weight_version {
                let (theirs, ours) = (sending.weight_version, version);
                return Err(TransferFailure::WeightVersion { peer: peer(), theirs, ours });
            }
        }
        Ok(())
    }

    /// Takes decode's word for where its part begins, if that is possible at all.
    fn note_first_token(&mut self, transfer_id: TransferId, first_token: u32) -> bool {
        let block_size = self.shared.layout.geometry().block_size;
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return false };
        if first_token <= sending.offer.tokens && first_token.is_multiple_of(block_size) {
            sending.first_token = first_token;
            return true;
        }
        let peer = self.shared.engine_id.clone();
        let why = format!("first token {first_token} is no multiple of block size {block_size}, or beyond the prompt");
        let failure = TransferFailure::BadReference { peer, transfer_id, why };
        self.drive_sending(transfer_id, SendEvent::Outdated(failure));
        false
    }

    pub(super) fn abort_sending(&mut self, transfer_id: TransferId) -> bool {
        let known = self.sending.contains_key(&transfer_id);
        self.drive_sending(transfer_id, SendEvent::Abort);
        known
    }

    pub(super) fn sending_peer_lost(&mut self, transfer_id: TransferId, failure: TransferFailure) {
        self.drive_sending(transfer_id, SendEvent::PeerLost(failure));
    }

    pub(super) fn tick_sending(&mut self, transfer_id: TransferId, now: Instant) {
        if let Some(sending) = self.sending.get_mut(&transfer_id) {
            sending.timer = None;
            self.drive_sending_at(transfer_id, SendEvent::Tick, now);
        }
    }

    pub(super) fn stop_sending(&mut self) {
        for transfer_id in self.sending.keys().copied().collect::<Vec<_>>() {
            self.drive_sending(transfer_id, SendEvent::ShutDown);
        }
    }

    /// KV-5: what other weights made is no longer granted. What is granted already goes on: decode holds it against its
    /// own version when it has landed.
    pub(super) fn outdate_sending(&mut self, version: u64) {
        let outdated = |sending: &Sending| sending.weight_version != version && sending.machine.is_unclaimed();
        let transfers = self.sending.iter().filter(|(_, sending)| outdated(sending)).map(|(id, _)| *id);
        for transfer_id in transfers.collect::<Vec<_>>() {
            self.outdate(transfer_id, version);
        }
    }

    fn outdate(&mut self, transfer_id: TransferId, ours: u64) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        let (peer, theirs) = (self.shared.engine_id.clone(), sending.weight_version);
        let failure = TransferFailure::WeightVersion { peer, theirs, ours };
        self.drive_sending(transfer_id, SendEvent::Outdated(failure));
    }

    pub(super) fn sending_digested(&mut self, transfer_id: TransferId, serial: u64, digest: u64) {
        if self.sending.get(&transfer_id).is_some_and(|sending| sending.serial == serial) {
            self.drive_sending(transfer_id, SendEvent::DigestReady(digest));
        }
    }

    pub(super) fn push_done(&mut self, transfer_id: TransferId, serial: u64, result: Result<Copied, TransportError>) {
        let Some(sending) = self.sending.get_mut(&transfer_id).filter(|sending| sending.serial == serial) else {
            return;
        };
        sending.push = None;
        sending.landed = Some(Instant::now());
        let fenced = result.as_ref().map_or_else(TransportError::fenced, |_| true);
        let result = match result {
            Ok(copied) => {
                sending.record.bytes = copied.bytes;
                sending.record.posts = copied.posts;
                sending.copy_started = Some(copied.started);
                sending.landed = Some(copied.finished);
                Ok(())
            }
            Err(error) => {
                let path = sending.record.path.map_or("no path", |path| path.name()).to_owned();
                let peer = sending.record.peer_engine_id.clone().unwrap_or_default();
                Err(TransferFailure::Copy { peer, path, why: error.to_string() })
            }
        };
        self.drive_sending(transfer_id, SendEvent::CopyDone { result, fenced });
    }

    fn drive_sending(&mut self, transfer_id: TransferId, event: SendEvent) {
        self.drive_sending_at(transfer_id, event, Instant::now());
    }

    fn drive_sending_at(&mut self, transfer_id: TransferId, event: SendEvent, now: Instant) {
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let actions = match sending.machine.on(event, now) {
            Ok(actions) => actions,
            Err(error) => return tracing::warn!(%transfer_id, %error, "ignored"),
        };
        for action in actions {
            self.do_sending(transfer_id, action);
        }
        if let Some(sending) = self.sending.get(&transfer_id) {
            let (old, at) = (sending.timer, sending.machine.deadline());
            let timer = self.set_timer(old, at, Timer::Transfer(Side::Prefill, transfer_id));
            if let Some(sending) = self.sending.get_mut(&transfer_id) {
                sending.timer = timer;
            }
        }
    }

    fn do_sending(&mut self, transfer_id: TransferId, action: SendAction) {
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let client = sending.client;
        let message = match action {
            SendAction::Grant => ToDecode::Granted(Granted {
                transfer_id,
                blocks: sending.offer.blocks.clone(),
                tokens: sending.offer.tokens,
                weight_version: sending.weight_version,
                lease_ms: u64::try_from(self.kv.lease.as_millis()).unwrap_or(u64::MAX),
            }),
            SendAction::Confirm { digest } => ToDecode::Confirmed { transfer_id, digest },
            SendAction::TellPushed { digest } => ToDecode::Pushed { transfer_id, digest },
            SendAction::TellOver { how, fenced } => ToDecode::Over { transfer_id, how, fenced },
            SendAction::Refuse(failure) => ToDecode::Refused { transfer_id, failure },
            SendAction::TellEnded(how) => ToDecode::Ended { transfer_id, how },
            SendAction::StartDigest => {
                let (serial, first_token) = (sending.serial, sending.first_token);
                let first_block = (first_token / self.shared.layout.geometry().block_size) as usize;
                let from_first = |group: &Vec<BlockId>| group.get(first_block..).unwrap_or_default().to_vec();
                let blocks = sending.offer.blocks.iter().map(from_first).collect();
                let tokens = sending.offer.tokens;
                return self.start_digest(Side::Prefill, transfer_id, serial, blocks, first_token, tokens);
            }
            SendAction::StartPush => return self.start_push(transfer_id),
            SendAction::CancelPush => return self.cancel_push(transfer_id),
            SendAction::Report(end) => return self.end_sending(transfer_id, end),
        };
        if let Some(client) = client {
            self.tell_client(client, &message);
        }
    }

    /// Submits the push, or waits for its link.
    pub(super) fn start_push(&mut self, transfer_id: TransferId) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        let (Some(client), Some(place)) = (sending.client, sending.place.clone()) else { return };
        if sending.push.is_some() || sending.machine.state() != "pushing" {
            return;
        }
        let (link, plan) = match self.push_path(client, place.path, transfer_id) {
            PushPath::Ready(link, plan) => (link, plan),
            PushPath::Waiting => return,
            PushPath::Impossible(why) => return self.push_impossible(transfer_id, why),
        };
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let extent = Extent {
            src_blocks: &by_group(&sending.offer.blocks),
            dst_blocks: &by_group(&place.blocks),
            first_token: place.first_token,
            tokens: sending.offer.tokens,
        };
        let runs = match plan.runs(extent) {
            Ok(runs) => runs,
            Err(error) => return self.push_impossible(transfer_id, error.to_string()),
        };
        sending.record.path = Some(place.path);
        sending.record.runs = runs.runs() as u64;
        let (serial, events) = (sending.serial, self.events.clone());
        let request = TransferRequest {
            direction: Direction::Push,
            runs,
            grant: Some(place.grant),
            deadline: Instant::now() + self.kv.transfer_timeout,
        };
        let done = move |result| {
            let _ = events.send(Event::Copied { side: Side::Prefill, transfer_id, serial, result });
        };
        let ticket = link.submit(request, Box::new(done));
        sending.push = Some((link, ticket));
    }

    /// A push that never began: nothing of it can land.
    pub(super) fn push_impossible(&mut self, transfer_id: TransferId, why: String) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        let path = sending.place.as_ref().map_or("no path", |place| place.path.name()).to_owned();
        let peer = sending.record.peer_engine_id.clone().unwrap_or_default();
        let result = Err(TransferFailure::Copy { peer, path, why });
        self.drive_sending(transfer_id, SendEvent::CopyDone { result, fenced: true });
    }

    fn cancel_push(&mut self, transfer_id: TransferId) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        match &sending.push {
            Some((link, ticket)) => link.cancel(*ticket),
            None => self.push_impossible(transfer_id, "stopped before it began".to_owned()),
        }
    }

    fn end_sending(&mut self, transfer_id: TransferId, end: super::End) {
        let Some(mut sending) = self.sending.remove(&transfer_id) else { return };
        self.set_timer(sending.timer, None, Timer::Transfer(Side::Prefill, transfer_id));
        if let Some(client) = sending.client.and_then(|client| self.clients.get_mut(&client)) {
            client.transfers.remove(&transfer_id);
        }
        let record = &mut sending.record;
        let begun = sending.copy_started.or(sending.claimed);
        record.wait_us = micros(Some(sending.offered), begun);
        record.copy_us = micros(begun, sending.landed);
        record.validate_us = micros(sending.landed, Some(Instant::now()));
        self.report(transfer_id, end, sending.offer.blocks.iter().map(Vec::len).sum(), sending.record);
    }

    /// Digests here if it is little, beside the loop if it is much.
    pub(super) fn start_digest(
        &mut self,
        side: Side,
        transfer_id: TransferId,
        serial: u64,
        blocks: Vec<Vec<BlockId>>,
        first_token: u32,
        tokens: u32,
    ) {
        let (shared, events) = (Arc::clone(&self.shared), self.events.clone());
        let bytes = u64::from(tokens.saturating_sub(first_token)) * shared.layout.geometry().token_bytes();
        let work = move || {
            let span = Span { blocks: &by_group(&blocks), first_token, tokens };
            // Blocks and tokens were checked when the transfer began. If they are wrong all the same, the digest is too.
            let digest = digest(&shared.layout, &shared.regions, span).unwrap_or_else(|error| {
                tracing::error!(%transfer_id, %error, "cannot digest");
                serial
            });
            let _ = events.send(Event::Digested { side, transfer_id, serial, digest });
        };
        if bytes <= DIGEST_HERE_BYTES_MAX {
            work();
        } else {
            self.reap();
            self.tasks.spawn_blocking(work);
        }
    }
}
