//! Both machines of one transfer, with a simulated connection and simulated copies, under random interleavings.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{Mode, Receive, ReceiveAction, ReceiveEvent, Send, SendAction, SendEvent};
use crate::control::TransferId;
use crate::kv::messages::Ending;
use crate::kv::{End, TransferFailure};

const ID: TransferId = TransferId([9; 16]);
const LEASE: Duration = Duration::from_secs(30);
const TIMEOUT: Duration = Duration::from_secs(20);
const DIGEST: u64 = 42;

/// What a step of the outside world may be. Steps that make no sense at the moment do nothing.
#[derive(Debug, Clone, Copy)]
enum Step {
    DeliverToPrefill,
    DeliverToDecode,
    Fetch,
    Release,
    FinishPull { ok: bool },
    FinishPush { ok: bool },
    FinishPrefillDigest,
    FinishDecodeDigest { right: bool },
    AbortPrefill,
    AbortDecode,
    LoseConnection,
    Outdate,
    ShutDownPrefill,
    ShutDownDecode,
    Wait(u64),
}

/// From decode to prefill, and back: the protocol's messages, without what they carry.
#[derive(Debug, Clone)]
enum ToPrefill {
    Claim,
    Landed(Option<u64>),
    Place(bool),
    Copying,
    Accepted,
    Ended(Ending),
}

#[derive(Debug, Clone)]
enum ToDecode {
    Granted,
    Refused(TransferFailure),
    Confirmed(Option<u64>),
    Pushed(Option<u64>),
    Over(Ending, bool),
    Ended(Ending),
}

struct World {
    mode: Mode,
    digest: bool,
    /// Whether the path can take back a permission to write (`tcp`), or must ask (`shm`).
    revocable: bool,
    now: Instant,
    send: Send,
    receive: Receive,
    claimed: bool,
    connected: bool,
    to_prefill: VecDeque<ToPrefill>,
    to_decode: VecDeque<ToDecode>,
    pulling: bool,
    pushing: bool,
    /// Whether prefill's copy may write into decode's blocks.
    may_push: bool,
    prefill_digesting: bool,
    decode_digesting: bool,
    /// Decode waits to be told that nothing writes any more.
    fencing: bool,
    sent: Vec<End>,
    received: Vec<End>,
    /// Whether prefill had reported when it gave its word that the blocks were held.
    vouched_while_held: Option<bool>,
    copied: bool,
}

impl World {
    fn new(mode: Mode, digest: bool, revocable: bool) -> Self {
        let now = Instant::now();
        Self {
            mode,
            digest,
            revocable,
            now,
            send: Send::new(ID, LEASE, now),
            receive: Receive::new(ID, "prefill", TIMEOUT, now),
            claimed: false,
            connected: true,
            to_prefill: VecDeque::from([ToPrefill::Claim]),
            to_decode: VecDeque::new(),
            pulling: false,
            pushing: false,
            may_push: false,
            prefill_digesting: false,
            decode_digesting: false,
            fencing: false,
            sent: Vec::new(),
            received: Vec::new(),
            vouched_while_held: None,
            copied: false,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::DeliverToPrefill => self.deliver_to_prefill(),
            Step::DeliverToDecode => self.deliver_to_decode(),
            Step::Fetch => self.decode(ReceiveEvent::Fetch { digest: self.digest }),
            Step::Release => self.decode(ReceiveEvent::Release),
            Step::FinishPull { ok } if std::mem::take(&mut self.pulling) => {
                self.copied = ok;
                self.decode(ReceiveEvent::CopyDone(if ok { Ok(()) } else { Err(lost()) }));
            }
            Step::FinishPush { ok } if std::mem::take(&mut self.pushing) => {
                self.copied = ok;
                self.may_push = false;
                self.prefill(SendEvent::CopyDone { result: if ok { Ok(()) } else { Err(lost()) }, fenced: true });
            }
            Step::FinishPrefillDigest if std::mem::take(&mut self.prefill_digesting) => {
                self.prefill(SendEvent::DigestReady(DIGEST));
            }
            Step::FinishDecodeDigest { right } if std::mem::take(&mut self.decode_digesting) => {
                self.decode(ReceiveEvent::DigestReady(if right { DIGEST } else { !DIGEST }));
            }
            Step::AbortPrefill => self.prefill(SendEvent::Abort),
            Step::AbortDecode => self.decode(ReceiveEvent::Abort),
            Step::LoseConnection if self.connected => {
                self.connected = false;
                self.to_prefill.clear();
                self.to_decode.clear();
                if self.claimed {
                    self.prefill(SendEvent::PeerLost(lost()));
                }
                self.decode(ReceiveEvent::PeerLost(lost()));
            }
            Step::Outdate => {
                self.prefill(SendEvent::Outdated(lost()));
                self.decode(ReceiveEvent::Outdated(lost()));
            }
            Step::ShutDownPrefill => self.prefill(SendEvent::ShutDown),
            Step::ShutDownDecode => self.decode(ReceiveEvent::ShutDown),
            Step::Wait(seconds) => {
                self.now += Duration::from_secs(seconds);
                self.prefill(SendEvent::Tick);
                self.decode(ReceiveEvent::Tick);
            }
            _ => {}
        }
    }

