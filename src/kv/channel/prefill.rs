//! Prefill's side of one transfer.

use std::time::{Duration, Instant};

use super::OutOfOrder;
use crate::control::TransferId;
use crate::kv::messages::Ending;
use crate::kv::{End, TransferFailure};
use crate::telemetry::Side;

/// What happens to an offered transfer.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kv) enum SendEvent {
    /// Concurrent dispatch: prefill has ended; its blocks are complete, and held from now on.
    Ready,
    /// Decode claims it; the driver has held the claim against the offer.
    Claim,
    Renew,
    /// Pull: decode has begun to copy, and will want a digest.
    Copying,
    /// Pull: decode has copied everything.
    Landed {
        digest: Option<u64>,
    },
    /// Push: decode has named its blocks.
    Place {
        digest: bool,
    },
    /// Push: our copy has ended, with all parts of it; well, only after [`SendEvent::Ready`]. No write of it lands any more,
    /// unless `fenced` is false.
    CopyDone {
        result: Result<(), TransferFailure>,
        fenced: bool,
    },
    DigestReady(u64),
    Accepted,
    PeerEnded(Ending),
    PeerLost(TransferFailure),
    Abort,
    /// The blocks are of weights that are no longer served (KV-5).
    Outdated(TransferFailure),
    ShutDown,
    /// Time has passed.
    Tick,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kv) enum SendAction {
    /// Concurrent dispatch: the KV is being computed. Decode may name its blocks.
    TellBegun,
    Grant,
    Confirm {
        digest: Option<u64>,
    },
    StartDigest,
    StartPush,
    CancelPush,
    TellPushed {
        digest: Option<u64>,
    },
    /// Push: nothing more will be written.
    TellOver {
        how: Ending,
        fenced: bool,
    },
    Refuse(TransferFailure),
    TellEnded(Ending),
    /// The last action (KV-1).
    Report(End),
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    Offered,
    Granted {
        ours: Option<u64>,
        digesting: bool,
    },
    /// Pull: landed, waiting for our own digest.
    Checking {
        theirs: u64,
    },
    Pushing {
        copied: bool,
        wanted: bool,
        ours: Option<u64>,
    },
    Pushed,
    /// Push: our copy is being cancelled; then this end is reported.
    Stopping {
        end: End,
        tell: Option<Ending>,
    },
    Ended,
}

/// One offered transfer.
#[derive(Debug)]
pub(in crate::kv) struct Send {
    transfer_id: TransferId,
    lease: Duration,
    lease_until: Instant,
    /// Whether prefill has ended. Until then nothing is held, so there is no lease: the engine looks after the request.
    is_ready: bool,
    state: State,
}

type Actions = Vec<SendAction>;

impl Send {
    pub(in crate::kv) fn new(transfer_id: TransferId, lease: Duration, now: Instant) -> Self {
        Self { transfer_id, lease, lease_until: now + lease, is_ready: true, state: State::Offered }
    }

    /// One that prefill has only begun to compute.
    pub(in crate::kv) fn begun(transfer_id: TransferId, lease: Duration, now: Instant) -> Self {
        Self { is_ready: false, ..Self::new(transfer_id, lease, now) }
    }

    /// Whether a decode worker may still claim it.
    pub(in crate::kv) fn is_unclaimed(&self) -> bool {
        self.state == State::Offered
    }

    /// When to send the next [`SendEvent::Tick`]. While our own threads read the blocks there is none: they end by
    /// themselves, within bounds.
    pub(in crate::kv) fn deadline(&self) -> Option<Instant> {
        match self.state {
            _ if !self.is_ready => None,
            State::Offered | State::Granted { .. } | State::Pushing { .. } | State::Pushed => Some(self.lease_until),
            State::Checking { .. } | State::Stopping { .. } | State::Ended => None,
        }
    }

