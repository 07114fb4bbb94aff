//! Prefill's driver: does what the sending machines want done. Which claims fit which offer is in `claims`, what it does
//! with bytes in `pushes`.

use std::sync::Arc;
use std::time::Instant;

use super::channel::{Hold, HoldAction, SendAction, SendEvent};
use super::core::{Core, Timer, TimerKey};
use super::digesting::Work;
use super::messages::{Ending, Granted, Place, ToDecode, ToPrefill};
use super::moved::Moved;
use super::parts::{Computed, Sent};
use super::past::Gone;
use super::shares::Split;
use super::{Begin, Offer, Progress, TransferFailure};
use crate::config::{Dispatch, KvSendType};
use crate::control::TransferId;
use crate::telemetry::{Side, TransferRecord};
use crate::transport::{Board, Link, TransferTicket, Word, WordUp};

/// One offered transfer, with all that its machines need not know.
pub(super) struct Sending {
    pub(super) machine: Hold,
    pub(super) serial: u64,
    /// Without blocks until prefill has ended.
    pub(super) offer: Offer,
    /// Concurrent dispatch: how far prefill is.
    pub(super) begun: Option<Begun>,
    pub(super) weight_version: u64,
    /// The decode worker that has claimed it: its engine id, and how it spreads its ranks.
    pub(super) claimant: Option<(String, Split)>,
    /// One for each runtime of decode that reads here, in the machine's order; none before the first claim.
    pub(super) readers: Vec<Reader>,
    /// Up for as long as the blocks are held, once they have been granted to anybody who pulls.
    word: Option<WordUp>,
    timer: Option<TimerKey>,
    offered: Instant,
    pub(super) claimed: Option<Instant>,
    pub(super) record: TransferRecord,
}

/// A transfer that was claimed, or may have been, before its prompt was computed.
pub(super) struct Begun {
    pub(super) fingerprint: u64,
    pub(super) computed: Computed,
    /// When prefill ended.
    ready: Option<Instant>,
}

/// One runtime of decode that reads here.
pub(super) struct Reader {
    /// Which of decode's runtimes it is.
    pub(super) number: u32,
    /// Its connection, once it has claimed.
    pub(super) client: Option<u64>,
    pub(super) place: Option<Place>,
    pub(super) push: Option<(Arc<dyn Link>, TransferTicket)>,
    /// Concurrent dispatch: what of it has been pushed, once a part was.
    pub(super) sent: Option<Sent>,
    /// For each KV group the first token that a digest covers.
    from: Vec<u32>,
    pub(super) moved: Moved,
}

impl Reader {
    pub(super) fn new(number: u32) -> Self {
        Self { number, client: None, place: None, push: None, sent: None, from: Vec::new(), moved: Moved::default() }
    }
}

impl Sending {
    /// What says that the blocks are held, to everybody to whom they are granted.
    fn word(&mut self, board: Option<&Arc<Board>>) -> Option<Word> {
        self.word = self.word.take().or_else(|| board?.put_up());
        self.word.as_ref().map(WordUp::word)
    }

    /// Which reader this client is.
    pub(super) fn reader_of(&self, client: u64) -> Option<usize> {
        self.readers.iter().position(|reader| reader.client == Some(client))
    }
}

impl Core {
    /// A prompt is about to be computed, and may have been claimed already.
    pub(super) fn begin(&mut self, begin: Begin, weight_version: u64) {
        let transfer_id = begin.transfer_id;
        if self.past.of(transfer_id) == Some(Gone::AbortedEarly) {
            // KV-9: the abort was faster. What the engine offers all the same will be told so.
            return self.shared.leave_begun(transfer_id);
        }
        let (request_id, tokens) = (begin.request_id, begin.prompt.tokens);
        let offer = Offer { transfer_id, request_id, blocks: Vec::new(), tokens };
        let machine = Hold::begun(transfer_id, self.kv.lease, Instant::now());
        let mut sending = self.sending(machine, offer, weight_version);
        sending.record.dispatch = Dispatch::Concurrent;
        sending.begun =
            Some(Begun { fingerprint: begin.prompt.fingerprint, computed: Computed::default(), ready: None });
        self.sending.insert(transfer_id, sending);
        if weight_version != self.weight_version() {
            self.outdate(transfer_id, self.weight_version());
        }
        self.hear_early(transfer_id);
    }

    /// More of it is final: whoever has named blocks is sent what is worth a post.
    pub(super) fn progress(&mut self, progress: Progress) {
        let transfer_id = progress.transfer_id;
        let layers = self.shared.layout.geometry().layers();
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let Some(begun) = sending.begun.as_mut().filter(|begun| begun.ready.is_none()) else { return };
        if progress.layers.end > layers {
            return tracing::error!(%transfer_id, ?progress.layers, layers, "progress of layers that there are not");
        }
        begun.computed.note(progress);
        self.push_on(transfer_id);
    }