    fn deliver_to_prefill(&mut self) {
        let Some(message) = self.to_prefill.pop_front() else { return };
        let over = !self.sent.is_empty();
        // What the driver answers for transfers that it does not hold.
        match message {
            ToPrefill::Place(_) if over => return self.tell_decode(ToDecode::Over(Ending::Failed(lost()), true)),
            ToPrefill::Ended(_) if over => return,
            _ if over => return self.tell_decode(ToDecode::Refused(lost())),
            _ => {}
        }
        let event = match message {
            ToPrefill::Claim => {
                self.claimed = true;
                SendEvent::Claim
            }
            ToPrefill::Landed(digest) => SendEvent::Landed { digest },
            ToPrefill::Place(digest) => SendEvent::Place { digest },
            ToPrefill::Copying => SendEvent::Copying,
            ToPrefill::Accepted => SendEvent::Accepted,
            ToPrefill::Ended(how) => SendEvent::PeerEnded(how),
        };
        self.prefill(event);
    }

    fn deliver_to_decode(&mut self) {
        let Some(message) = self.to_decode.pop_front() else { return };
        self.decode(match message {
            ToDecode::Granted => ReceiveEvent::Granted(self.mode),
            ToDecode::Refused(failure) => ReceiveEvent::Refused(failure),
            ToDecode::Confirmed(digest) => ReceiveEvent::Confirmed { digest },
            ToDecode::Pushed(digest) => ReceiveEvent::Pushed { digest },
            ToDecode::Over(how, fenced) => ReceiveEvent::Over { how, fenced },
            ToDecode::Ended(how) => ReceiveEvent::PeerEnded(how),
        });
    }

    fn tell_prefill(&mut self, message: ToPrefill) {
        if self.connected {
            self.to_prefill.push_back(message);
        }
    }

    fn tell_decode(&mut self, message: ToDecode) {
        if self.connected {
            self.to_decode.push_back(message);
        }
    }

    fn prefill(&mut self, event: SendEvent) {
        if !self.sent.is_empty() {
            return;
        }
        let Ok(actions) = self.send.on(event, self.now) else { return };
        for action in actions {
            assert!(self.sent.is_empty(), "KV-1: the report is the last action");
            match action {
                SendAction::Grant => self.tell_decode(ToDecode::Granted),
                SendAction::Confirm { digest } => {
                    self.vouched_while_held = Some(self.sent.is_empty());
                    self.tell_decode(ToDecode::Confirmed(digest));
                }
                SendAction::TellPushed { digest } => {
                    assert!(!self.pushing, "nothing is pushed before the copy is done");
                    self.vouched_while_held = Some(self.sent.is_empty());
                    self.tell_decode(ToDecode::Pushed(digest));
                }
                SendAction::StartDigest => self.prefill_digesting = true,
                SendAction::StartPush => (self.pushing, self.may_push) = (true, true),
                // The copy goes on until it has noticed.
                SendAction::CancelPush => assert!(self.pushing),
                SendAction::TellOver { how, fenced } => self.tell_decode(ToDecode::Over(how, fenced)),
                SendAction::Refuse(failure) => self.tell_decode(ToDecode::Refused(failure)),
                SendAction::TellEnded(how) => self.tell_decode(ToDecode::Ended(how)),
                SendAction::Report(end) => self.sent.push(end),
            }
        }
    }

