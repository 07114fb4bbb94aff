//! Decode's driver: does what the receiving machines want done. What it does with bytes is in `copies`.

use std::sync::Arc;
use std::time::Instant;

use super::channel::{Gather, GatherAction, Mode, ReceiveAction, ReceiveEvent};
use super::core::{Core, Expect, Timer, TimerKey};
use super::messages::{Basis, Claim, Ending, Granted, ToDecode, ToPrefill};
use super::moved::Moved;
use super::past::Gone;
use super::peers::Peer;
use super::shares::Split;
use super::{BlockId, End, Extent, PairPlan, TransferFailure};
use crate::config::{Dispatch, KvSendType, Path};
use crate::control::{ControlError, TransferId};
use crate::telemetry::{Side, TransferRecord};
use crate::transport::{Grant, Link, TransferTicket, TransportError};

/// One expected transfer, with all that its machines need not know.
pub(super) struct Receiving {
    pub(super) machine: Gather,
    pub(super) serial: u64,
    /// One for each runtime of prefill that is read, in the machine's order.
    pub(super) parts: Vec<Part>,
    weight_version: u64,
    pub(super) tokens: u32,
    pub(super) blocks: Vec<Vec<BlockId>>,
    pub(super) first_token: u32,
    pub(super) digest: bool,
    timer: Option<TimerKey>,
    fetched: Option<Instant>,
    /// Concurrent dispatch: when the last part's prefill ended.
    ready: Option<Instant>,
    record: TransferRecord,
}

/// What comes from one runtime of prefill.
pub(super) struct Part {
    pub(super) peer: String,
    /// Which of prefill's runtimes it must turn out to be.
    number: u32,
    src: Split,
    pub(super) granted: Option<Granted>,
    /// What carries it, kept also after the peer was lost: it knows whether the peer's process is gone.
    pub(super) link: Option<Arc<dyn Link>>,
    pub(super) plan: Option<Arc<PairPlan>>,
    pub(super) path: Option<Path>,
    /// Which of our transports the link belongs to.
    pub(super) transport: usize,
    /// For each KV group the first token that moves.
    pub(super) from: Vec<u32>,
    pub(super) ticket: Option<TransferTicket>,
    /// Whether it counts as one of the peer's running copies.
    pub(super) has_slot: bool,
    /// Push: prefill's permission to write.
    pub(super) grant: Option<Grant>,
    pub(super) fence_timer: Option<TimerKey>,
    pub(super) moved: Moved,
}

impl Part {
    fn new(peer: &str, number: u32, src: Split) -> Self {
        Self {
            peer: peer.to_owned(),
            number,
            src,
            granted: None,
            link: None,
            plan: None,
            path: None,
            transport: 0,
            from: Vec::new(),
            ticket: None,
            has_slot: false,
            grant: None,
            fence_timer: None,
            moved: Moved::default(),
        }
    }

    pub(super) fn copy_failure(&self, error: &TransportError) -> TransferFailure {
        let path = self.path.map_or("no path", |path| path.name()).to_owned();
        TransferFailure::Copy { peer: self.peer.clone(), path, why: error.to_string() }
    }
}

impl Receiving {
    pub(super) fn holds_lease(&self, peer: &str) -> bool {
        self.part_of(peer).is_some_and(|part| self.machine.holds_lease(part))
    }

    fn part_of(&self, peer: &str) -> Option<usize> {
        self.parts.iter().position(|part| part.peer == peer)
    }
}

