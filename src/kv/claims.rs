//! Which claims fit which offer, and what is said about transfers that are not held for whoever asks.
//!
//! A scheduler may answer before its ranks have heard of the transfer, so a claim can be faster than the offer. It is kept
//! for a while, and heard again when the offer comes.

use std::time::{Duration, Instant};

use super::channel::SendEvent;
use super::clients::Fit;
use super::core::{Core, Timer, TimerKey};
use super::messages::{Basis, Claim, Ending, ToDecode, ToPrefill};
use super::past::Gone;
use super::producer::Reader;
use super::{KvError, TransferFailure};
use crate::config::KvSendType;
use crate::control::TransferId;

/// How long a claim may be ahead of the offer: an engine hands its offers to its ranks with the next step. What comes ahead
/// of prefill itself may be so for as long as a transfer may take.
const EARLY_MAX: Duration = Duration::from_secs(3);
/// Transfers that may be asked for before they are offered. Past it a claim is refused at once.
const EARLY_TRANSFERS_MAX: usize = 4096;

/// What was said about a transfer before it was offered.
pub(super) struct Early {
    timer: Option<TimerKey>,
    /// Claims and endings, each with the client that sent it.
    said: Vec<(u64, ToPrefill)>,
}

impl Core {
    pub(super) fn claim(&mut self, client: u64, claim: Claim) {
        let transfer_id = claim.transfer_id;
        let reader = match self.check_claim(client, &claim) {
            Ok(reader) => reader,
            Err(TransferFailure::Unknown { .. }) if self.may_come(transfer_id) => {
                return self.keep_early(client, transfer_id, ToPrefill::Claim(claim));
            }
            Err(failure) => {
                tracing::debug!(%transfer_id, %failure, "claim refused");
                let refusal = match failure {
                    TransferFailure::Unknown { .. } => self.refusal(transfer_id),
                    failure => ToDecode::Refused { transfer_id, failure },
                };
                return self.tell_client(client, &refusal);
            }
        };
        let (Some(sending), Some(entry)) = (self.sending.get_mut(&transfer_id), self.clients.get_mut(&client)) else {
            return;
        };
        let Ok(fit) = &entry.fit else { return };
        let now = Instant::now();
        if let ReaderAt::First(numbers, _) = &reader {
            sending.claimant = Some((entry.engine_id.clone(), fit.split));
            sending.readers = numbers.iter().map(|number| Reader::new(*number)).collect();
            sending.machine.expect_readers(numbers.len(), now);
            sending.claimed = Some(now);
            sending.record.peer_engine_id = Some(entry.engine_id.clone());
        }
        let (ReaderAt::First(_, reader) | ReaderAt::Known(reader)) = reader;
        sending.readers[reader].client = Some(client);
        entry.transfers.insert(transfer_id);
        self.drive_sending(transfer_id, reader, SendEvent::Claim);
    }