    fn decode(&mut self, event: ReceiveEvent) {
        if !self.received.is_empty() {
            return;
        }
        let Ok(actions) = self.receive.on(event, self.now) else { return };
        for action in actions {
            assert!(self.received.is_empty(), "KV-1: the report is the last action");
            match action {
                ReceiveAction::StartCopy { digest } => {
                    if digest {
                        self.tell_prefill(ToPrefill::Copying);
                    }
                    self.pulling = true;
                }
                ReceiveAction::CancelCopy => assert!(self.pulling),
                ReceiveAction::StartDigest => self.decode_digesting = true,
                ReceiveAction::TellLanded { digest } => self.tell_prefill(ToPrefill::Landed(digest)),
                ReceiveAction::TellPlace { digest } => self.tell_prefill(ToPrefill::Place(digest)),
                ReceiveAction::TellAccepted => self.tell_prefill(ToPrefill::Accepted),
                ReceiveAction::TellEnded(how) => self.tell_prefill(ToPrefill::Ended(how)),
                ReceiveAction::Fence => self.fencing = true,
                ReceiveAction::Report(end) => self.received(end),
            }
        }
        // The driver takes the permission back at once where the path can.
        if self.revocable && std::mem::take(&mut self.fencing) {
            self.may_push = false;
            self.decode(ReceiveEvent::Fenced(true));
        }
    }

    fn received(&mut self, end: End) {
        if !matches!(end, End::Failed { fenced: false, .. }) {
            assert!(!self.pulling && !self.may_push, "KV-7: {end:?} reported under a live write");
        }
        if end == End::Received {
            assert!(self.copied, "received without a copy");
            assert_eq!(self.vouched_while_held, Some(true), "KV-3: received without prefill's word");
        }
        self.received.push(end);
    }

    /// Lets everything that was begun come to its end, without further mishap.
    fn settle(&mut self) {
        for round in 0..64 {
            if !self.sent.is_empty() && !self.received.is_empty() {
                return;
            }
            for step in [
                Step::DeliverToPrefill,
                Step::DeliverToDecode,
                Step::FinishPull { ok: true },
                Step::FinishPush { ok: true },
                Step::FinishPrefillDigest,
                Step::FinishDecodeDigest { right: true },
                Step::Fetch,
            ] {
                self.step(step);
            }
            // A dead prefill's process is seen to be gone.
            if self.fencing && !self.connected && !self.pushing {
                self.decode(ReceiveEvent::Fenced(true));
            }
            if round > 8 {
                self.step(Step::Wait(31));
            }
        }
    }
}

fn lost() -> TransferFailure {
    TransferFailure::PeerLost { peer: "peer".to_owned(), why: "simulated".to_owned() }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => Just(Step::DeliverToPrefill),
        8 => Just(Step::DeliverToDecode),
        6 => Just(Step::Fetch),
        1 => Just(Step::Release),
        6 => any::<bool>().prop_map(|ok| Step::FinishPull { ok }),
        6 => any::<bool>().prop_map(|ok| Step::FinishPush { ok }),
        4 => Just(Step::FinishPrefillDigest),
        4 => any::<bool>().prop_map(|right| Step::FinishDecodeDigest { right }),
        1 => Just(Step::AbortPrefill),
        1 => Just(Step::AbortDecode),
        1 => Just(Step::LoseConnection),
        1 => Just(Step::Outdate),
        1 => Just(Step::ShutDownPrefill),
        1 => Just(Step::ShutDownDecode),
        2 => (0..25u64).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn kv_1_each_side_reports_exactly_once_whatever_happens(
        steps in steps(), pull in any::<bool>(), digest in any::<bool>(), revocable in any::<bool>(),
    ) {
        let mut world = World::new(if pull { Mode::Pull } else { Mode::Push }, digest, revocable);
        for step in steps {
            world.step(step);
        }
        world.settle();
        prop_assert_eq!((world.sent.len(), world.received.len()), (1, 1), "sent {:?}, received {:?}, states {} and {}",
            world.sent, world.received, world.send.state(), world.receive.state());
    }
}

#[test]
fn without_mishap_both_sides_end_well() {
    for mode in [Mode::Pull, Mode::Push] {
        for digest in [false, true] {
            let mut world = World::new(mode, digest, true);
            world.settle();
            assert_eq!((world.sent, world.received), (vec![End::Sent], vec![End::Received]), "{mode:?} {digest}");
        }
    }
}