impl Core {
    /// Claims at every runtime of prefill that is read here, and lets go of those that it is our turn to.
    pub(super) fn expect(&mut self, expect: &Expect) {
        let (now, transfer_id) = (Instant::now(), expect.transfer_id);
        let (dst, own) = (self.split, self.own_part);
        let meeting = self.meeting(expect.src, dst);
        let sources = meeting.sources_of(own);
        let peer_of = |number: u32| expect.runtimes[number as usize].0.as_str();
        let peers: Vec<&str> = sources.iter().map(|number| peer_of(*number)).collect();
        let mut record = self.blank_record(transfer_id, Side::Decode);
        record.tokens = expect.tokens.into();
        if matches!(expect.runtimes.first(), Some((_, Basis::Early { .. }))) {
            record.dispatch = Dispatch::Concurrent;
        }
        let receiving = Receiving {
            machine: Gather::new(transfer_id, &peers, self.kv.transfer_timeout, now),
            serial: self.next_serial(),
            parts: sources.iter().map(|number| Part::new(peer_of(*number), *number, expect.src)).collect(),
            weight_version: expect.weight_version,
            tokens: expect.tokens,
            blocks: Vec::new(),
            first_token: 0,
            digest: false,
            timer: None,
            fetched: None,
            ready: None,
            record,
        };
        self.receiving.insert(transfer_id, receiving);
        for number in meeting.released_by(own) {
            let peer = peer_of(number);
            self.need_peer(peer);
            self.tell_peer(peer, &ToPrefill::Ended { transfer_id, how: Ending::Released });
        }
        if self.past.of(transfer_id) == Some(Gone::AbortedEarly) {
            // KV-9: the abort was faster. Prefill may hold blocks for it all the same.
            for peer in peers {
                self.need_peer(peer);
            }
            return self.drive_all_receiving(transfer_id, &ReceiveEvent::Abort);
        }
        for number in sources {
            let (endpoint, basis) = &expect.runtimes[*number as usize];
            let decode_weight_version = self.weight_version();
            let claim = Claim { transfer_id, basis: *basis, decode_weight_version, tokens: expect.tokens };
            self.claim_at(endpoint, claim);
        }
        self.drive_all_receiving(transfer_id, &ReceiveEvent::Tick);
    }

    fn claim_at(&mut self, peer: &str, claim: Claim) {
        if let Basis::Params { incarnation, .. } = claim.basis {
            self.leave_older_incarnation(peer, incarnation);
        }
        self.need_peer(peer).transfers.insert(claim.transfer_id);
        self.tell_peer(peer, &ToPrefill::Claim(claim));
        self.plan_renewal(peer);
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

    pub(super) fn fetch(&mut self, transfer_id: TransferId, mut blocks: Vec<Vec<BlockId>>, first_token: u32) {
        let digest = self.wants_digest();
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        for (group, blocks) in self.shared.layout.geometry().groups.iter().zip(&mut blocks) {
            // Blocks for tokens yet to come. Where lists may begin late they must end with the last token.
            if group.needed_from(receiving.tokens) == 0 {
                blocks.truncate(group.blocks_for(receiving.tokens.saturating_sub(first_token)) as usize);
            }
        }
        if receiving.fetched.is_some() {
            return tracing::warn!(%transfer_id, "fetched twice: ignored");
        }
        receiving.record.blocks = blocks.iter().map(|group| group.len() as u64).sum();
        receiving.record.digest_checked = digest;
        receiving.digest = digest;
        receiving.blocks = blocks;
        receiving.first_token = first_token;
        receiving.fetched = Some(Instant::now());
        self.drive_all_receiving(transfer_id, &ReceiveEvent::Fetch { digest });
    }

    pub(super) fn release(&mut self, transfer_id: TransferId) {
        self.drive_all_receiving(transfer_id, &ReceiveEvent::Release);
    }

    /// What a prefill worker says.
    pub(super) fn hear_peer(&mut self, peer: &str, message: ToDecode) {
        let transfer_id = message.transfer_id();
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        // Late otherwise: the transfer was ended here, and prefill told, before this was on its way.
        let Some(part) = receiving.part_of(peer) else { return };
        let event = match message {
            ToDecode::Begun { weight_version, .. } => return self.begun(transfer_id, part, weight_version),
            ToDecode::Granted(granted) => return self.granted(transfer_id, part, granted),
            ToDecode::Refused { failure, .. } => ReceiveEvent::Refused(failure),
            ToDecode::Confirmed { digest, .. } => ReceiveEvent::Confirmed { digest },
            ToDecode::Pushed { digest, .. } => {
                receiving.parts[part].moved.finished = Some(Instant::now());
                ReceiveEvent::Pushed { digest }
            }
            ToDecode::Over { how, fenced, .. } => ReceiveEvent::Over { how, fenced },
            ToDecode::Ended { how, .. } => ReceiveEvent::PeerEnded(how),
        };
        self.drive_receiving(transfer_id, part, event);
    }

    /// Concurrent dispatch: the claim fits, and the prompt is being computed.
    fn begun(&mut self, transfer_id: TransferId, part: usize, weight_version: u64) {
        let event = match self.meet(transfer_id, part, weight_version) {
            Some(Ok(Mode::Push)) => ReceiveEvent::Begun,
            Some(Ok(Mode::Pull)) => return,
            Some(Err(failure)) => ReceiveEvent::Outdated(failure),
            None => return,
        };
        self.drive_receiving(transfer_id, part, event);
    }

    fn granted(&mut self, transfer_id: TransferId, part: usize, granted: Granted) {
        let Some(met) = self.meet(transfer_id, part, granted.weight_version) else { return };
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let of_part = &mut receiving.parts[part];
        let event = match met {
            Err(failure) => ReceiveEvent::Outdated(failure),
            Ok(_) if granted.tokens != receiving.tokens => {
                let why = "another number of tokens was granted than asked for".to_owned();
                ReceiveEvent::Outdated(TransferFailure::BadReference { peer: of_part.peer.clone(), transfer_id, why })
            }
            Ok(mode) => ReceiveEvent::Granted(mode),
        };
        // Never another one's word: what is copied is what was granted first.
        of_part.granted.get_or_insert(granted);
        if receiving.record.dispatch == Dispatch::Concurrent {
            receiving.ready = Some(Instant::now());
        }
        let is_placed = receiving.machine.state(part) == "placed";
        // Prefill's blocks are known only now, and with them where each group begins.
        let event = match is_placed.then(|| self.first_tokens(transfer_id, part)) {
            Some(Err(failure)) => ReceiveEvent::Outdated(failure),
            Some(Ok(from)) => {
                if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
                    receiving.parts[part].from = from;
                }
                event
            }
            None => event,
        };
        self.drive_receiving(transfer_id, part, event);
    }

