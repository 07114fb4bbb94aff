//! The machines of one transfer on both sides, with simulated connections and copies, under random interleavings: some
//! runtimes of prefill, each read by all of some runtimes of decode. With concurrent dispatch claims come while the prompt is
//! computed: before, during or after, as chance has it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::{
    Gather, GatherAction, Hold, HoldAction, Mode, OutOfOrder, ReceiveAction, ReceiveEvent, SendAction, SendEvent,
};
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
    /// Concurrent dispatch: the engine has computed the whole prompt.
    EndPrefill,
    DeliverToPrefill,
    DeliverToDecode,
    Fetch,
    Release,
    FinishPull {
        ok: bool,
    },
    FinishPush {
        ok: bool,
    },
    FinishPrefillDigest,
    FinishDecodeDigest {
        right: bool,
    },
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
    Begun,
    Granted,
    Refused(TransferFailure),
    Confirmed(Option<u64>),
    Pushed(Option<u64>),
    Over(Ending, bool),
    Ended(Ending),
}

/// One runtime of prefill, one of decode, and what is between them.
struct Edge {
    prefill: usize,
    decode: usize,
    claimed: bool,
    connected: bool,
    to_prefill: VecDeque<ToPrefill>,
    to_decode: VecDeque<ToDecode>,
    pulling: bool,
    pushing: bool,
    cancelled: bool,
    /// Whether prefill's copy may write into decode's blocks.
    may_push: bool,
    prefill_digesting: bool,
    decode_digesting: bool,
    /// Decode waits to be told that nothing writes any more.
    fencing: bool,
    /// Whether prefill had reported when it gave its word that the blocks were held.
    vouched_while_held: Option<bool>,
    copied: bool,
}

struct World {
    mode: Mode,
    digest: bool,
    /// Whether the path can take back a permission to write (`tcp`), or must ask (`shm`).
    revocable: bool,
    now: Instant,
    prefill: Vec<(Hold, Vec<End>)>,
    decode: Vec<(Gather, Vec<End>)>,
    /// Prefill by prefill, decode by decode.
    edges: Vec<Edge>,
}

impl World {
    /// `begun`: concurrent dispatch, which always pushes.
    fn new(sizes: (usize, usize), mode: Mode, begun: bool, digest: bool, revocable: bool) -> Self {
        let make = if begun { Hold::begun } else { Hold::new };
        let now = Instant::now();
        let edge = |number: usize| Edge {
            prefill: number / sizes.1,
            decode: number % sizes.1,
            claimed: false,
            connected: true,
            to_prefill: VecDeque::from([ToPrefill::Claim]),
            to_decode: VecDeque::new(),
            pulling: false,
            pushing: false,
            cancelled: false,
            may_push: false,
            prefill_digesting: false,
            decode_digesting: false,
            fencing: false,
            vouched_while_held: None,
            copied: false,
        };
        let gather = || Gather::new(ID, &vec!["prefill"; sizes.0], TIMEOUT, now);
        Self {
            mode: if begun { Mode::Push } else { mode },
            digest,
            revocable,
            now,
            prefill: (0..sizes.0).map(|_| (make(ID, LEASE, now), Vec::new())).collect(),
            decode: (0..sizes.1).map(|_| (gather(), Vec::new())).collect(),
            edges: (0..sizes.0 * sizes.1).map(edge).collect(),
        }
    }