    /// Holds a claim against what was offered: every reference that is stale, foreign or edited has its own name.
    fn check_claim(&mut self, client: u64, claim: &Claim) -> Result<ReaderAt, TransferFailure> {
        let (shared, transfer_id) = (&self.shared, claim.transfer_id);
        let peer = || shared.engine_id.clone();
        if let Basis::Params { incarnation: named, .. } = claim.basis
            && named != shared.incarnation
        {
            return Err(TransferFailure::StaleIncarnation { peer: peer(), named, current: shared.incarnation });
        }
        if let Some(Err(why)) = self.clients.get(&client).map(|client| client.fit.as_ref()) {
            return Err(TransferFailure::Incompatible { peer: peer(), why: why.clone() });
        }
        let bad = |why: String| Err(TransferFailure::BadReference { peer: peer(), transfer_id, why });
        match claim.basis {
            Basis::Params { geometry_digest, .. } if geometry_digest != shared.geometry_digest => {
                return bad("its parameters were made for another model or geometry".to_owned());
            }
            Basis::Early { .. } if shared.send_type != KvSendType::PutAsync => {
                let why = KvError::NotAsync { transfer_id, send_type: shared.send_type.name() }.to_string();
                return Err(TransferFailure::Incompatible { peer: peer(), why });
            }
            Basis::Params { .. } | Basis::Early { .. } => {}
        }
        let sending = self.sending.get(&transfer_id).ok_or_else(|| self.why_not(transfer_id))?;
        if claim.tokens != sending.offer.tokens {
            return bad(format!("{} tokens are asked for, {} were offered", claim.tokens, sending.offer.tokens));
        }
        if let Basis::Params { weight_version: Some(ours), .. } = claim.basis
            && ours != sending.weight_version
        {
            let theirs = sending.weight_version;
            return bad(format!("weight version {ours} is asked for, {theirs} was offered"));
        }
        // KV-5: as it was made, as prefill serves now, and as decode serves.
        for version in [self.weight_version(), claim.decode_weight_version] {
            if version != sending.weight_version {
                let (theirs, ours) = (sending.weight_version, version);
                return Err(TransferFailure::WeightVersion { peer: peer(), theirs, ours });
            }
        }
        if let Basis::Early { fingerprint: ours } = claim.basis {
            match sending.begun.as_ref().map(|begun| begun.fingerprint) {
                None => return bad("it is claimed early, and prefill was not told that it would be".to_owned()),
                Some(theirs) if ours != theirs => {
                    return bad(format!("decode's prompt ({ours:016x}) is not prefill's ({theirs:016x})"));
                }
                Some(_) => {}
            }
        }
        self.reader_for(client, transfer_id)
    }

    /// Which of the transfer's readers the client is. All must be runtimes of one decode worker.
    fn reader_for(&mut self, client: u64, transfer_id: TransferId) -> Result<ReaderAt, TransferFailure> {
        let peer = self.shared.engine_id.clone();
        let unknown = TransferFailure::Unknown { peer: peer.clone(), transfer_id };
        let Some((entry, fit)) = self.clients.get(&client).and_then(|entry| Some((entry, entry.fit.as_ref().ok()?)))
        else {
            return Err(unknown);
        };
        let (engine_id, Fit { split, part, .. }) = (entry.engine_id.clone(), fit);
        let (split, part) = (*split, *part);
        let Some(sending) = self.sending.get(&transfer_id) else { return Err(unknown) };
        let taken = TransferFailure::AlreadyClaimed { peer: peer.clone(), transfer_id };
        let no_reader = || {
            let why = format!("runtime {part} of {engine_id} needs nothing that is held here");
            TransferFailure::BadReference { peer: peer.clone(), transfer_id, why }
        };
        if let Some(claimant) = &sending.claimant {
            if *claimant != (engine_id.clone(), split) {
                return Err(taken);
            }
            let reader = sending.readers.iter().position(|reader| reader.number == part).ok_or_else(no_reader)?;
            let is_free = sending.readers[reader].client.is_none() && sending.machine.awaits(reader);
            return if is_free { Ok(ReaderAt::Known(reader)) } else { Err(taken) };
        }
        let (src, own) = (self.split, self.own_part);
        let readers = self.meeting(src, split).readers_of(own);
        match readers.iter().position(|number| *number == part) {
            Some(reader) => Ok(ReaderAt::First(readers, reader)),
            None => Err(no_reader()),
        }
    }

    /// A message about a transfer that its sender does not hold: late, foreign or made up (KV-3).
    pub(super) fn hear_of_unclaimed(&mut self, client: u64, transfer_id: TransferId, message: ToPrefill) {
        match message {
            ToPrefill::Ended { how, .. } => self.hear_end_of_unclaimed(client, transfer_id, how),
            ToPrefill::Place(_) => {
                let how = Ending::Failed(self.why_not(transfer_id));
                self.tell_client(client, &ToDecode::Over { transfer_id, how, fenced: true });
            }
            _ => self.tell_client(client, &self.refusal(transfer_id)),
        }
    }

