//! Prefill's side of a transfer over all the runtimes of decode that read here: one [`Send`] for each, one hold for all.
//!
//! Who reads follows from decode's geometry, so nobody is known before the first claim. The blocks are held until the
//! last reader has ended (KV-2); one that goes wrong stops the others, since its request cannot go on.

use std::time::{Duration, Instant};

use super::{OutOfOrder, Send, SendAction, SendEvent};
use crate::control::TransferId;
use crate::kv::{End, TransferFailure};

/// One offer and its readers.
#[derive(Debug)]
pub(in crate::kv) struct Hold {
    transfer_id: TransferId,
    lease: Duration,
    /// One that nobody has claimed, until the first claim.
    readers: Vec<Reader>,
    is_claimed: bool,
    /// Whether prefill has ended.
    is_ready: bool,
    bad: Option<End>,
    is_over: bool,
}

#[derive(Debug)]
struct Reader {
    machine: Send,
    end: Option<End>,
}

/// What the driver is to do.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::kv) enum HoldAction {
    /// Never the reader's report.
    Reader(usize, SendAction),
    /// The last action (KV-1).
    Report(End),
}

impl Hold {
    pub(in crate::kv) fn new(transfer_id: TransferId, lease: Duration, now: Instant) -> Self {
        let reader = Reader { machine: Send::new(transfer_id, lease, now), end: None };
        Self { transfer_id, lease, readers: vec![reader], is_claimed: false, is_ready: true, bad: None, is_over: false }
    }

    /// One whose KV is being computed (concurrent dispatch).
    pub(in crate::kv) fn begun(transfer_id: TransferId, lease: Duration, now: Instant) -> Self {
        let reader = Reader { machine: Send::begun(transfer_id, lease, now), end: None };
        Self { readers: vec![reader], is_ready: false, ..Self::new(transfer_id, lease, now) }
    }

    /// Prefill has ended: the blocks are complete, and held.
    pub(in crate::kv) fn ready(&mut self, now: Instant) -> Vec<HoldAction> {
        self.is_ready = true;
        self.on_all(&SendEvent::Ready, now)
    }

    /// Whether the blocks are complete.
    pub(in crate::kv) fn is_ready(&self) -> bool {
        self.is_ready
    }

    /// Whether no reader is known yet.
    pub(in crate::kv) fn is_unclaimed(&self) -> bool {
        !self.is_claimed
    }

    /// Whether this reader may still claim.
    pub(in crate::kv) fn awaits(&self, reader: usize) -> bool {
        self.readers[reader].machine.is_unclaimed() && self.readers[reader].end.is_none()
    }

    /// The first claim says how many readers there are.
    pub(in crate::kv) fn expect_readers(&mut self, count: usize, now: Instant) {
        let make = if self.is_ready { Send::new } else { Send::begun };
        let reader = || Reader { machine: make(self.transfer_id, self.lease, now), end: None };
        self.readers = std::iter::repeat_with(reader).take(count).collect();
        self.is_claimed = true;
    }

    pub(in crate::kv) fn deadline(&self) -> Option<Instant> {
        let open = self.readers.iter().filter(|reader| reader.end.is_none());
        open.filter_map(|reader| reader.machine.deadline()).min()
    }

    pub(in crate::kv) fn state(&self, reader: usize) -> &'static str {
        self.readers[reader].machine.state()
    }

    /// Takes one event of one reader. What comes late, of one that has ended, changes nothing.
    pub(in crate::kv) fn on(
        &mut self,
        reader: usize,
        event: SendEvent,
        now: Instant,
    ) -> Result<Vec<HoldAction>, OutOfOrder> {
        if self.readers[reader].end.is_some() {
            return Ok(vec![]);
        }
        let actions = self.readers[reader].machine.on(event, now)?;
        let mut out = Vec::with_capacity(actions.len());
        self.take(reader, actions, now, &mut out);
        Ok(out)
    }

    /// Takes one event that concerns all readers: an end, or time.
    pub(in crate::kv) fn on_all(&mut self, event: &SendEvent, now: Instant) -> Vec<HoldAction> {
        let readers = 0..self.readers.len();
        readers.filter_map(|reader| self.on(reader, event.clone(), now).ok()).flatten().collect()
    }

    fn take(&mut self, reader: usize, actions: Vec<SendAction>, now: Instant, out: &mut Vec<HoldAction>) {
        for action in actions {
            match action {
                SendAction::Report(end) => self.ended(reader, end, now, out),
                action => out.push(HoldAction::Reader(reader, action)),
            }
        }
    }

    fn ended(&mut self, reader: usize, end: End, now: Instant, out: &mut Vec<HoldAction>) {
        self.readers[reader].end = Some(end.clone());
        if self.bad.is_none() && !matches!(end, End::Sent | End::Released) {
            let expired = || TransferFailure::Expired { peer: "prefill".to_owned(), transfer_id: self.transfer_id };
            let stop = match &end {
                End::Failed { failure, .. } => SendEvent::Outdated(failure.clone()),
                End::Expired => SendEvent::Outdated(expired()),
                _ => SendEvent::Abort,
            };
            self.bad = Some(end);
            for other in 0..self.readers.len() {
                if self.readers[other].end.is_none()
                    && let Ok(actions) = self.readers[other].machine.on(stop.clone(), now)
                {
                    self.take(other, actions, now, out);
                }
            }
        }
        if !self.is_over && self.readers.iter().all(|reader| reader.end.is_some()) {
            self.is_over = true;
            let sent = self.readers.iter().any(|reader| reader.end == Some(End::Sent));
            let good = if sent { End::Sent } else { End::Released };
            out.push(HoldAction::Report(self.bad.clone().unwrap_or(good)));
        }
    }
}