    /// The engine has taken the blocks away, and will compute the prompt again.
    pub(super) fn restart(&mut self, transfer_id: TransferId) {
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        if let Some(begun) = &mut sending.begun {
            begun.computed.void();
        }
        sending.readers.iter_mut().filter_map(|reader| reader.sent.as_mut()).for_each(Sent::void);
    }

    fn push_on(&mut self, transfer_id: TransferId) {
        for reader in 0..self.sending.get(&transfer_id).map_or(0, |sending| sending.readers.len()) {
            self.start_push(transfer_id, reader);
        }
    }

    pub(super) fn offer(&mut self, offer: Offer, weight_version: u64) {
        let transfer_id = offer.transfer_id;
        if self.sending.get(&transfer_id).is_some_and(|sending| sending.begun.is_some()) {
            return self.complete(offer, weight_version);
        }
        let machine = Hold::new(transfer_id, self.kv.lease, Instant::now());
        let mut sending = self.sending(machine, offer, weight_version);
        sending.record.blocks = sending.offer.blocks.iter().map(|group| group.len() as u64).sum();
        self.sending.insert(transfer_id, sending);
        match self.past.of(transfer_id) {
            // KV-9: the abort was faster than the offer.
            Some(Gone::AbortedEarly) => self.drive_all_sending(transfer_id, &SendEvent::Abort),
            Some(Gone::ReleasedEarly) => self.drive_all_sending(transfer_id, &SendEvent::PeerEnded(Ending::Released)),
            _ if weight_version != self.weight_version() => self.outdate(transfer_id, self.weight_version()),
            _ => self.drive_all_sending(transfer_id, &SendEvent::Tick),
        }
        self.hear_early(transfer_id);
    }

    fn sending(&mut self, machine: Hold, offer: Offer, weight_version: u64) -> Sending {
        let mut record = self.blank_record(offer.transfer_id, Side::Prefill);
        record.tokens = offer.tokens.into();
        record.weight_version = weight_version;
        Sending {
            machine,
            serial: self.next_serial(),
            offer,
            begun: None,
            weight_version,
            claimant: None,
            readers: Vec::new(),
            word: None,
            timer: None,
            offered: Instant::now(),
            claimed: None,
            record,
        }
    }

    /// What was begun is computed: the blocks are complete, and held from now on.
    fn complete(&mut self, offer: Offer, weight_version: u64) {
        let (now, transfer_id) = (Instant::now(), offer.transfer_id);
        let groups = &self.shared.layout.geometry().groups;
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let begun_with = std::mem::replace(&mut sending.offer, offer).tokens;
        let Sending { offer, readers, record, begun, .. } = sending;
        if let Some(begun) = begun {
            begun.ready = Some(now);
        }
        record.blocks = offer.blocks.iter().map(|group| group.len() as u64).sum();
        // Decode could not know where the blocks begin when it named its own.
        for (from, (group, blocks)) in
            readers.iter_mut().flat_map(|reader| reader.from.iter_mut().zip(groups.iter().zip(&offer.blocks)))
        {
            *from = group.covered_from(blocks.len(), offer.tokens).map_or(*from, |first| first.max(*from));
        }
        let wrong = (begun_with != offer.tokens).then(|| {
            let why = format!("{begun_with} tokens were begun, {} are offered", offer.tokens);
            TransferFailure::BadReference { peer: self.shared.engine_id.clone(), transfer_id, why }
        });
        let started_with = sending.weight_version;
        let actions = sending.machine.ready(now);
        self.do_all_sending(transfer_id, actions);
        if let Some(failure) = wrong {
            return self.drive_all_sending(transfer_id, &SendEvent::Outdated(failure));
        }
        if [weight_version, self.weight_version()] != [started_with; 2] {
            return self.outdate(transfer_id, self.weight_version().max(weight_version));
        }
        self.push_on(transfer_id);
    }

    /// What a decode worker says.
    pub(super) fn hear_client(&mut self, client: u64, message: ToPrefill) {
        let Some(transfer_id) = message.transfer_id() else {
            let ToPrefill::Renew(transfer_ids) = message else { return };
            for transfer_id in transfer_ids {
                if let Some(reader) = self.reader_of(transfer_id, client) {
                    self.drive_sending(transfer_id, reader, SendEvent::Renew);
                }
            }
            return;
        };
        if let ToPrefill::Claim(claim) = message {
            return self.claim(client, claim);
        }
        // One that has ended waits for the others alone. Its peer may not have heard of it, and must not wait for a word (KV-7).
        let goes_on = |reader: &usize| {
            self.sending.get(&transfer_id).is_some_and(|sending| sending.machine.state(*reader) != "ended")
        };
        match self.reader_of(transfer_id, client).filter(goes_on) {
            Some(reader) => self.hear_reader(transfer_id, reader, message),
            None => self.hear_of_unclaimed(client, transfer_id, message),
        }
    }

