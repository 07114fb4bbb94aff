//! Holds new hand-offs from prefill to decode back while the weights change.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use tokio::sync::Notify;

/// Prefill legs in flight, and the gate before them. Open, it costs two atomic additions.
#[derive(Debug, Default)]
pub(crate) struct Handoffs {
    begun: AtomicUsize,
    closed: AtomicBool,
    opened: Notify,
}

/// One prefill leg. KV that it leaves behind is the runtime's to answer for.
#[derive(Debug)]
pub(crate) struct Handoff<'a>(&'a Handoffs);

/// The gate, closed. Opens when dropped.
#[derive(Debug)]
pub(crate) struct Closed<'a>(&'a Handoffs);

impl Handoffs {
    /// Begins a hand-off. Waits while the gate is closed, which no update keeps it for longer than `[weights]` allows.
    pub(crate) async fn begin(&self) -> Handoff<'_> {
        loop {
            // Made before the look at the gate: it hears of every opening from here on.
            let opened = self.opened.notified();
            self.begun.fetch_add(1, SeqCst);
            let handoff = Handoff(self);
            // Counted first: whoever closes the gate sees this one, or this one sees the gate.
            if !self.closed.load(SeqCst) {
                return handoff;
            }
            drop(handoff);
            opened.await;
        }
    }

    pub(super) fn close(&self) -> Closed<'_> {
        self.closed.store(true, SeqCst);
        Closed(self)
    }

    /// Prefill legs in flight.
    pub(super) fn begun(&self) -> usize {
        self.begun.load(SeqCst)
    }
}

impl Drop for Handoff<'_> {
    fn drop(&mut self) {
        self.0.begun.fetch_sub(1, SeqCst);
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.closed.store(false, SeqCst);
        self.0.opened.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn wt_2_a_closed_gate_holds_new_hand_offs_and_lets_those_in_flight_end() {
        let handoffs = Handoffs::default();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(before) = pin!(handoffs.begin()).poll(&mut context) else { panic!("the gate is open") };
        let closed = handoffs.close();
        let mut late = pin!(handoffs.begin());
        assert!(late.as_mut().poll(&mut context).is_pending());
        assert_eq!(handoffs.begun(), 1);
        drop(before);
        assert_eq!(handoffs.begun(), 0);
        drop(closed);
        let Poll::Ready(late) = late.poll(&mut context) else { panic!("the gate is open again") };
        assert_eq!(handoffs.begun(), 1);
        drop(late);
        // One that gives up while it waits leaves nothing behind.
        let closed = handoffs.close();
        {
            let mut gone = pin!(handoffs.begin());
            assert!(gone.as_mut().poll(&mut context).is_pending());
        }
        assert_eq!(handoffs.begun(), 0);
        drop(closed);
    }
}