#[cfg(test)]
mod tests {
    use HoldAction::{Reader as P, Report as R};
    use SendAction as A;
    use SendEvent as E;

    use super::*;
    use crate::kv::messages::Ending;

    const ID: TransferId = TransferId([1; 16]);

    fn lost() -> TransferFailure {
        TransferFailure::PeerLost { peer: "decode".to_owned(), why: "test".to_owned() }
    }

    /// Two readers; events by second and reader, and what the last gives.
    fn run(events: &[(u64, usize, E)]) -> Vec<HoldAction> {
        let start = Instant::now();
        let mut hold = Hold::new(ID, Duration::from_secs(30), start);
        hold.expect_readers(2, start);
        let mut last = vec![];
        for (second, reader, event) in events {
            let now = start + Duration::from_secs(*second);
            last = match event {
                E::Tick | E::Abort => hold.on_all(event, now),
                event => hold.on(*reader, event.clone(), now).unwrap(),
            };
        }
        last
    }

    fn claim(reader: usize) -> (u64, usize, E) {
        (0, reader, E::Claim)
    }

    fn landed(reader: usize) -> (u64, usize, E) {
        (1, reader, E::Landed { digest: None })
    }

    #[test]
    fn kv_2_blocks_are_held_until_the_last_reader_has_them() {
        let confirm = |reader| P(reader, A::Confirm { digest: None });
        assert_eq!(run(&[claim(0), landed(0)]), [confirm(0)]);
        assert_eq!(run(&[claim(0), landed(0), claim(1), landed(1)]), [confirm(1), R(End::Sent)]);
        let ended = |reader| (2, reader, E::PeerEnded(Ending::Released));
        assert_eq!(run(&[claim(0), claim(1), ended(0), ended(1)]), [R(End::Released)]);
        assert_eq!(run(&[claim(0), claim(1), landed(0), ended(1)]), [R(End::Sent)]);
    }

    #[test]
    fn a_reader_that_goes_wrong_stops_the_others() {
        let gone = (2, 0, E::PeerLost(lost()));
        let failed = End::Failed { failure: lost(), fenced: true };
        let tell = P(1, A::TellEnded(Ending::Failed(lost())));
        assert_eq!(run(&[claim(0), claim(1), gone.clone()]), [tell, R(failed.clone())]);
        // KV-7: not before the other's push has stopped.
        let place = (1, 1, E::Place { digest: false });
        assert_eq!(run(&[claim(0), claim(1), place.clone(), gone.clone()]), [P(1, A::CancelPush)]);
        let over = P(1, A::TellOver { how: Ending::Failed(lost()), fenced: true });
        let copied = (3, 1, E::CopyDone { result: Ok(()), fenced: true });
        assert_eq!(run(&[claim(0), claim(1), place, gone, copied]), [over, R(failed)]);
    }

    #[test]
    fn kv_2_the_lease_of_a_reader_that_never_came_ends_the_hold() {
        let tick = |second| (second, 0, E::Tick);
        assert_eq!(run(&[claim(0), landed(0), tick(29)]), []);
        assert_eq!(run(&[claim(0), landed(0), tick(30)]), [R(End::Expired)]);
        let renewed = [claim(0), (20, 0, E::Renew), tick(30)];
        let expired = Ending::Failed(TransferFailure::Expired { peer: "prefill".to_owned(), transfer_id: ID });
        assert_eq!(run(&renewed), [P(0, A::TellEnded(expired)), R(End::Expired)], "one cannot renew for another");
    }

    #[test]
    fn kv_9_an_abort_reaches_every_reader() {
        let tell = |reader| P(reader, A::TellEnded(Ending::Aborted));
        assert_eq!(run(&[claim(0), claim(1), (1, 0, E::Abort)]), [tell(0), tell(1), R(End::Aborted)]);
        assert_eq!(run(&[claim(0), claim(1), (1, 0, E::PeerEnded(Ending::Aborted))]), [tell(1), R(End::Aborted)]);
    }

    #[test]
    fn kv_9_an_offer_that_nobody_claimed_ends_at_once() {
        let now = Instant::now();
        let mut hold = Hold::new(ID, Duration::from_secs(30), now);
        assert!(hold.is_unclaimed());
        assert_eq!(hold.on_all(&E::Abort, now), [R(End::Aborted)]);
        assert_eq!(hold.on_all(&E::Abort, now), []);
    }
}
