//! Decode's side of one transfer.

use std::time::{Duration, Instant};

use super::{Mode, OutOfOrder};
use crate::control::TransferId;
use crate::kv::messages::Ending;
use crate::kv::{End, TransferFailure};
use crate::telemetry::Side;

/// What happens to an expected transfer.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kv) enum ReceiveEvent {
    /// Concurrent dispatch: prefill computes it, and will push it into the blocks that are named; a grant follows.
    Begun,
    Granted(Mode),
    Refused(TransferFailure),
    /// The engine has blocks for it.
    Fetch {
        digest: bool,
    },
    /// Nothing to load.
    Release,
    /// Pull: our copy has ended; no write of it lands any more.
    CopyDone(Result<(), TransferFailure>),
    DigestReady(u64),
    Confirmed {
        digest: Option<u64>,
    },
    Pushed {
        digest: Option<u64>,
    },
    /// Push: prefill stopped. Whether writes may still land is for the driver to find out.
    Over {
        how: Ending,
        fenced: bool,
    },
    /// Push: no write of prefill's can land any more (`true`), or nobody can tell (`false`).
    Fenced(bool),
    PeerEnded(Ending),
    PeerLost(TransferFailure),
    Abort,
    Outdated(TransferFailure),
    ShutDown,
    Tick,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kv) enum ReceiveAction {
    StartCopy {
        digest: bool,
    },
    CancelCopy,
    StartDigest,
    TellLanded {
        digest: Option<u64>,
    },
    TellPlace {
        digest: bool,
    },
    TellAccepted,
    TellEnded(Ending),
    /// Push: make sure that no write of prefill's lands any more, and say so by [`ReceiveEvent::Fenced`].
    Fence,
    /// The last action (KV-1).
    Report(End),
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    /// `fetch`: the engine's blocks are there already, and whether a digest is wanted.
    Claiming {
        fetch: Option<bool>,
    },
    Ready(Mode),
    Copying {
        digest: bool,
    },
    Digesting,
    Confirming {
        ours: Option<u64>,
    },
    Placed {
        digest: bool,
    },
    /// Push: written, waiting for our own digest.
    Checking {
        theirs: u64,
    },
    /// Something may still write into our blocks. `tell` decode's reason to prefill when it cannot any more.
    Stopping {
        end: End,
        tell: Option<Ending>,
    },
    Ended,
}

/// One expected transfer.
#[derive(Debug)]
pub(in crate::kv) struct Receive {
    transfer_id: TransferId,
    peer: String,
    timeout: Duration,
    /// None while only the engine can make it go on.
    deadline: Option<Instant>,
    /// Whether prefill is still at work: how long that takes is not ours to bound.
    is_begun: bool,
    state: State,
}

type Actions = Vec<ReceiveAction>;

impl Receive {
    /// `timeout` bounds each part in which we wait for the peer or for bytes.
    pub(in crate::kv) fn new(transfer_id: TransferId, peer: &str, timeout: Duration, now: Instant) -> Self {
        let state = State::Claiming { fetch: None };
        Self { transfer_id, peer: peer.to_owned(), timeout, deadline: Some(now + timeout), is_begun: false, state }
    }

    pub(in crate::kv) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Whether prefill holds blocks for it, so that the lease is to be renewed.
    pub(in crate::kv) fn holds_lease(&self) -> bool {
        !matches!(self.state, State::Stopping { .. } | State::Ended)
    }

