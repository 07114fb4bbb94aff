//! A path that goes wrong on purpose, around any other: what tests of the layers above run on.
//!
//! Whatever happens to a transfer here, the promises hold: one completion (TR-1), and no write after it (TR-3). What is broken
//! is what a real path may break too: bytes, time, and the peer.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::flight::locked;
use super::threads::Threads;
use super::{
    Completion, Export, Grant, Link, Run, RunList, Segment, TransferRequest, TransferTicket, Transport, TransportError,
};
use crate::config::Path;

/// What happens to a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It never starts, and fails at its deadline.
    Drop,
    /// It starts later.
    Delay(Duration),
    /// Its bytes are copied twice.
    Duplicate,
    /// One run arrives with its bytes turned round by one, and the transfer says that it is done.
    Corrupt,
    /// One run never arrives, and the transfer says that it is done.
    Lose,
    /// The peer dies as it starts: this transfer, those in flight and all later ones fail.
    Kill,
}

/// Which transfers a fault happens to, counted from 1 over all links of the transport.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum When {
    Always,
    /// The one with this number.
    Nth(u64),
    /// Each one whose number this divides.
    Every(u64),
    /// Each with this probability, drawn from the plan's seed.
    Chance(f64),
}

/// What goes wrong, and when. The first fault that applies to a transfer is the one it gets.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FaultPlan {
    pub seed: u64,
    pub faults: Vec<(When, Fault)>,
}

/// Any transport, with faults.
pub struct Faulty {
    inner: Arc<dyn Transport>,
    shared: Arc<Shared>,
    links: Mutex<Vec<Weak<FaultyLink>>>,
}

struct Shared {
    plan: FaultPlan,
    random: Mutex<StdRng>,
    transfers: AtomicU64,
    killed: AtomicBool,
    clock: Clock,
}

impl Faulty {
    pub fn around(inner: Arc<dyn Transport>, plan: FaultPlan) -> Arc<Self> {
        let random = Mutex::new(StdRng::seed_from_u64(plan.seed));
        let (transfers, killed) = (AtomicU64::new(0), AtomicBool::new(false));
        let shared = Arc::new(Shared { plan, random, transfers, killed, clock: Clock::default() });
        Arc::new(Self { inner, shared, links: Mutex::default() })
    }

    /// Brings a killed peer back: new links work again. Old ones stay broken.
    pub fn revive(&self) {
        self.shared.killed.store(false, Ordering::SeqCst);
    }
}

impl Transport for Faulty {
    fn path(&self) -> Path {
        self.inner.path()
    }

    fn export(&self) -> Export {
        self.inner.export()
    }

    fn connect(&self, peer: &Export, deadline: Instant) -> Result<Arc<dyn Link>, TransportError> {
        if self.shared.killed.load(Ordering::SeqCst) {
            return Err(killed());
        }
        let inner = self.inner.connect(peer, deadline)?;
        let state = Arc::new(State { inner, waiting: Mutex::default(), dead: AtomicBool::new(false) });
        let link = Arc::new(FaultyLink { state, shared: self.shared.clone(), tickets: AtomicU64::new(0) });
        let mut links = locked(&self.links);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(&link));
        Ok(link)
    }

    fn grant(&self, runs: &RunList) -> Result<Grant, TransportError> {
        self.inner.grant(runs)
    }

    fn close(&self) {
        let links = std::mem::take(&mut *locked(&self.links));
        links.iter().filter_map(Weak::upgrade).for_each(|link| link.close());
        self.shared.clock.close();
        self.inner.close();
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.close();
    }
}

fn killed() -> TransportError {
    TransportError::PeerGone { peer: "the peer that a fault killed".to_owned() }
}

impl Shared {
    fn next(&self) -> Option<Fault> {
        let number = self.transfers.fetch_add(1, Ordering::SeqCst) + 1;
        let applies = |when: &When| match *when {
            When::Always => true,
            When::Nth(nth) => nth == number,
            When::Every(every) => number.is_multiple_of(every),
            When::Chance(chance) => locked(&self.random).random_bool(chance.clamp(0.0, 1.0)),
        };
        self.plan.faults.iter().find(|(when, _)| applies(when)).map(|(_, fault)| *fault)
    }