    /// The state's name, for refusals and logs.
    pub(in crate::kv) fn state(&self) -> &'static str {
        match self.state {
            State::Offered => "offered",
            State::Granted { .. } => "granted",
            State::Checking { .. } => "checking",
            State::Pushing { .. } => "pushing",
            State::Pushed => "pushed",
            State::Stopping { .. } => "stopping",
            State::Ended => "ended",
        }
    }

    /// Takes one event.
    pub(in crate::kv) fn on(&mut self, event: SendEvent, now: Instant) -> Result<Actions, OutOfOrder> {
        use SendEvent as E;
        match event {
            E::Tick if self.deadline().is_some_and(|deadline| now >= deadline) => Ok(self.expire()),
            E::Tick => Ok(vec![]),
            E::Renew => {
                self.lease_until = now + self.lease;
                Ok(vec![])
            }
            E::Abort => Ok(self.stop(End::Aborted, Some(Ending::Aborted))),
            E::PeerLost(failure) => Ok(self.stop(failed(failure), None)),
            E::Outdated(failure) => Ok(self.stop(failed(failure.clone()), Some(Ending::Failed(failure)))),
            E::ShutDown => {
                let failure = TransferFailure::ShutDown { side: Side::Prefill };
                Ok(self.stop(failed(failure.clone()), Some(Ending::Failed(failure))))
            }
            E::PeerEnded(how) => Ok(self.peer_ended(how)),
            E::Ready => Ok(self.ready(now)),
            E::Claim | E::Copying | E::Landed { .. } | E::Place { .. } | E::Accepted => self.hear(event, now),
            E::CopyDone { result, fenced } => self.copy_done(result, fenced),
            E::DigestReady(ours) => Ok(self.digest_ready(ours)),
        }
    }

    /// The lease begins. Whoever has claimed already gets the grant now.
    fn ready(&mut self, now: Instant) -> Actions {
        self.is_ready = true;
        self.lease_until = now + self.lease;
        match self.state {
            State::Granted { .. } => vec![SendAction::Grant],
            State::Pushing { wanted: true, .. } => vec![SendAction::Grant, SendAction::StartDigest],
            State::Pushing { .. } => vec![SendAction::Grant],
            _ => vec![],
        }
    }

    /// What decode says in the course of a transfer that goes well.
    fn hear(&mut self, event: SendEvent, now: Instant) -> Result<Actions, OutOfOrder> {
        use SendEvent as E;
        let (state, actions) = match (&self.state, event) {
            (_, event @ (E::Copying | E::Landed { .. })) if !self.is_ready => {
                return Err(OutOfOrder { state: "begun", event: event.name() });
            }
            (State::Offered, E::Claim) => {
                self.lease_until = now + self.lease;
                let answer = if self.is_ready { SendAction::Grant } else { SendAction::TellBegun };
                (State::Granted { ours: None, digesting: false }, vec![answer])
            }
            (State::Granted { ours, digesting: false }, E::Copying) => {
                (State::Granted { ours: *ours, digesting: true }, vec![SendAction::StartDigest])
            }
            (State::Granted { .. }, E::Landed { digest: None }) => {
                (State::Ended, vec![SendAction::Confirm { digest: None }, SendAction::Report(End::Sent)])
            }
            (State::Granted { ours: Some(ours), .. }, E::Landed { digest: Some(theirs) }) => {
                let ours = *ours;
                return Ok(self.compare(ours, theirs));
            }
            (State::Granted { digesting, .. }, E::Landed { digest: Some(theirs) }) => {
                let start = if *digesting { vec![] } else { vec![SendAction::StartDigest] };
                (State::Checking { theirs }, start)
            }
            (State::Granted { .. }, E::Place { digest }) => {
                let mut actions = vec![SendAction::StartPush];
                if digest && self.is_ready {
                    actions.push(SendAction::StartDigest);
                }
                (State::Pushing { copied: false, wanted: digest, ours: None }, actions)
            }
            (State::Pushed, E::Accepted) => (State::Ended, vec![SendAction::Report(End::Sent)]),
            (_, event) => return Err(OutOfOrder { state: self.state(), event: event.name() }),
        };
        self.state = state;
        Ok(actions)
    }

    fn copy_done(&mut self, result: Result<(), TransferFailure>, fenced: bool) -> Result<Actions, OutOfOrder> {
        match (&mut self.state, result) {
            (State::Pushing { .. }, Ok(())) if !self.is_ready => Err(OutOfOrder { state: "begun", event: "copy done" }),
            (State::Pushing { copied, .. }, Ok(())) => {
                *copied = true;
                Ok(self.pushed())
            }
            (State::Pushing { .. }, Err(failure)) => {
                self.state = State::Ended;
                let over = SendAction::TellOver { how: Ending::Failed(failure.clone()), fenced };
                Ok(vec![over, SendAction::Report(failed(failure))])
            }
            (State::Stopping { end, tell }, _) => {
                let over = tell.take().map(|how| SendAction::TellOver { how, fenced });
                let report = SendAction::Report(end.clone());
                self.state = State::Ended;
                Ok(over.into_iter().chain([report]).collect())
            }
            _ => Err(OutOfOrder { state: self.state(), event: "copy done" }),
        }
    }

    fn digest_ready(&mut self, digest: u64) -> Actions {
        match &mut self.state {
            State::Granted { ours, .. } => {
                *ours = Some(digest);
                vec![]
            }
            State::Pushing { ours, .. } => {
                *ours = Some(digest);
                self.pushed()
            }
            State::Checking { theirs } => {
                let theirs = *theirs;
                self.compare(digest, theirs)
            }
            // The transfer went another way meanwhile.
            State::Offered | State::Pushed | State::Stopping { .. } | State::Ended => vec![],
        }
    }

    /// Push: once the copy is done, and the digest if one is wanted.
    fn pushed(&mut self) -> Actions {
        match self.state {
            State::Pushing { copied: true, wanted, ours } if !wanted || ours.is_some() => {
                self.state = State::Pushed;
                vec![SendAction::TellPushed { digest: ours }]
            }
            _ => vec![],
        }
    }

    /// KV-4, on this side too: so that both records say the same.
    fn compare(&mut self, ours: u64, theirs: u64) -> Actions {
        self.state = State::Ended;
        if ours == theirs {
            return vec![SendAction::Confirm { digest: Some(ours) }, SendAction::Report(End::Sent)];
        }
        let failure = TransferFailure::DigestMismatch { transfer_id: self.transfer_id, prefill: ours, decode: theirs };
        vec![SendAction::Refuse(failure.clone()), SendAction::Report(failed(failure))]
    }

    fn expire(&mut self) -> Actions {
        let failure = TransferFailure::Expired { peer: "prefill".to_owned(), transfer_id: self.transfer_id };
        let tell = (self.state != State::Offered).then_some(Ending::Failed(failure));
        self.stop(End::Expired, tell)
    }

    fn peer_ended(&mut self, how: Ending) -> Actions {
        let end = match &how {
            Ending::Released => End::Released,
            Ending::Aborted => End::Aborted,
            Ending::Failed(failure) => failed(failure.clone()),
        };
        // Decode waits for our word only where our copy may still write into its blocks (KV-7).
        let tell = matches!(self.state, State::Pushing { .. }).then_some(how);
        self.stop(end, tell)
    }

    /// Ends at once, or after our copy has (KV-7).
    fn stop(&mut self, end: End, tell: Option<Ending>) -> Actions {
        match &mut self.state {
            State::Pushing { copied: false, .. } => {
                self.state = State::Stopping { end, tell };
                vec![SendAction::CancelPush]
            }
            // The first reason stands; but decode may ask for our word only now.
            State::Stopping { tell: told, .. } => {
                if told.is_none() {
                    *told = tell;
                }
                vec![]
            }
            State::Ended => vec![],
            state => {
                // All is written already, so decode is told that nothing more comes, and need not ask.
                let pushing = matches!(state, State::Pushing { .. } | State::Pushed);
                let unclaimed = *state == State::Offered;
                self.state = State::Ended;
                let tell = tell.filter(|_| !unclaimed).map(|how| {
                    if pushing { SendAction::TellOver { how, fenced: true } } else { SendAction::TellEnded(how) }
                });
                tell.into_iter().chain([SendAction::Report(end)]).collect()
            }
        }
    }
}