    pub(in crate::kv) fn state(&self) -> &'static str {
        match self.state {
            State::Claiming { .. } => "claiming",
            State::Ready(_) => "ready",
            State::Copying { .. } => "copying",
            State::Digesting => "digesting",
            State::Confirming { .. } => "confirming",
            State::Placed { .. } => "placed",
            State::Checking { .. } => "checking",
            State::Stopping { .. } => "stopping",
            State::Ended => "ended",
        }
    }

    /// Takes one event.
    pub(in crate::kv) fn on(&mut self, event: ReceiveEvent, now: Instant) -> Result<Actions, OutOfOrder> {
        use ReceiveEvent as E;
        match event {
            E::Tick if self.deadline.is_some_and(|deadline| now >= deadline) => Ok(self.time_out(now)),
            E::Tick => Ok(vec![]),
            E::Release => Ok(self.stop(End::Released, Some(Ending::Released), now)),
            E::Abort => Ok(self.stop(End::Aborted, Some(Ending::Aborted), now)),
            E::Refused(failure) | E::PeerLost(failure) => Ok(self.stop(failed(failure), None, now)),
            E::Outdated(failure) => Ok(self.stop(failed(failure.clone()), Some(Ending::Failed(failure)), now)),
            E::ShutDown => {
                let failure = TransferFailure::ShutDown { side: Side::Decode };
                Ok(self.stop(failed(failure.clone()), Some(Ending::Failed(failure)), now))
            }
            E::PeerEnded(how) => Ok(self.stop(self.end_of(how), None, now)),
            E::Over { how, fenced } => self.over(how, fenced, now),
            E::Fenced(fenced) => Ok(self.fenced(fenced)),
            E::CopyDone(result) => self.copy_done(result, now),
            E::DigestReady(ours) => Ok(self.digest_ready(ours)),
            E::Begun | E::Granted(_) | E::Fetch { .. } | E::Confirmed { .. } | E::Pushed { .. } => {
                self.proceed(event, now)
            }
        }
    }

    fn proceed(&mut self, event: ReceiveEvent, now: Instant) -> Result<Actions, OutOfOrder> {
        use ReceiveEvent as E;
        match (&self.state, event) {
            (State::Claiming { fetch }, E::Begun) => {
                let fetch = *fetch;
                (self.is_begun, self.deadline) = (true, None);
                self.state = State::Ready(Mode::Push);
                Ok(fetch.map_or_else(Vec::new, |digest| self.start(Mode::Push, digest)))
            }
            (State::Ready(_) | State::Placed { .. }, E::Granted(_)) if self.is_begun => {
                self.is_begun = false;
                self.deadline = matches!(self.state, State::Placed { .. }).then(|| now + self.timeout);
                Ok(vec![])
            }
            // On its way while we stopped.
            (State::Stopping { .. }, E::Granted(_)) if self.is_begun => Ok(vec![]),
            (State::Claiming { fetch: None }, E::Granted(mode)) => {
                self.state = State::Ready(mode);
                self.deadline = None;
                Ok(vec![])
            }
            (State::Claiming { fetch: Some(digest) }, E::Granted(mode)) => {
                let digest = *digest;
                Ok(self.start(mode, digest))
            }
            (State::Claiming { fetch: None }, E::Fetch { digest }) => {
                self.state = State::Claiming { fetch: Some(digest) };
                self.deadline = Some(now + self.timeout);
                Ok(vec![])
            }
            (State::Ready(mode), E::Fetch { digest }) => {
                let mode = *mode;
                self.deadline = (!self.is_begun).then(|| now + self.timeout);
                Ok(self.start(mode, digest))
            }
            (State::Confirming { ours }, E::Confirmed { digest }) => match (*ours, digest) {
                (Some(ours), Some(theirs)) => Ok(self.compare(ours, theirs, false)),
                // A digest was asked for and not given: prefill did not do its part.
                (Some(ours), None) => Ok(self.compare(ours, !ours, false)),
                (None, _) => Ok(self.received(false)),
            },
            (State::Placed { .. }, E::Pushed { .. }) if self.is_begun => {
                Err(OutOfOrder { state: "placed, not granted", event: "pushed" })
            }
            (State::Placed { digest: false }, E::Pushed { .. }) => Ok(self.received(true)),
            (State::Placed { digest: true }, E::Pushed { digest: Some(theirs) }) => {
                self.state = State::Checking { theirs };
                Ok(vec![ReceiveAction::StartDigest])
            }
            // Written in full, and in time, but reported too late: it could not be un-stopped without telling two ends.
            (State::Stopping { .. }, E::Pushed { .. }) => Ok(self.fenced(true)),
            (_, event) => Err(OutOfOrder { state: self.state(), event: event.name() }),
        }
    }

    fn start(&mut self, mode: Mode, digest: bool) -> Actions {
        match mode {
            Mode::Pull => {
                self.state = State::Copying { digest };
                vec![ReceiveAction::StartCopy { digest }]
            }
            Mode::Push => {
                self.state = State::Placed { digest };
                vec![ReceiveAction::TellPlace { digest }]
            }
        }
    }

    fn copy_done(&mut self, result: Result<(), TransferFailure>, now: Instant) -> Result<Actions, OutOfOrder> {
        match (&self.state, result) {
            (State::Copying { digest: false }, Ok(())) => {
                self.state = State::Confirming { ours: None };
                Ok(vec![ReceiveAction::TellLanded { digest: None }])
            }
            (State::Copying { digest: true }, Ok(())) => {
                self.state = State::Digesting;
                Ok(vec![ReceiveAction::StartDigest])
            }
            (State::Copying { .. }, Err(failure)) => {
                // Over already: there is nothing left to fence.
                self.state = State::Confirming { ours: None };
                Ok(self.stop(failed(failure.clone()), Some(Ending::Failed(failure)), now))
            }
            (State::Stopping { .. }, _) => Ok(self.fenced(true)),
            _ => Err(OutOfOrder { state: self.state(), event: "copy done" }),
        }
    }

    fn digest_ready(&mut self, ours: u64) -> Actions {
        match self.state {
            State::Digesting => {
                self.state = State::Confirming { ours: Some(ours) };
                vec![ReceiveAction::TellLanded { digest: Some(ours) }]
            }
            State::Checking { theirs } => self.compare(ours, theirs, true),
            _ => vec![],
        }
    }

    /// KV-4. `pushed`: prefill still waits for our word.
    fn compare(&mut self, ours: u64, theirs: u64, pushed: bool) -> Actions {
        if ours == theirs {
            return self.received(pushed);
        }
        let failure = TransferFailure::DigestMismatch { transfer_id: self.transfer_id, prefill: theirs, decode: ours };
        let tell = pushed.then(|| ReceiveAction::TellEnded(Ending::Failed(failure.clone())));
        self.end(tell, failed(failure))
    }

    fn received(&mut self, pushed: bool) -> Actions {
        self.end(pushed.then_some(ReceiveAction::TellAccepted), End::Received)
    }

    /// Push: prefill has stopped.
    fn over(&mut self, how: Ending, fenced: bool, now: Instant) -> Result<Actions, OutOfOrder> {
        match self.state {
            State::Placed { .. } if fenced => {
                let end = self.end_of(how);
                Ok(self.end(None, end))
            }
            State::Placed { .. } => Ok(self.stop(self.end_of(how), None, now)),
            State::Stopping { .. } if fenced => Ok(self.fenced(true)),
            State::Stopping { .. } => Ok(vec![]),
            // All was written; prefill just does not wait for our word any more.
            State::Checking { .. } => Ok(self.stop(self.end_of(how), None, now)),
            _ => Err(OutOfOrder { state: self.state(), event: "over" }),
        }
    }

    fn fenced(&mut self, fenced: bool) -> Actions {
        let State::Stopping { end, tell } = std::mem::replace(&mut self.state, State::Ended) else { return vec![] };
        let end = match end {
            End::Failed { failure, .. } => End::Failed { failure, fenced },
            end if fenced => end,
            // An end that promises freed blocks would be a lie.
            _ => End::Failed { failure: self.timed_out("stopping"), fenced },
        };
        self.end(tell.map(ReceiveAction::TellEnded), end)
    }

    fn time_out(&mut self, now: Instant) -> Actions {
        if matches!(self.state, State::Stopping { .. }) {
            return self.fenced(false);
        }
        let failure = self.timed_out(self.state());
        self.stop(failed(failure.clone()), Some(Ending::Failed(failure)), now)
    }

    /// Ends at once, or when nothing can write into our blocks any more (KV-7).
    fn stop(&mut self, end: End, tell: Option<Ending>, now: Instant) -> Actions {
        match self.state {
            State::Copying { .. } => {
                // Our own copy always completes (TR-1), so this needs no deadline.
                self.deadline = None;
                self.state = State::Stopping { end, tell };
                vec![ReceiveAction::CancelCopy]
            }
            State::Placed { .. } => {
                self.deadline = Some(now + self.timeout);
                // Prefill is told at once: it is the one that writes.
                self.state = State::Stopping { end, tell: None };
                tell.map(ReceiveAction::TellEnded).into_iter().chain([ReceiveAction::Fence]).collect()
            }
            State::Stopping { .. } | State::Ended => vec![],
            State::Claiming { .. }
            | State::Ready(_)
            | State::Digesting
            | State::Confirming { .. }
            | State::Checking { .. } => self.end(tell.map(ReceiveAction::TellEnded), end),
        }
    }

    fn end(&mut self, tell: Option<ReceiveAction>, end: End) -> Actions {
        self.state = State::Ended;
        self.deadline = None;
        tell.into_iter().chain([ReceiveAction::Report(end)]).collect()
    }

    fn end_of(&self, how: Ending) -> End {
        match how {
            Ending::Aborted => End::Aborted,
            Ending::Failed(failure) => failed(failure),
            // Prefill has no such end for us; the KV is gone all the same.
            Ending::Released => {
                failed(TransferFailure::Unknown { peer: self.peer.clone(), transfer_id: self.transfer_id })
            }
        }
    }

    fn timed_out(&self, state: &str) -> TransferFailure {
        let (peer, transfer_id) = (self.peer.clone(), self.transfer_id);
        TransferFailure::TimedOut { peer, transfer_id, state: state.to_owned() }
    }
}