    fn hear_reader(&mut self, transfer_id: TransferId, reader: usize, message: ToPrefill) {
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let of_reader = &mut sending.readers[reader];
        let event = match message {
            ToPrefill::Copying { from, .. } => {
                if !self.note_from(transfer_id, reader, from) {
                    return;
                }
                SendEvent::Copying
            }
            ToPrefill::Landed { from, digest, .. } => {
                of_reader.moved.finished = Some(Instant::now());
                sending.record.digest_checked = digest.is_some();
                if !self.note_from(transfer_id, reader, from) {
                    return;
                }
                SendEvent::Landed { digest }
            }
            ToPrefill::Place(place) => {
                let (digest, from) = (place.digest, place.from.clone());
                sending.record.digest_checked = digest;
                of_reader.place = Some(place);
                if !self.note_from(transfer_id, reader, from) {
                    return;
                }
                SendEvent::Place { digest }
            }
            ToPrefill::Accepted(_) => SendEvent::Accepted,
            ToPrefill::Ended { how, .. } => SendEvent::PeerEnded(how),
            ToPrefill::Claim(_) | ToPrefill::Renew(_) => return,
        };
        self.drive_sending(transfer_id, reader, event);
    }

    pub(super) fn reader_of(&self, transfer_id: TransferId, client: u64) -> Option<usize> {
        self.sending.get(&transfer_id)?.reader_of(client)
    }

    pub(super) fn tell_client(&self, client: u64, message: &ToDecode) {
        if let Some(client) = self.clients.get(&client) {
            client.tell(message);
        }
    }