impl SendEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Claim => "claim",
            Self::Renew => "renew",
            Self::Copying => "copying",
            Self::Landed { .. } => "landed",
            Self::Place { .. } => "place",
            Self::CopyDone { .. } => "copy done",
            Self::DigestReady(_) => "digest ready",
            Self::Accepted => "accepted",
            Self::PeerEnded(_) => "peer ended",
            Self::PeerLost(_) => "peer lost",
            Self::Abort => "abort",
            Self::Outdated(_) => "outdated",
            Self::ShutDown => "shut down",
            Self::Tick => "tick",
        }
    }
}

/// Prefill's blocks are only ever read by a transfer, so they are always fenced.
fn failed(failure: TransferFailure) -> End {
    End::Failed { failure, fenced: true }
}

#[cfg(test)]
mod tests {
    use SendAction as A;
    use SendEvent as E;

    use super::*;

    /// Its name, events by their second, and what the last of them gives.
    type Case = (&'static str, Vec<(u64, E)>, Result<Actions, OutOfOrder>);

    const ID: TransferId = TransferId([1; 16]);
    const LEASE: Duration = Duration::from_secs(30);

    fn lost() -> TransferFailure {
        TransferFailure::PeerLost { peer: "decode".to_owned(), why: "test".to_owned() }
    }

    fn copied() -> E {
        E::CopyDone { result: Ok(()), fenced: true }
    }

    /// Runs events, each at its second, and gives the last event's actions.
    fn run(events: &[(u64, E)]) -> Result<Actions, OutOfOrder> {
        let start = Instant::now();
        run_on(Send::new(ID, LEASE, start), start, events)
    }

    fn run_on(mut machine: Send, start: Instant, events: &[(u64, E)]) -> Result<Actions, OutOfOrder> {
        let mut last = Ok(vec![]);
        for (second, event) in events {
            last = machine.on(event.clone(), start + Duration::from_secs(*second));
        }
        last
    }

    #[test]
    fn a_transfer_takes_events_in_protocol_order_only() {
        let mismatch = TransferFailure::DigestMismatch { transfer_id: ID, prefill: 5, decode: 6 };
        let expired = Ending::Failed(TransferFailure::Expired { peer: "prefill".to_owned(), transfer_id: ID });
        let cases: Vec<Case> = vec![
            ("claim", vec![(0, E::Claim)], Ok(vec![A::Grant])),
            (
                "KV-3 pull, no digest",
                vec![(0, E::Claim), (1, E::Landed { digest: None })],
                Ok(vec![A::Confirm { digest: None }, A::Report(End::Sent)]),
            ),
            (
                "KV-4 pull, digest begun while copying, ready before it landed",
                vec![(0, E::Claim), (0, E::Copying), (1, E::DigestReady(5)), (2, E::Landed { digest: Some(5) })],
                Ok(vec![A::Confirm { digest: Some(5) }, A::Report(End::Sent)]),
            ),
            (
                "KV-4 pull, digests differ",
                vec![(0, E::Claim), (1, E::Landed { digest: Some(6) }), (2, E::DigestReady(5))],
                Ok(vec![A::Refuse(mismatch.clone()), A::Report(failed(mismatch))]),
            ),
            ("KV-2 nobody came", vec![(30, E::Tick)], Ok(vec![A::Report(End::Expired)])),
            ("KV-2 not before the lease ends", vec![(29, E::Tick)], Ok(vec![])),
            ("KV-2 renewed", vec![(0, E::Claim), (20, E::Renew), (40, E::Tick)], Ok(vec![])),
            (
                "KV-2 claimed, then silence",
                vec![(5, E::Claim), (35, E::Tick)],
                Ok(vec![A::TellEnded(expired.clone()), A::Report(End::Expired)]),
            ),
            (
                "KV-7 push, not under a live write",
                vec![(0, E::Claim), (1, E::Place { digest: false }), (30, E::Tick)],
                Ok(vec![A::CancelPush]),
            ),
            (
                "KV-7 push, reported after its copy is over",
                vec![(0, E::Claim), (1, E::Place { digest: false }), (30, E::Tick), (31, copied())],
                Ok(vec![A::TellOver { how: expired, fenced: true }, A::Report(End::Expired)]),
            ),
            (
                "KV-4 push waits for copy and digest",
                vec![(0, E::Claim), (1, E::Place { digest: true }), (2, copied()), (3, E::DigestReady(9))],
                Ok(vec![A::TellPushed { digest: Some(9) }]),
            ),
            (
                "KV-2 push, held until accepted",
                vec![(0, E::Claim), (1, E::Place { digest: false }), (2, copied()), (3, E::Accepted)],
                Ok(vec![A::Report(End::Sent)]),
            ),
            (
                "KV-7 push, decode gives up and waits for our word",
                vec![(0, E::Claim), (1, E::Place { digest: false }), (2, E::PeerEnded(Ending::Aborted)), (3, copied())],
                Ok(vec![A::TellOver { how: Ending::Aborted, fenced: true }, A::Report(End::Aborted)]),
            ),
            ("KV-8 decode lost", vec![(0, E::Claim), (1, E::PeerLost(lost()))], Ok(vec![A::Report(failed(lost()))])),
            (
                "KV-8 decode lost under our push",
                vec![(0, E::Claim), (1, E::Place { digest: false }), (2, E::PeerLost(lost())), (3, copied())],
                Ok(vec![A::Report(failed(lost()))]),
            ),
            ("KV-9 abort before any claim", vec![(0, E::Abort)], Ok(vec![A::Report(End::Aborted)])),
            (
                "KV-9 abort after the grant",
                vec![(0, E::Claim), (1, E::Abort)],
                Ok(vec![A::TellEnded(Ending::Aborted), A::Report(End::Aborted)]),
            ),
            (
                "decode has it all",
                vec![(0, E::Claim), (1, E::PeerEnded(Ending::Released))],
                Ok(vec![A::Report(End::Released)]),
            ),
            (
                "KV-3 landed without a claim",
                vec![(0, E::Landed { digest: None })],
                Err(OutOfOrder { state: "offered", event: "landed" }),
            ),
            ("claimed twice", vec![(0, E::Claim), (0, E::Claim)], Err(OutOfOrder { state: "granted", event: "claim" })),
            ("KV-1 nothing after the end", vec![(0, E::Abort), (1, E::Abort)], Ok(vec![])),
            (
                "accepted before it was pushed",
                vec![(0, E::Claim), (1, E::Place { digest: false }), (2, E::Accepted)],
                Err(OutOfOrder { state: "pushing", event: "accepted" }),
            ),
        ];
        for (name, events, want) in cases {
            assert_eq!(run(&events), want, "case: {name}");
        }
    }

    #[test]
    fn a_claim_may_come_before_the_kv_is_computed() {
        let (claim, place) = ((1, E::Claim), (2, E::Place { digest: false }));
        let digested = (2, E::Place { digest: true });
        let cases: Vec<Case> = vec![
            ("claimed while it is computed", vec![claim.clone()], Ok(vec![A::TellBegun])),
            ("placed", vec![claim.clone(), place.clone()], Ok(vec![A::StartPush])),
            ("KV-2 no lease while it is computed", vec![claim.clone(), place.clone(), (99, E::Tick)], Ok(vec![])),
            ("nor before the claim", vec![(99, E::Tick)], Ok(vec![])),
            ("ready before the claim", vec![(1, E::Ready), (2, E::Claim)], Ok(vec![A::Grant])),
            ("KV-2 the lease begins with the end of prefill", vec![(50, E::Ready), (79, E::Tick)], Ok(vec![])),
            ("KV-2 and ends", vec![(50, E::Ready), (80, E::Tick)], Ok(vec![A::Report(End::Expired)])),
            ("ready before the blocks are named", vec![claim.clone(), (3, E::Ready)], Ok(vec![A::Grant])),
            ("ready while parts move", vec![claim.clone(), place.clone(), (3, E::Ready)], Ok(vec![A::Grant])),
            (
                "KV-4 the digest is of all of it",
                vec![claim.clone(), digested.clone(), (3, E::Ready)],
                Ok(vec![A::Grant, A::StartDigest]),
            ),
            ("KV-4 and not begun before", vec![claim.clone(), digested], Ok(vec![A::StartPush])),
            (
                "KV-3 vouched for only when it is complete",
                vec![claim.clone(), place.clone(), (3, E::Ready), (4, copied())],
                Ok(vec![A::TellPushed { digest: None }]),
            ),
            (
                "KV-7 prefill's request ends under a part",
                vec![claim.clone(), place.clone(), (3, E::Abort)],
                Ok(vec![A::CancelPush]),
            ),
            (
                "decode has it all already",
                vec![claim.clone(), (2, E::PeerEnded(Ending::Released))],
                Ok(vec![A::Report(End::Released)]),
            ),
            (
                "nothing is there to pull",
                vec![claim, (2, E::Landed { digest: None })],
                Err(OutOfOrder { state: "begun", event: "landed" }),
            ),
        ];
        for (name, events, want) in cases {
            let start = Instant::now();
            assert_eq!(run_on(Send::begun(ID, LEASE, start), start, &events), want, "case: {name}");
        }
    }
}