    /// `at` picks the edge, or the side.
    fn step(&mut self, step: Step, at: usize) {
        let (prefill, decode) = (at % self.prefill.len(), at % self.decode.len());
        let at = at % self.edges.len();
        let edge = &mut self.edges[at];
        match step {
            Step::EndPrefill if !self.prefill[prefill].0.is_ready() && self.prefill[prefill].1.is_empty() => {
                let actions = self.prefill[prefill].0.ready(self.now);
                self.do_prefill(prefill, actions);
            }
            Step::DeliverToPrefill => self.deliver_to_prefill(at),
            Step::DeliverToDecode => self.deliver_to_decode(at),
            Step::Fetch => self.decode_all(decode, &ReceiveEvent::Fetch { digest: self.digest }),
            Step::Release => self.decode_all(decode, &ReceiveEvent::Release),
            Step::FinishPull { ok } if std::mem::take(&mut edge.pulling) => {
                edge.copied = ok;
                self.decode(at, ReceiveEvent::CopyDone(if ok { Ok(()) } else { Err(lost()) }));
            }
            // The last part comes after the end of prefill; any part may fail before.
            Step::FinishPush { ok: true } if !self.prefill[edge.prefill].0.is_ready() && !edge.cancelled => {}
            Step::FinishPush { ok } if std::mem::take(&mut edge.pushing) => {
                edge.copied = ok;
                edge.may_push = false;
                self.prefill(at, SendEvent::CopyDone { result: if ok { Ok(()) } else { Err(lost()) }, fenced: true });
            }
            Step::FinishPrefillDigest if std::mem::take(&mut edge.prefill_digesting) => {
                self.prefill(at, SendEvent::DigestReady(DIGEST));
            }
            Step::FinishDecodeDigest { right } if std::mem::take(&mut edge.decode_digesting) => {
                self.decode(at, ReceiveEvent::DigestReady(if right { DIGEST } else { !DIGEST }));
            }
            Step::AbortPrefill => self.prefill_all(prefill, &SendEvent::Abort),
            Step::AbortDecode => self.decode_all(decode, &ReceiveEvent::Abort),
            Step::LoseConnection if edge.connected => {
                edge.connected = false;
                edge.to_prefill.clear();
                edge.to_decode.clear();
                if edge.claimed {
                    self.prefill(at, SendEvent::PeerLost(lost()));
                }
                self.decode(at, ReceiveEvent::PeerLost(lost()));
            }
            Step::Outdate => {
                self.prefill_all(prefill, &SendEvent::Outdated(lost()));
                self.decode_all(decode, &ReceiveEvent::Outdated(lost()));
            }
            Step::ShutDownPrefill => self.prefill_all(prefill, &SendEvent::ShutDown),
            Step::ShutDownDecode => self.decode_all(decode, &ReceiveEvent::ShutDown),
            Step::Wait(seconds) => {
                self.now += Duration::from_secs(seconds);
                (0..self.prefill.len()).for_each(|prefill| self.prefill_all(prefill, &SendEvent::Tick));
                (0..self.decode.len()).for_each(|decode| self.decode_all(decode, &ReceiveEvent::Tick));
            }
            _ => {}
        }
    }

    fn deliver_to_prefill(&mut self, at: usize) {
        let edge = &mut self.edges[at];
        let (hold, sent) = &mut self.prefill[edge.prefill];
        let Some(message) = edge.to_prefill.pop_front() else { return };
        let over = !sent.is_empty() || (edge.claimed && !hold.is_unclaimed() && hold.state(edge.decode) == "ended");
        // What the driver answers for transfers that it does not hold.
        match message {
            ToPrefill::Place(_) if over => return self.tell_decode(at, ToDecode::Over(Ending::Failed(lost()), true)),
            ToPrefill::Ended(_) if over => return,
            _ if over => return self.tell_decode(at, ToDecode::Refused(lost())),
            _ => {}
        }
        let event = match message {
            ToPrefill::Claim => {
                if hold.is_unclaimed() {
                    hold.expect_readers(self.decode.len(), self.now);
                }
                if !hold.awaits(edge.decode) {
                    return self.tell_decode(at, ToDecode::Refused(lost()));
                }
                edge.claimed = true;
                SendEvent::Claim
            }
            ToPrefill::Landed(digest) => SendEvent::Landed { digest },
            ToPrefill::Place(digest) => SendEvent::Place { digest },
            ToPrefill::Copying => SendEvent::Copying,
            ToPrefill::Accepted => SendEvent::Accepted,
            ToPrefill::Ended(how) => SendEvent::PeerEnded(how),
        };
        self.prefill(at, event);
    }

    fn deliver_to_decode(&mut self, at: usize) {
        let Some(message) = self.edges[at].to_decode.pop_front() else { return };
        let event = match message {
            ToDecode::Begun => ReceiveEvent::Begun,
            ToDecode::Granted => ReceiveEvent::Granted(self.mode),
            ToDecode::Refused(failure) => ReceiveEvent::Refused(failure),
            ToDecode::Confirmed(digest) => ReceiveEvent::Confirmed { digest },
            ToDecode::Pushed(digest) => ReceiveEvent::Pushed { digest },
            ToDecode::Over(how, fenced) => ReceiveEvent::Over { how, fenced },
            ToDecode::Ended(how) => ReceiveEvent::PeerEnded(how),
        };
        self.decode(at, event);
    }

    fn tell_prefill(&mut self, at: usize, message: ToPrefill) {
        if self.edges[at].connected {
            self.edges[at].to_prefill.push_back(message);
        }
    }

    fn tell_decode(&mut self, at: usize, message: ToDecode) {
        if self.edges[at].connected {
            self.edges[at].to_decode.push_back(message);
        }
    }