    /// Takes decode's word for where its part begins, if that is possible at all.
    fn note_from(&mut self, transfer_id: TransferId, reader: usize, from: Vec<u32>) -> bool {
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return false };
        let tokens = sending.offer.tokens;
        let groups = &self.shared.layout.geometry().groups;
        if !sending.machine.is_ready() && groups.len() == from.len() && from.iter().all(|from| *from <= tokens) {
            // Held against the blocks once they are known.
            sending.readers[reader].from = from;
            return true;
        }
        let possible = groups.len() == from.len()
            && groups.iter().zip(&sending.offer.blocks).zip(&from).all(|((group, blocks), from)| {
                group.covered_from(blocks.len(), tokens).is_some_and(|first| first <= *from) && *from <= tokens
            });
        if possible {
            sending.readers[reader].from = from;
            return true;
        }
        let peer = self.shared.engine_id.clone();
        let why = format!("tokens from {from:?} on, by KV group, are asked for, up to {tokens}: not what was offered");
        let failure = TransferFailure::BadReference { peer, transfer_id, why };
        self.drive_sending(transfer_id, reader, SendEvent::Outdated(failure));
        false
    }

    pub(super) fn abort_sending(&mut self, transfer_id: TransferId) -> bool {
        let known = self.sending.contains_key(&transfer_id);
        self.drive_all_sending(transfer_id, &SendEvent::Abort);
        known
    }

    pub(super) fn sending_peer_lost(&mut self, transfer_id: TransferId, client: u64, failure: &TransferFailure) {
        if let Some(reader) = self.reader_of(transfer_id, client) {
            self.drive_sending(transfer_id, reader, SendEvent::PeerLost(failure.clone()));
        }
    }

    pub(super) fn tick_sending(&mut self, transfer_id: TransferId, now: Instant) {
        if let Some(sending) = self.sending.get_mut(&transfer_id) {
            sending.timer = None;
            let actions = sending.machine.on_all(&SendEvent::Tick, now);
            self.do_all_sending(transfer_id, actions);
        }
    }

    pub(super) fn stop_sending(&mut self) {
        for transfer_id in self.sending.keys().copied().collect::<Vec<_>>() {
            self.drive_all_sending(transfer_id, &SendEvent::ShutDown);
        }
    }

    /// KV-5: what other weights made is no longer granted, and what they have begun is not gone on with. What is granted
    /// already goes on: decode holds it against its own version when it has landed.
    pub(super) fn outdate_sending(&mut self, version: u64) {
        let outdated = |sending: &Sending| {
            let goes_on = sending.machine.is_ready() && !sending.machine.is_unclaimed();
            sending.weight_version != version && !goes_on
        };
        let transfers = self.sending.iter().filter(|(_, sending)| outdated(sending)).map(|(id, _)| *id);
        for transfer_id in transfers.collect::<Vec<_>>() {
            self.outdate(transfer_id, version);
        }
    }

    fn outdate(&mut self, transfer_id: TransferId, ours: u64) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        let (peer, theirs) = (self.shared.engine_id.clone(), sending.weight_version);
        let failure = TransferFailure::WeightVersion { peer, theirs, ours };
        self.drive_all_sending(transfer_id, &SendEvent::Outdated(failure));
    }

    pub(super) fn sending_digested(&mut self, transfer_id: TransferId, serial: u64, reader: usize, digest: u64) {
        if self.sending.get(&transfer_id).is_some_and(|sending| sending.serial == serial) {
            self.drive_sending(transfer_id, reader, SendEvent::DigestReady(digest));
        }
    }

    pub(super) fn drive_sending(&mut self, transfer_id: TransferId, reader: usize, event: SendEvent) {
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        match sending.machine.on(reader, event, Instant::now()) {
            Ok(actions) => self.do_all_sending(transfer_id, actions),
            Err(error) => tracing::warn!(%transfer_id, %error, "ignored"),
        }
    }

    fn drive_all_sending(&mut self, transfer_id: TransferId, event: &SendEvent) {
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let actions = sending.machine.on_all(event, Instant::now());
        self.do_all_sending(transfer_id, actions);
    }

    fn do_all_sending(&mut self, transfer_id: TransferId, actions: Vec<HoldAction>) {
        for action in actions {
            match action {
                HoldAction::Reader(reader, action) => self.do_sending(transfer_id, reader, action),
                HoldAction::Report(end) => self.end_sending(transfer_id, end),
            }
        }
        if let Some(sending) = self.sending.get(&transfer_id) {
            let (old, at) = (sending.timer, sending.machine.deadline());
            let timer = self.set_timer(old, at, Timer::Transfer(Side::Prefill, transfer_id));
            if let Some(sending) = self.sending.get_mut(&transfer_id) {
                sending.timer = timer;
            }
        }
    }

    fn do_sending(&mut self, transfer_id: TransferId, reader: usize, action: SendAction) {
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let client = sending.readers.get(reader).and_then(|reader| reader.client);
        let message = match action {
            SendAction::TellBegun => ToDecode::Begun { transfer_id, weight_version: sending.weight_version },
            SendAction::Grant => ToDecode::Granted(Granted {
                word: sending.word(self.board.as_ref().filter(|_| self.shared.send_type == KvSendType::Get)),
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
            SendAction::StartDigest => return self.digest_sent(transfer_id, reader),
            SendAction::StartPush => return self.start_push(transfer_id, reader),
            SendAction::CancelPush => return self.cancel_push(transfer_id, reader),
            // Kept by the machine of the whole.
            SendAction::Report(_) => return,
        };
        if let Some(client) = client {
            self.tell_client(client, &message);
        }
    }

    fn digest_sent(&mut self, transfer_id: TransferId, reader: usize) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        let of_reader = &sending.readers[reader];
        let client = of_reader.client.and_then(|client| self.clients.get(&client));
        let Some(Ok(fit)) = client.map(|client| client.fit.as_ref()) else { return };
        self.start_digest(Work {
            side: Side::Prefill,
            transfer_id,
            part: reader,
            serial: sending.serial,
            blocks: sending.offer.blocks.clone(),
            from: of_reader.from.clone(),
            tokens: sending.offer.tokens,
            scope: Arc::clone(&fit.scope),
        });
    }

    fn end_sending(&mut self, transfer_id: TransferId, end: super::End) {
        let Some(mut sending) = self.sending.remove(&transfer_id) else { return };
        self.set_timer(sending.timer, None, Timer::Transfer(Side::Prefill, transfer_id));
        // KV-3: before anybody hears that the blocks are free.
        drop(sending.word.take());
        for client in sending.readers.iter().filter_map(|reader| reader.client) {
            if let Some(client) = self.clients.get_mut(&client) {
                client.transfers.remove(&transfer_id);
            }
        }
        let moved = sending.readers.iter().map(|reader| &reader.moved);
        let ready = sending.begun.as_ref().and_then(|begun| begun.ready);
        Moved::add_up(moved, Some(sending.offered), sending.claimed, ready, &mut sending.record);
        if !sending.machine.is_ready() {
            return self.end_begun(transfer_id, &end, sending.record);
        }
        self.report(transfer_id, end, sending.offer.blocks.iter().map(Vec::len).sum(), sending.record);
    }
}