    /// Takes over how the part's peer is reached, and holds it against what was expected of it.
    fn meet(
        &mut self,
        transfer_id: TransferId,
        part: usize,
        weight_version: u64,
    ) -> Option<Result<Mode, TransferFailure>> {
        let ours = self.weight_version();
        let receiving = self.receiving.get_mut(&transfer_id)?;
        let of_part = &mut receiving.parts[part];
        let reached = self.peers.get(&of_part.peer)?.reached()?;
        let mode = if reached.send_type == KvSendType::Get { Mode::Pull } else { Mode::Push };
        let is_as_named = (reached.split, reached.part) == (of_part.src, of_part.number);
        of_part.link = Some(Arc::clone(&reached.link));
        of_part.plan = Some(Arc::clone(&reached.plan));
        of_part.path = Some(reached.path);
        of_part.transport = reached.transport;
        receiving.record.peer_engine_id = Some(reached.engine_id.clone());
        receiving.record.path = Some(reached.path);
        receiving.record.weight_version = weight_version;
        let peer = of_part.peer.clone();
        if weight_version != ours {
            return Some(Err(TransferFailure::WeightVersion { peer, theirs: weight_version, ours }));
        }
        if !is_as_named {
            let why = "it holds other ranks than the parameters say".to_owned();
            return Some(Err(TransferFailure::BadReference { peer, transfer_id, why }));
        }
        Some(Ok(mode))
    }

    pub(super) fn abort_receiving(&mut self, transfer_id: TransferId) -> bool {
        let known = self.receiving.contains_key(&transfer_id);
        self.drive_all_receiving(transfer_id, &ReceiveEvent::Abort);
        known
    }