    fn pick(&self, count: usize) -> usize {
        locked(&self.random).random_range(0..count.max(1))
    }
}

struct FaultyLink {
    state: Arc<State>,
    shared: Arc<Shared>,
    tickets: AtomicU64,
}

struct State {
    inner: Arc<dyn Link>,
    waiting: Mutex<HashMap<TransferTicket, Stage>>,
    dead: AtomicBool,
}

/// Where a transfer is.
enum Stage {
    /// Here, not yet given to the path. `None` for the blink in which it is.
    Held(Option<(TransferRequest, Completion)>),
    /// Given to the path, under this ticket of its own.
    Inner(TransferTicket),
}

impl Link for FaultyLink {
    fn path(&self) -> Path {
        self.state.inner.path()
    }

    fn submit(&self, request: TransferRequest, done: Completion) -> TransferTicket {
        let ticket = TransferTicket(self.tickets.fetch_add(1, Ordering::SeqCst) + 1);
        if self.state.dead.load(Ordering::SeqCst) {
            done(Err(killed()));
            return ticket;
        }
        let deadline = request.deadline;
        match self.shared.next() {
            None => self.state.start(ticket, request, done),
            Some(Fault::Drop) => self.hold(ticket, request, done, deadline, |state, ticket| {
                let late = |request: &TransferRequest| TransportError::DeadlineMissed {
                    peer: "the peer of a faulty link".to_owned(),
                    bytes: request.runs.bytes(),
                    late_by_ms: 0,
                };
                state.fail_held(ticket, late);
            }),
            Some(Fault::Delay(delay)) => self.hold(ticket, request, done, Instant::now() + delay, |state, ticket| {
                if let Some((request, done)) = state.take_held(ticket) {
                    state.start(ticket, request, done);
                }
            }),
            Some(Fault::Duplicate) => {
                let (again, state) = (request.clone(), Arc::downgrade(&self.state));
                let twice: Completion = Box::new(move |first| match (first, state.upgrade()) {
                    (Ok(_), Some(state)) => state.start(ticket, again, done),
                    (result, _) => done(result),
                });
                self.state.start(ticket, request, twice);
            }
            Some(Fault::Corrupt) => self.state.start(ticket, self.change(request, turn), done),
            Some(Fault::Lose) => self.state.start(ticket, self.change(request, |_| Vec::new()), done),
            Some(Fault::Kill) => {
                self.shared.killed.store(true, Ordering::SeqCst);
                self.state.dead.store(true, Ordering::SeqCst);
                self.close();
                done(Err(killed()));
            }
        }
        ticket
    }

    fn cancel(&self, ticket: TransferTicket) {
        let inner = match locked(&self.state.waiting).get(&ticket) {
            Some(Stage::Inner(inner)) => Some(*inner),
            _ => None,
        };
        match inner {
            Some(inner) => self.state.inner.cancel(inner),
            None => self.state.fail_held(ticket, |_| TransportError::Cancelled),
        }
    }

    fn usable(&self) -> bool {
        !self.state.dead.load(Ordering::SeqCst) && self.state.inner.usable()
    }

    fn peer_gone(&self) -> bool {
        self.state.dead.load(Ordering::SeqCst) || self.state.inner.peer_gone()
    }

    fn close(&self) {
        let held: Vec<TransferTicket> = locked(&self.state.waiting).keys().copied().collect();
        for ticket in held {
            self.state.fail_held(ticket, |_| TransportError::Cancelled);
        }
        self.state.inner.close();
    }
}

impl Drop for FaultyLink {
    fn drop(&mut self) {
        self.close();
    }
}

impl FaultyLink {
    fn hold(
        &self,
        ticket: TransferTicket,
        request: TransferRequest,
        done: Completion,
        until: Instant,
        then: fn(&Arc<State>, TransferTicket),
    ) {
        locked(&self.state.waiting).insert(ticket, Stage::Held(Some((request, done))));
        let state = Arc::downgrade(&self.state);
        self.shared.clock.at(
            until,
            Box::new(move || {
                if let Some(state) = state.upgrade() {
                    then(&state, ticket);
                }
            }),
        );
    }