    fn prefill(&mut self, at: usize, event: SendEvent) {
        let (prefill, reader) = (self.edges[at].prefill, self.edges[at].decode);
        let (hold, sent) = &mut self.prefill[prefill];
        // Before the first claim there is one reader, nobody.
        let reader = if hold.is_unclaimed() { 0 } else { reader };
        if sent.is_empty()
            && let Ok(actions) = hold.on(reader, event, self.now)
        {
            self.do_prefill(prefill, actions);
        }
    }

    fn prefill_all(&mut self, prefill: usize, event: &SendEvent) {
        if self.prefill[prefill].1.is_empty() {
            let actions = self.prefill[prefill].0.on_all(event, self.now);
            self.do_prefill(prefill, actions);
        }
    }

    fn do_prefill(&mut self, prefill: usize, actions: Vec<HoldAction>) {
        for action in actions {
            assert!(self.prefill[prefill].1.is_empty(), "KV-1: the report is the last action");
            let (reader, action) = match action {
                HoldAction::Reader(reader, action) => (reader, action),
                HoldAction::Report(end) => {
                    let pushes = self.edges.iter().any(|edge| edge.prefill == prefill && edge.pushing);
                    assert!(!pushes, "KV-7: {end:?} reported while blocks are read");
                    self.prefill[prefill].1.push(end);
                    continue;
                }
            };
            let at = prefill * self.decode.len() + reader;
            let edge = &mut self.edges[at];
            match action {
                SendAction::TellBegun => self.tell_decode(at, ToDecode::Begun),
                SendAction::Grant => {
                    assert!(self.prefill[prefill].0.is_ready(), "KV-2: granted before the blocks are held");
                    self.tell_decode(at, ToDecode::Granted);
                }
                SendAction::Confirm { digest } => {
                    edge.vouched_while_held = Some(self.prefill[prefill].1.is_empty());
                    self.tell_decode(at, ToDecode::Confirmed(digest));
                }
                SendAction::TellPushed { digest } => {
                    assert!(!edge.pushing, "nothing is pushed before the copy is done");
                    assert!(self.prefill[prefill].0.is_ready(), "KV-3: vouched for before the prompt was computed");
                    edge.vouched_while_held = Some(self.prefill[prefill].1.is_empty());
                    self.tell_decode(at, ToDecode::Pushed(digest));
                }
                SendAction::StartDigest => edge.prefill_digesting = true,
                SendAction::StartPush => (edge.pushing, edge.may_push) = (true, true),
                // The copy goes on until it has noticed.
                SendAction::CancelPush => {
                    assert!(edge.pushing);
                    edge.cancelled = true;
                }
                SendAction::TellOver { how, fenced } => self.tell_decode(at, ToDecode::Over(how, fenced)),
                SendAction::Refuse(failure) => self.tell_decode(at, ToDecode::Refused(failure)),
                SendAction::TellEnded(how) => self.tell_decode(at, ToDecode::Ended(how)),
                SendAction::Report(end) => panic!("KV-1: a reader's own report got out: {end:?}"),
            }
        }
    }

    fn decode(&mut self, at: usize, event: ReceiveEvent) {
        let (decode, part) = (self.edges[at].decode, self.edges[at].prefill);
        if self.decode[decode].1.is_empty() {
            let actions = self.decode[decode].0.on(part, event, self.now);
            self.do_decode(decode, actions);
        }
    }

    fn decode_all(&mut self, decode: usize, event: &ReceiveEvent) {
        if self.decode[decode].1.is_empty() {
            let actions = self.decode[decode].0.on_all(event, self.now);
            self.do_decode(decode, actions);
        }
    }

    fn do_decode(&mut self, decode: usize, actions: Result<Vec<GatherAction>, OutOfOrder>) {
        for action in actions.unwrap_or_default() {
            assert!(self.decode[decode].1.is_empty(), "KV-1: the report is the last action");
            let (part, action) = match action {
                GatherAction::Part(part, action) => (part, action),
                GatherAction::Report(end) => {
                    self.received(decode, end);
                    continue;
                }
            };
            let at = part * self.decode.len() + decode;
            match action {
                ReceiveAction::StartCopy { digest } => {
                    if digest {
                        self.tell_prefill(at, ToPrefill::Copying);
                    }
                    self.edges[at].pulling = true;
                }
                ReceiveAction::CancelCopy => assert!(self.edges[at].pulling),
                ReceiveAction::StartDigest => self.edges[at].decode_digesting = true,
                ReceiveAction::TellLanded { digest } => self.tell_prefill(at, ToPrefill::Landed(digest)),
                ReceiveAction::TellPlace { digest } => self.tell_prefill(at, ToPrefill::Place(digest)),
                ReceiveAction::TellAccepted => self.tell_prefill(at, ToPrefill::Accepted),
                ReceiveAction::TellEnded(how) => self.tell_prefill(at, ToPrefill::Ended(how)),
                ReceiveAction::Fence => self.edges[at].fencing = true,
                ReceiveAction::Report(end) => panic!("KV-1: a part's own report got out: {end:?}"),
            }
        }
        // The driver takes the permission back at once where the path can.
        for at in 0..self.edges.len() {
            if self.revocable && std::mem::take(&mut self.edges[at].fencing) {
                self.edges[at].may_push = false;
                self.decode(at, ReceiveEvent::Fenced(true));
            }
        }
    }