    /// Decode may give up before its claim was answered or made, or let go of what nobody reads.
    fn hear_end_of_unclaimed(&mut self, client: u64, transfer_id: TransferId, how: Ending) {
        let Some(sending) = self.sending.get(&transfer_id) else {
            match how {
                _ if !self.may_come(transfer_id) => {}
                Ending::Released => {
                    self.keep_early(client, transfer_id, ToPrefill::Ended { transfer_id, how });
                }
                Ending::Aborted | Ending::Failed(_) => self.abort_early(transfer_id),
            }
            return;
        };
        let Some(Ok(fit)) = self.clients.get(&client).map(|client| client.fit.as_ref()) else { return };
        let part = fit.part;
        let reader = match &sending.claimant {
            None => Some(0),
            Some((_, split)) if *split != fit.split => None,
            Some(_) => sending.readers.iter().position(|reader| reader.number == part && reader.client.is_none()),
        };
        if let Some(reader) = reader {
            self.drive_sending(transfer_id, reader, SendEvent::PeerEnded(how));
        }
    }

    /// An abort is told as one, also to a claim that comes after it.
    fn refusal(&self, transfer_id: TransferId) -> ToDecode {
        let aborted = matches!(self.past.of(transfer_id), Some(Gone::Aborted | Gone::AbortedEarly));
        if !self.sending.contains_key(&transfer_id) && aborted {
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

    /// Whether the transfer may yet be offered here.
    fn may_come(&self, transfer_id: TransferId) -> bool {
        let has_room = self.early.len() < EARLY_TRANSFERS_MAX || self.early.contains_key(&transfer_id);
        has_room && !self.sending.contains_key(&transfer_id) && self.past.of(transfer_id).is_none()
    }

    fn keep_early(&mut self, client: u64, transfer_id: TransferId, message: ToPrefill) {
        if !self.early.contains_key(&transfer_id) {
            let is_refused_soon = matches!(&message, ToPrefill::Claim(Claim { basis: Basis::Params { .. }, .. }));
            let at_most = if is_refused_soon { EARLY_MAX } else { self.kv.transfer_timeout };
            let timer = self.set_timer(None, Some(Instant::now() + at_most), Timer::Early(transfer_id));
            self.early.insert(transfer_id, Early { timer, said: Vec::new() });
        }
        if let Some(early) = self.early.get_mut(&transfer_id) {
            early.said.push((client, message));
        }
    }

    fn take_early(&mut self, transfer_id: TransferId) -> Vec<(u64, ToPrefill)> {
        let Some(early) = self.early.remove(&transfer_id) else { return Vec::new() };
        self.set_timer(early.timer, None, Timer::Early(transfer_id));
        early.said
    }

    /// The offer has come: what was said about it counts now.
    pub(super) fn hear_early(&mut self, transfer_id: TransferId) {
        for (client, message) in self.take_early(transfer_id) {
            if self.clients.contains_key(&client) {
                self.hear_client(client, message);
            } else if self.sending.get(&transfer_id).is_some_and(|sending| sending.machine.is_unclaimed()) {
                let why = "it was lost before the transfer was offered".to_owned();
                let failure = TransferFailure::PeerLost { peer: "the decode worker".to_owned(), why };
                self.drive_sending(transfer_id, 0, SendEvent::PeerLost(failure));
            }
        }
    }

    /// No offer has come in time.
    pub(super) fn early_over(&mut self, transfer_id: TransferId) {
        self.refuse_early(transfer_id, &self.refusal(transfer_id));
    }

    /// KV-9: an abort that was faster than the offer ends what waits for it, and the offer when it comes.
    pub(super) fn abort_early(&mut self, transfer_id: TransferId) {
        self.past.remember(transfer_id, Gone::AbortedEarly);
        self.refuse_early(transfer_id, &ToDecode::Ended { transfer_id, how: Ending::Aborted });
    }

    fn refuse_early(&mut self, transfer_id: TransferId, answer: &ToDecode) {
        for (client, message) in self.take_early(transfer_id) {
            if matches!(message, ToPrefill::Claim(_)) {
                self.tell_client(client, answer);
            }
        }
    }
}

/// Where a claim that fits belongs.
enum ReaderAt {
    /// The first claim: all readers by their number, and which of them this one is.
    First(Vec<u32>, usize),
    Known(usize),
}