    pub(super) fn receiving_peer_lost(&mut self, transfer_id: TransferId, peer: &str, failure: TransferFailure) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        let Some(part) = receiving.part_of(peer) else { return };
        // The peer's entry is gone, and with it its count of running copies.
        receiving.parts[part].has_slot = false;
        self.drive_receiving(transfer_id, part, ReceiveEvent::PeerLost(failure));
    }

    pub(super) fn tick_receiving(&mut self, transfer_id: TransferId, now: Instant) {
        if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
            receiving.timer = None;
            let actions = receiving.machine.on_all(&ReceiveEvent::Tick, now).unwrap_or_default();
            self.do_all_receiving(transfer_id, actions);
        }
    }

    pub(super) fn stop_receiving(&mut self) {
        for transfer_id in self.receiving.keys().copied().collect::<Vec<_>>() {
            self.drive_all_receiving(transfer_id, &ReceiveEvent::ShutDown);
        }
    }

    /// KV-5: KV of other weights is of no use any more, wherever it is on its way.
    pub(super) fn outdate_receiving(&mut self, ours: u64) {
        let outdated = self.receiving.iter().filter(|(_, receiving)| receiving.weight_version != ours);
        for transfer_id in outdated.map(|(id, _)| *id).collect::<Vec<_>>() {
            let Some(receiving) = self.receiving.get(&transfer_id) else { continue };
            let peer = receiving.parts.first().map_or_else(String::new, |part| part.peer.clone());
            let failure = TransferFailure::WeightVersion { peer, theirs: receiving.weight_version, ours };
            self.drive_all_receiving(transfer_id, &ReceiveEvent::Outdated(failure));
        }
    }

    /// The transfer, unless this is about an earlier one with the same id.
    pub(super) fn receiving_of(&mut self, transfer_id: TransferId, serial: u64) -> Option<&mut Receiving> {
        self.receiving.get_mut(&transfer_id).filter(|receiving| receiving.serial == serial)
    }

    pub(super) fn receiving_digested(&mut self, transfer_id: TransferId, serial: u64, part: usize, digest: u64) {
        if self.receiving_of(transfer_id, serial).is_some() {
            self.drive_receiving(transfer_id, part, ReceiveEvent::DigestReady(digest));
        }
    }

    pub(super) fn drive_receiving(&mut self, transfer_id: TransferId, part: usize, event: ReceiveEvent) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        match receiving.machine.on(part, event, Instant::now()) {
            Ok(actions) => self.do_all_receiving(transfer_id, actions),
            Err(error) => tracing::warn!(%transfer_id, %error, "ignored"),
        }
    }

    fn drive_all_receiving(&mut self, transfer_id: TransferId, event: &ReceiveEvent) {
        let Some(receiving) = self.receiving.get_mut(&transfer_id) else { return };
        match receiving.machine.on_all(event, Instant::now()) {
            Ok(actions) => self.do_all_receiving(transfer_id, actions),
            Err(error) => tracing::warn!(%transfer_id, %error, "ignored"),
        }
    }

    fn do_all_receiving(&mut self, transfer_id: TransferId, actions: Vec<GatherAction>) {
        for action in actions {
            match action {
                GatherAction::Part(part, action) => self.do_receiving(transfer_id, part, action),
                GatherAction::Report(end) => self.end_receiving(transfer_id, end),
            }
        }
        if let Some(receiving) = self.receiving.get(&transfer_id) {
            let (old, at) = (receiving.timer, receiving.machine.deadline());
            let timer = self.set_timer(old, at, Timer::Transfer(Side::Decode, transfer_id));
            if let Some(receiving) = self.receiving.get_mut(&transfer_id) {
                receiving.timer = timer;
            }
        }
    }

    fn do_receiving(&mut self, transfer_id: TransferId, part: usize, action: ReceiveAction) {
        let Some(receiving) = self.receiving.get(&transfer_id) else { return };
        let of_part = &receiving.parts[part];
        let message = match action {
            ReceiveAction::StartCopy { .. } | ReceiveAction::TellPlace { .. } => {
                return self.begin_copy(transfer_id, part);
            }
            ReceiveAction::CancelCopy => return self.cancel_pull(transfer_id, part),
            ReceiveAction::StartDigest => return self.digest_received(transfer_id, part),
            ReceiveAction::Fence => return self.fence(transfer_id, part),
            ReceiveAction::TellLanded { digest } => return self.landed(transfer_id, part, digest),
            ReceiveAction::TellAccepted => ToPrefill::Accepted(transfer_id),
            ReceiveAction::TellEnded(how) => ToPrefill::Ended { transfer_id, how },
            // Kept by the machine of the whole.
            ReceiveAction::Report(_) => return,
        };
        let peer = of_part.peer.clone();
        self.tell_peer(&peer, &message);
    }

    /// Asks prefill whether its blocks were held throughout, unless that can be seen (KV-3). Its own digest must be asked for.
    fn landed(&mut self, transfer_id: TransferId, part: usize, digest: Option<u64>) {
        let Some(receiving) = self.receiving.get(&transfer_id) else { return };
        let of_part = &receiving.parts[part];
        let board = self.peers.get(&of_part.peer).and_then(Peer::reached).and_then(|reached| reached.board.as_ref());
        let word = of_part.granted.as_ref().and_then(|granted| granted.word);
        let is_held = digest.is_none() && board.zip(word).is_some_and(|(board, word)| board.shows(word));
        let (peer, from) = (of_part.peer.clone(), of_part.from.clone());
        // Looked at first: this lets prefill free them.
        self.tell_peer(&peer, &ToPrefill::Landed { transfer_id, from, digest });
        if is_held {
            self.drive_receiving(transfer_id, part, ReceiveEvent::Confirmed { digest: None });
        }
    }

    fn end_receiving(&mut self, transfer_id: TransferId, end: End) {
        let Some(mut receiving) = self.receiving.remove(&transfer_id) else { return };
        self.set_timer(receiving.timer, None, Timer::Transfer(Side::Decode, transfer_id));
        for (number, part) in receiving.parts.iter_mut().enumerate() {
            self.set_timer(part.fence_timer, None, Timer::Fence(transfer_id, number));
            if let Some(peer) = self.peers.get_mut(&part.peer) {
                peer.transfers.remove(&transfer_id);
            }
            if std::mem::take(&mut part.has_slot) {
                self.free_slot_at(&part.peer);
            }
            if let Some(link) = part.link.take() {
                self.let_go(link);
            }
        }
        let moved = receiving.parts.iter().map(|part| &part.moved);
        Moved::add_up(moved, receiving.fetched, None, receiving.ready, &mut receiving.record);
        if end == End::Released {
            receiving.record.path = None;
        }
        self.report(transfer_id, end, 0, receiving.record);
    }

    /// What is left when waiting has come to its bound: said to be unfenced, since nobody knows.
    pub(super) fn give_up_receiving(&mut self) {
        for transfer_id in self.receiving.keys().copied().collect::<Vec<_>>() {
            self.drive_all_receiving(transfer_id, &ReceiveEvent::Fenced(false));
        }
    }

    /// Which tokens of each group one part brings.
    pub(super) fn first_tokens(&self, transfer_id: TransferId, part: usize) -> Result<Vec<u32>, TransferFailure> {
        self.with_extent(transfer_id, part, |plan, extent| plan.first_tokens(extent))
    }

    /// Asks the plan of one part about what the transfer moves.
    pub(super) fn with_extent<T>(
        &self,
        transfer_id: TransferId,
        part: usize,
        ask: impl FnOnce(&PairPlan, Extent<'_>) -> Result<T, super::LayoutError>,
    ) -> Result<T, TransferFailure> {
        let lost = |peer: &str| TransferFailure::PeerLost { peer: peer.to_owned(), why: "it is gone".to_owned() };
        let Some(receiving) = self.receiving.get(&transfer_id) else { return Err(lost("prefill")) };
        let of_part = &receiving.parts[part];
        let Some(plan) = &of_part.plan else { return Err(lost(&of_part.peer)) };
        let src_blocks = match &of_part.granted {
            Some(granted) => std::borrow::Cow::Borrowed(&granted.blocks),
            None => std::borrow::Cow::Owned(plan.stand_in(receiving.tokens)),
        };
        let extent = Extent {
            src_blocks: &super::run_list::by_group(&src_blocks),
            dst_blocks: &super::run_list::by_group(&receiving.blocks),
            first_token: receiving.first_token,
            tokens: receiving.tokens,
        };
        let (peer, bad) = (of_part.peer.clone(), |error: super::LayoutError| error.to_string());
        ask(plan, extent).map_err(|error| TransferFailure::BadReference { peer, transfer_id, why: bad(error) })
    }
}