    fn received(&mut self, decode: usize, end: End) {
        for edge in self.edges.iter().filter(|edge| edge.decode == decode) {
            if !matches!(end, End::Failed { fenced: false, .. }) {
                assert!(!edge.pulling && !edge.may_push, "KV-7: {end:?} reported under a live write");
            }
            if end == End::Received {
                assert!(edge.copied, "received without a copy");
                assert_eq!(edge.vouched_while_held, Some(true), "KV-3: received without prefill's word");
            }
        }
        self.decode[decode].1.push(end);
    }

    fn is_over(&self) -> bool {
        self.prefill.iter().all(|(_, ends)| !ends.is_empty()) && self.decode.iter().all(|(_, ends)| !ends.is_empty())
    }

    /// Lets everything that was begun come to its end, without further mishap.
    fn settle(&mut self) {
        for round in 0..64 {
            for at in 0..self.edges.len() {
                for step in [
                    Step::DeliverToPrefill,
                    Step::DeliverToDecode,
                    Step::EndPrefill,
                    Step::FinishPull { ok: true },
                    Step::FinishPush { ok: true },
                    Step::FinishPrefillDigest,
                    Step::FinishDecodeDigest { right: true },
                    Step::Fetch,
                ] {
                    self.step(step, at);
                }
                // A dead prefill's process is seen to be gone.
                let edge = &self.edges[at];
                if edge.fencing && !edge.connected && !edge.pushing {
                    self.decode(at, ReceiveEvent::Fenced(true));
                }
            }
            if self.is_over() {
                return;
            }
            if round > 8 {
                self.step(Step::Wait(31), 0);
            }
        }
    }

    fn ends(&self) -> (Vec<&[End]>, Vec<&[End]>) {
        let prefill = self.prefill.iter().map(|(_, ends)| ends.as_slice());
        (prefill.collect(), self.decode.iter().map(|(_, ends)| ends.as_slice()).collect())
    }
}

fn lost() -> TransferFailure {
    TransferFailure::PeerLost { peer: "peer".to_owned(), why: "simulated".to_owned() }
}

fn steps() -> impl Strategy<Value = Vec<(Step, usize)>> {
    let step = prop_oneof![
        3 => Just(Step::EndPrefill),
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
    prop::collection::vec((step, 0..4usize), 0..80)
}

const SIZES: [(usize, usize); 4] = [(1, 1), (2, 1), (1, 2), (2, 2)];

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, ..ProptestConfig::default() })]

    #[test]
    fn kv_1_each_side_reports_exactly_once_whatever_happens(
        sizes in prop::sample::select(SIZES.to_vec()), steps in steps(), pull in any::<bool>(), begun in any::<bool>(),
        digest in any::<bool>(), revocable in any::<bool>(),
    ) {
        let mut world = World::new(sizes, if pull { Mode::Pull } else { Mode::Push }, begun, digest, revocable);
        for (step, at) in steps {
            world.step(step, at);
        }
        world.settle();
        let (sent, received) = world.ends();
        prop_assert!(sent.iter().chain(&received).all(|ends| ends.len() == 1), "sent {:?}, received {:?}", sent, received);
    }
}

#[test]
fn without_mishap_both_sides_end_well() {
    for sizes in SIZES {
        for (mode, begun) in [(Mode::Pull, false), (Mode::Push, false), (Mode::Push, true)] {
            for digest in [false, true] {
                let mut world = World::new(sizes, mode, begun, digest, true);
                world.settle();
                let (sent, received) = world.ends();
                assert!(sent.iter().all(|ends| **ends == [End::Sent]), "{sizes:?} {mode:?} {begun} {digest}: {sent:?}");
                assert!(received.iter().all(|ends| **ends == [End::Received]), "{sizes:?} {mode:?} {begun} {digest}");
            }
        }
    }
}