    /// Puts `with` in the place of one run that has bytes.
    fn change(&self, mut request: TransferRequest, with: impl Fn(Run) -> Vec<Run>) -> TransferRequest {
        let with_bytes = |segment: usize, runs: &[Run]| {
            let filled = runs.iter().enumerate().filter(|(_, run)| run.len > 0);
            filled.map(|(index, _)| (segment, index)).collect::<Vec<_>>()
        };
        let runs: Vec<(usize, usize)> = request
            .runs
            .segments
            .iter()
            .enumerate()
            .flat_map(|(index, segment)| with_bytes(index, &segment.runs))
            .collect();
        if let Some(&(segment, run)) = runs.get(self.shared.pick(runs.len())) {
            let segment = &mut request.runs.segments[segment];
            let mut list = segment.runs.to_vec();
            let changed = with(list[run]);
            list.splice(run..=run, changed);
            *segment = Segment::new(segment.src_region, segment.dst_region, list);
        }
        request
    }
}

/// The same destination, filled with the same source bytes, one place off. Reads and writes no more than it did, so the
/// path has no reason to refuse it.
fn turn(run: Run) -> Vec<Run> {
    let rest = run.len - 1;
    vec![Run { src: run.src + 1, dst: run.dst, len: rest }, Run { src: run.src, dst: run.dst + rest, len: 1 }]
}

impl State {
    /// Gives a transfer to the path, and forgets it when it completes.
    fn start(self: &Arc<Self>, ticket: TransferTicket, request: TransferRequest, done: Completion) {
        locked(&self.waiting).insert(ticket, Stage::Held(None));
        let state = self.clone();
        let inner = self.inner.submit(
            request,
            Box::new(move |result| {
                locked(&state.waiting).remove(&ticket);
                done(if state.dead.load(Ordering::SeqCst) { result.map_err(|_| killed()) } else { result });
            }),
        );
        // It may have completed before its ticket was known; then there is nothing left to cancel.
        if let Some(stage) = locked(&self.waiting).get_mut(&ticket) {
            *stage = Stage::Inner(inner);
        }
    }

    fn take_held(&self, ticket: TransferTicket) -> Option<(TransferRequest, Completion)> {
        let mut waiting = locked(&self.waiting);
        let held = match waiting.get_mut(&ticket)? {
            Stage::Held(held) => held.take()?,
            Stage::Inner(_) => return None,
        };
        waiting.remove(&ticket);
        Some(held)
    }

    fn fail_held(&self, ticket: TransferTicket, error: impl Fn(&TransferRequest) -> TransportError) {
        if let Some((request, done)) = self.take_held(ticket) {
            let dead = self.dead.load(Ordering::SeqCst);
            done(Err(if dead { killed() } else { error(&request) }));
        }
    }
}

type Action = Box<dyn FnOnce() + Send>;

/// One thread that does things later. Started by the first of them.
#[derive(Default)]
struct Clock {
    agenda: Arc<Agenda>,
    threads: Threads,
    started: AtomicBool,
}

#[derive(Default)]
struct Agenda {
    /// In no order: there are as many as there are faulty transfers in flight, which is few.
    due: Mutex<(Vec<(Instant, Action)>, bool)>,
    changed: Condvar,
}

impl Clock {
    fn at(&self, when: Instant, action: Action) {
        locked(&self.agenda.due).0.push((when, action));
        if !self.started.swap(true, Ordering::SeqCst) {
            let agenda = self.agenda.clone();
            self.threads
                .spawn("pdlink-faulty".to_owned(), move || agenda.run())
                .expect("a test machine has a thread left");
        }
        self.agenda.changed.notify_all();
    }

    fn close(&self) {
        locked(&self.agenda.due).1 = true;
        self.agenda.changed.notify_all();
        self.threads.join();
    }
}

impl Agenda {
    fn run(&self) {
        let mut due = locked(&self.due);
        while !due.1 {
            let now = Instant::now();
            let Some((index, when)) = due.0.iter().map(|(when, _)| *when).enumerate().min_by_key(|(_, when)| *when)
            else {
                due = self.changed.wait(due).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if when > now {
                due = self.changed.wait_timeout(due, when - now).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            let (_, action) = due.0.swap_remove(index);
            drop(due);
            action();
            due = locked(&self.due);
        }
    }
}