impl ReceiveEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Begun => "begun",
            Self::Granted(_) => "granted",
            Self::Refused(_) => "refused",
            Self::Fetch { .. } => "fetch",
            Self::Release => "release",
            Self::CopyDone(_) => "copy done",
            Self::DigestReady(_) => "digest ready",
            Self::Confirmed { .. } => "confirmed",
            Self::Pushed { .. } => "pushed",
            Self::Over { .. } => "over",
            Self::Fenced(_) => "fenced",
            Self::PeerEnded(_) => "peer ended",
            Self::PeerLost(_) => "peer lost",
            Self::Abort => "abort",
            Self::Outdated(_) => "outdated",
            Self::ShutDown => "shut down",
            Self::Tick => "tick",
        }
    }
}

fn failed(failure: TransferFailure) -> End {
    End::Failed { failure, fenced: true }
}

#[cfg(test)]
mod tests {
    use ReceiveAction as A;
    use ReceiveEvent as E;

    use super::*;

    /// Its name, events by their second, and what the last of them gives.
    type Case = (&'static str, Vec<(u64, E)>, Result<Actions, OutOfOrder>);

    const ID: TransferId = TransferId([1; 16]);
    const TIMEOUT: Duration = Duration::from_secs(20);

    fn lost() -> TransferFailure {
        TransferFailure::PeerLost { peer: "prefill".to_owned(), why: "test".to_owned() }
    }

    fn timed_out(state: &str) -> TransferFailure {
        TransferFailure::TimedOut { peer: "prefill".to_owned(), transfer_id: ID, state: state.to_owned() }
    }

    fn run(events: &[(u64, E)]) -> Result<Actions, OutOfOrder> {
        let start = Instant::now();
        let mut machine = Receive::new(ID, "prefill", TIMEOUT, start);
        let mut last = Ok(vec![]);
        for (second, event) in events {
            last = machine.on(event.clone(), start + Duration::from_secs(*second));
        }
        last
    }

    #[test]
    fn a_transfer_takes_events_in_protocol_order_only() {
        let mismatch = TransferFailure::DigestMismatch { transfer_id: ID, prefill: 6, decode: 5 };
        let granted = || (0, E::Granted(Mode::Pull));
        let pushing = || (0, E::Granted(Mode::Push));
        let fetch = |digest| (1, E::Fetch { digest });
        let copied = || (2, E::CopyDone(Ok(())));
        let cases: Vec<Case> = vec![
            ("granted, then blocks", vec![granted(), fetch(false)], Ok(vec![A::StartCopy { digest: false }])),
            ("blocks, then granted", vec![fetch(true), granted()], Ok(vec![A::StartCopy { digest: true }])),
            ("copied", vec![granted(), fetch(false), copied()], Ok(vec![A::TellLanded { digest: None }])),
            (
                "KV-3 received only once confirmed",
                vec![granted(), fetch(false), copied(), (3, E::Confirmed { digest: None })],
                Ok(vec![A::Report(End::Received)]),
            ),
            (
                "KV-3 confirmed before the copy is done",
                vec![granted(), fetch(false), (2, E::Confirmed { digest: None })],
                Err(OutOfOrder { state: "copying", event: "confirmed" }),
            ),
            (
                "KV-3 late: refused after the copy",
                vec![granted(), fetch(false), copied(), (3, E::Refused(lost()))],
                Ok(vec![A::Report(failed(lost()))]),
            ),
            (
                "KV-4 digest first",
                vec![granted(), fetch(true), copied(), (3, E::DigestReady(5))],
                Ok(vec![A::TellLanded { digest: Some(5) }]),
            ),
            (
                "KV-4 digests differ",
                vec![granted(), fetch(true), copied(), (3, E::DigestReady(5)), (4, E::Confirmed { digest: Some(6) })],
                Ok(vec![A::Report(failed(mismatch.clone()))]),
            ),
            ("push", vec![pushing(), fetch(false)], Ok(vec![A::TellPlace { digest: false }])),
            (
                "push received",
                vec![pushing(), fetch(false), (2, E::Pushed { digest: None })],
                Ok(vec![A::TellAccepted, A::Report(End::Received)]),
            ),
            (
                "KV-4 push, digests differ",
                vec![pushing(), fetch(true), (2, E::Pushed { digest: Some(6) }), (3, E::DigestReady(5))],
                Ok(vec![A::TellEnded(Ending::Failed(mismatch.clone())), A::Report(failed(mismatch))]),
            ),
            (
                "KV-4 push without the digest that was asked for",
                vec![pushing(), fetch(true), (2, E::Pushed { digest: None })],
                Err(OutOfOrder { state: "placed", event: "pushed" }),
            ),
            (
                "KV-7 pull aborted: the copy first",
                vec![granted(), fetch(false), (2, E::Abort)],
                Ok(vec![A::CancelCopy]),
            ),
            (
                "KV-7 pull aborted: then the report",
                vec![granted(), fetch(false), (2, E::Abort), copied()],
                Ok(vec![A::TellEnded(Ending::Aborted), A::Report(End::Aborted)]),
            ),
            (
                "KV-7 push aborted: prefill is told and asked",
                vec![pushing(), fetch(false), (2, E::Abort)],
                Ok(vec![A::TellEnded(Ending::Aborted), A::Fence]),
            ),
            (
                "KV-7 push aborted: reported when it is over there",
                vec![pushing(), fetch(false), (2, E::Abort), (3, E::Over { how: Ending::Aborted, fenced: true })],
                Ok(vec![A::Report(End::Aborted)]),
            ),
            (
                "KV-7 push failed without a fence: decode makes its own",
                vec![pushing(), fetch(false), (2, E::Over { how: Ending::Failed(lost()), fenced: false })],
                Ok(vec![A::Fence]),
            ),
            (
                "KV-7 push, prefill dead",
                vec![pushing(), fetch(false), (2, E::PeerLost(lost())), (3, E::Fenced(true))],
                Ok(vec![A::Report(failed(lost()))]),
            ),
            (
                "KV-7 push, nobody can tell: said so",
                vec![pushing(), fetch(false), (2, E::PeerLost(lost())), (22, E::Tick)],
                Ok(vec![A::Report(End::Failed { failure: lost(), fenced: false })]),
            ),
            (
                "KV-7 an abort that could not be fenced is no clean abort",
                vec![pushing(), fetch(false), (2, E::Abort), (22, E::Tick)],
                Ok(vec![A::Report(End::Failed { failure: timed_out("stopping"), fenced: false })]),
            ),
            (
                "KV-8 prefill lost while waiting for blocks",
                vec![granted(), (9, E::PeerLost(lost()))],
                Ok(vec![A::Report(failed(lost()))]),
            ),
            ("no answer to the claim", vec![(20, E::Tick)], {
                let failure = timed_out("claiming");
                Ok(vec![A::TellEnded(Ending::Failed(failure.clone())), A::Report(failed(failure))])
            }),
            ("KV-2 a request may wait for blocks as long as it likes", vec![granted(), (1000, E::Tick)], Ok(vec![])),
            ("a slow copy is stopped", vec![granted(), fetch(false), (21, E::Tick)], Ok(vec![A::CancelCopy])),
            (
                "all cached here",
                vec![granted(), (1, E::Release)],
                Ok(vec![A::TellEnded(Ending::Released), A::Report(End::Released)]),
            ),
            (
                "KV-9 aborted before the answer to the claim",
                vec![(0, E::Abort)],
                Ok(vec![A::TellEnded(Ending::Aborted), A::Report(End::Aborted)]),
            ),
            (
                "prefill's side was aborted",
                vec![granted(), (1, E::PeerEnded(Ending::Aborted))],
                Ok(vec![A::Report(End::Aborted)]),
            ),
            ("KV-1 nothing after the end", vec![(0, E::Abort), (1, E::Abort), (2, E::PeerLost(lost()))], Ok(vec![])),
            (
                "KV-5 other weights meanwhile",
                vec![granted(), (1, E::Outdated(lost()))],
                Ok(vec![A::TellEnded(Ending::Failed(lost())), A::Report(failed(lost()))]),
            ),
            (
                "fetched twice",
                vec![granted(), fetch(false), fetch(false)],
                Err(OutOfOrder { state: "copying", event: "fetch" }),
            ),
        ];
        for (name, events, want) in cases {
            assert_eq!(run(&events), want, "case: {name}");
        }
    }

    #[test]
    fn a_claim_may_come_before_the_kv_is_computed() {
        let begun = || (1, E::Begun);
        let (placed, granted) = (vec![begun(), (2, E::Fetch { digest: false })], (90, E::Granted(Mode::Push)));
        let then = |more: &[(u64, E)]| [&placed, more].concat();
        let pushed = |second| (second, E::Pushed { digest: None });
        let cases: Vec<Case> = vec![
            (
                "blocks before the answer",
                vec![placed[1].clone(), (3, E::Begun)],
                Ok(vec![A::TellPlace { digest: false }]),
            ),
            ("prefill may take as long as it likes", then(&[(1000, E::Tick)]), Ok(vec![])),
            ("the rest may not", then(&[granted.clone(), (110, E::Tick)]), {
                Ok(vec![A::TellEnded(Ending::Failed(timed_out("placed"))), A::Fence])
            }),
            (
                "granted before there were blocks",
                vec![begun(), (2, E::Granted(Mode::Push)), (50, E::Fetch { digest: true })],
                Ok(vec![A::TellPlace { digest: true }]),
            ),
            ("received", then(&[granted.clone(), pushed(91)]), Ok(vec![A::TellAccepted, A::Report(End::Received)])),
            ("KV-3 not without the grant", then(&[pushed(3)]), {
                Err(OutOfOrder { state: "placed, not granted", event: "pushed" })
            }),
            ("KV-7 a grant that crosses our abort", then(&[(3, E::Abort), granted]), Ok(vec![])),
        ];
        for (name, events, want) in cases {
            assert_eq!(run(&events), want, "case: {name}");
        }
    }
}
