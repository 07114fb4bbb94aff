//! Flights that wait for a thread. Every take gives the next piece of the next flight in turn, so that a small transfer never
//! waits for a long one to end, and a deadline is noticed within a few pieces.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::Piece;
use super::flight::{Flight, locked};

/// The queue, with what a path needs beside each flight.
pub(super) struct FlightQueue<T> {
    waiting: Mutex<Waiting<T>>,
    work: Condvar,
}

struct Waiting<T> {
    /// Bounded by the links: each admits a bounded number of flights, and each flight is here at most once.
    flights: VecDeque<(Arc<Flight>, T)>,
    /// A flight is about to come.
    roused: bool,
    closed: bool,
}

impl<T: Clone> FlightQueue<T> {
    pub(super) fn new() -> Self {
        Self {
            waiting: Mutex::new(Waiting { flights: VecDeque::new(), roused: false, closed: false }),
            work: Condvar::new(),
        }
    }

    /// Adds a flight, or gives it back if the queue is closed.
    pub(super) fn push(&self, flight: Arc<Flight>, with: T) -> Result<(), Arc<Flight>> {
        let mut waiting = locked(&self.waiting);
        if waiting.closed {
            return Err(flight);
        }
        waiting.flights.push_back((flight, with));
        drop(waiting);
        self.work.notify_all();
        Ok(())
    }

    /// A claimed piece of the next flight. Waits for one; `None` once closed.
    pub(super) fn take(&self) -> Option<(Arc<Flight>, T, Piece)> {
        let mut waiting = locked(&self.waiting);
        while !waiting.closed {
            if let Some(taken) = waiting.claim() {
                return Some(taken);
            }
            waiting = self.work.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        None
    }

    /// As [`FlightQueue::take`], but stays awake for a while, and again when it is roused: waking up takes longer than a small
    /// transfer.
    pub(super) fn take_awake(&self, awake: Duration) -> Option<(Arc<Flight>, T, Piece)> {
        loop {
            let until = Instant::now() + awake;
            while Instant::now() < until {
                if let Some(taken) = self.try_take() {
                    return Some(taken);
                }
                std::thread::yield_now();
            }
            let mut waiting = locked(&self.waiting);
            loop {
                if waiting.closed {
                    return None;
                }
                if let Some(taken) = waiting.claim() {
                    return Some(taken);
                }
                if std::mem::take(&mut waiting.roused) {
                    break;
                }
                waiting = self.work.wait(waiting).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Wakes whoever takes awake: a flight is about to be pushed.
    pub(super) fn rouse(&self) {
        locked(&self.waiting).roused = true;
        self.work.notify_all();
    }

    /// As [`FlightQueue::take`], without waiting.
    pub(super) fn try_take(&self) -> Option<(Arc<Flight>, T, Piece)> {
        let mut waiting = locked(&self.waiting);
        if waiting.closed { None } else { waiting.claim() }
    }

    /// Lets go of flights with no piece left to claim.
    pub(super) fn forget_ended(&self) {
        locked(&self.waiting).flights.retain(|(flight, _)| flight.has_more());
    }

    /// Ends every `take`. Returns the flights that still waited, for the path to end.
    pub(super) fn close(&self) -> Vec<Arc<Flight>> {
        let flights = {
            let mut waiting = locked(&self.waiting);
            waiting.closed = true;
            std::mem::take(&mut waiting.flights)
        };
        self.work.notify_all();
        flights.into_iter().map(|(flight, _)| flight).collect()
    }
}

impl<T: Clone> Waiting<T> {
    fn claim(&mut self) -> Option<(Arc<Flight>, T, Piece)> {
        while let Some((flight, with)) = self.flights.pop_front() {
            let Some(piece) = flight.claim() else { continue };
            self.roused = false;
            if flight.has_more() {
                self.flights.push_back((flight.clone(), with.clone()));
            }
            return Some((flight, with, piece));
        }
        None
    }
}
