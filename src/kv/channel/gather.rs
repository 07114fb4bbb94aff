//! Decode's side of a transfer over all the runtimes of prefill that it reads: one [`Receive`] for each, one end for all.
//!
//! KV-1 and KV-7 hold for the whole: the first part that goes wrong stops the others, and the one report comes after the
//! last of them has ended, and so was fenced.

use std::time::{Duration, Instant};

use super::{OutOfOrder, Receive, ReceiveAction, ReceiveEvent};
use crate::control::TransferId;
use crate::kv::End;

/// One transfer, in parts.
#[derive(Debug)]
pub(in crate::kv) struct Gather {
    parts: Vec<Part>,
    /// Why the whole goes wrong: the first part's end that was no good one.
    bad: Option<End>,
    is_over: bool,
}

#[derive(Debug)]
struct Part {
    machine: Receive,
    end: Option<End>,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kv) enum GatherAction {
    /// Never the part's report.
    Part(usize, ReceiveAction),
    /// The last action (KV-1).
    Report(End),
}

impl Gather {
    /// `peers` are the names of the runtimes to read.
    pub(in crate::kv) fn new(transfer_id: TransferId, peers: &[&str], timeout: Duration, now: Instant) -> Self {
        let part = |peer: &&str| Part { machine: Receive::new(transfer_id, peer, timeout, now), end: None };
        Self { parts: peers.iter().map(part).collect(), bad: None, is_over: false }
    }

    pub(in crate::kv) fn deadline(&self) -> Option<Instant> {
        self.parts.iter().filter_map(|part| part.machine.deadline()).min()
    }

    pub(in crate::kv) fn holds_lease(&self, part: usize) -> bool {
        self.parts[part].machine.holds_lease()
    }

    pub(in crate::kv) fn state(&self, part: usize) -> &'static str {
        self.parts[part].machine.state()
    }

    /// Takes one event of one part. What comes late, to a part that has ended, changes nothing.
    pub(in crate::kv) fn on(
        &mut self,
        part: usize,
        event: ReceiveEvent,
        now: Instant,
    ) -> Result<Vec<GatherAction>, OutOfOrder> {
        if self.parts[part].end.is_some() {
            return Ok(vec![]);
        }
        let actions = self.parts[part].machine.on(event, now)?;
        let mut out = Vec::with_capacity(actions.len());
        self.take(part, actions, now, &mut out);
        Ok(out)
    }

    /// Takes one event that concerns all parts, and each that can take it does.
    pub(in crate::kv) fn on_all(
        &mut self,
        event: &ReceiveEvent,
        now: Instant,
    ) -> Result<Vec<GatherAction>, OutOfOrder> {
        let mut out = Vec::new();
        let mut refused = None;
        for part in 0..self.parts.len() {
            match self.on(part, event.clone(), now) {
                Ok(actions) => out.extend(actions),
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            Some(error) if out.is_empty() => Err(error),
            _ => Ok(out),
        }
    }

    fn take(&mut self, part: usize, actions: Vec<ReceiveAction>, now: Instant, out: &mut Vec<GatherAction>) {
        for action in actions {
            match action {
                ReceiveAction::Report(end) => self.ended(part, end, now, out),
                action => out.push(GatherAction::Part(part, action)),
            }
        }
    }

    fn ended(&mut self, part: usize, end: End, now: Instant, out: &mut Vec<GatherAction>) {
        self.parts[part].end = Some(end.clone());
        if self.bad.is_none() && !matches!(end, End::Received | End::Released) {
            let stop = match &end {
                End::Failed { failure, .. } => ReceiveEvent::Outdated(failure.clone()),
                _ => ReceiveEvent::Abort,
            };
            self.bad = Some(end);
            for other in 0..self.parts.len() {
                if self.parts[other].end.is_none()
                    && let Ok(actions) = self.parts[other].machine.on(stop.clone(), now)
                {
                    self.take(other, actions, now, out);
                }
            }
        }
        if !self.is_over && self.parts.iter().all(|part| part.end.is_some()) {
            self.is_over = true;
            out.push(GatherAction::Report(self.whole()));
        }
    }

    /// The end of all, once each has its own.
    fn whole(&mut self) -> End {
        let ends = || self.parts.iter().filter_map(|part| part.end.as_ref());
        let unfenced = ends().find(|end| matches!(end, End::Failed { fenced: false, .. }));
        match (self.bad.clone(), unfenced) {
            // The first reason stands, but no block is called safe while one part may still be written to.
            (Some(End::Failed { failure, .. }), Some(_)) => End::Failed { failure, fenced: false },
            (Some(_), Some(unfenced)) => unfenced.clone(),
            (Some(bad), None) => bad,
            (None, _) if ends().all(|end| *end == End::Received) => End::Received,
            (None, _) => End::Released,
        }
    }
}

#[cfg(test)]
mod tests {
    use GatherAction::{Part as P, Report as R};
    use ReceiveAction as A;
    use ReceiveEvent as E;

    use super::super::Mode;
    use super::*;
    use crate::kv::TransferFailure;
    use crate::kv::messages::Ending;

    fn lost() -> TransferFailure {
        TransferFailure::PeerLost { peer: "prefill".to_owned(), why: "test".to_owned() }
    }

    fn failed(fenced: bool) -> End {
        End::Failed { failure: lost(), fenced }
    }

    /// Events by their part, and what the last gives.
    fn run(events: &[(usize, E)]) -> Vec<GatherAction> {
        let now = Instant::now();
        let mut gather = Gather::new(TransferId([1; 16]), &["a", "b"], Duration::from_secs(20), now);
        let mut last = vec![];
        for (part, event) in events {
            last = gather.on(*part, event.clone(), now).unwrap();
        }
        last
    }

    fn copying(part: usize) -> [(usize, E); 2] {
        [(part, E::Granted(Mode::Pull)), (part, E::Fetch { digest: false })]
    }

    fn landed(part: usize) -> [(usize, E); 2] {
        [(part, E::CopyDone(Ok(()))), (part, E::Confirmed { digest: None })]
    }

    fn after(events: &[&[(usize, E)]]) -> Vec<GatherAction> {
        run(&events.concat())
    }

    #[test]
    fn kv_1_one_report_once_every_part_has_ended() {
        let both = [copying(0), copying(1)].concat();
        assert_eq!(after(&[&both, &landed(0)]), []);
        assert_eq!(after(&[&both, &landed(0), &landed(1)]), [R(End::Received)]);
        assert_eq!(after(&[&both, &landed(0), &landed(1), &[(0, E::Abort)]]), [], "nothing after the end");
        let released = [(0, E::Granted(Mode::Pull)), (0, E::Release), (1, E::Release)];
        assert_eq!(run(&released), [P(1, A::TellEnded(Ending::Released)), R(End::Released)]);
    }

    #[test]
    fn kv_7_a_part_that_fails_stops_the_others_and_all_is_fenced_before_the_report() {
        let both = [copying(0), copying(1)].concat();
        let failing = [(0, E::PeerLost(lost()))];
        assert_eq!(after(&[&both, &failing]), [P(0, A::CancelCopy)]);
        let stopped = [(0, E::CopyDone(Ok(())))];
        assert_eq!(after(&[&both, &failing, &stopped]), [P(1, A::CancelCopy)]);
        let tell = P(1, A::TellEnded(Ending::Failed(lost())));
        assert_eq!(after(&[&both, &failing, &stopped, &[(1, E::CopyDone(Ok(())))]]), [tell.clone(), R(failed(true))]);
        // What waits only for a word ends at once.
        let waiting = [&both[..], &[(1, E::CopyDone(Ok(())))], &failing].concat();
        assert_eq!(after(&[&waiting, &stopped]), [tell, R(failed(true))]);
        // What has ended well before stays so, and the whole fails all the same.
        assert_eq!(after(&[&both, &landed(1), &failing, &stopped]), [R(failed(true))]);
    }

    #[test]
    fn kv_7_what_one_part_cannot_fence_is_not_called_fenced() {
        let placed = [(0, E::Granted(Mode::Push)), (0, E::Fetch { digest: false })];
        let lost = [(0, E::PeerLost(lost())), (0, E::Fenced(false))];
        assert_eq!(after(&[&placed, &copying(1), &lost]), [P(1, A::CancelCopy)]);
        assert_eq!(after(&[&placed, &copying(1), &lost, &[(1, E::CopyDone(Ok(())))]]).last(), Some(&R(failed(false))));
    }

    #[test]
    fn kv_9_an_abort_of_one_part_is_an_abort_of_all() {
        let both = [copying(0), copying(1)].concat();
        let aborted = [(0, E::CopyDone(Ok(()))), (0, E::PeerEnded(Ending::Aborted))];
        assert_eq!(after(&[&both, &aborted]), [P(1, A::CancelCopy)]);
        let tell = P(1, A::TellEnded(Ending::Aborted));
        assert_eq!(after(&[&both, &aborted, &[(1, E::CopyDone(Ok(())))]]), [tell, R(End::Aborted)]);
    }
}
