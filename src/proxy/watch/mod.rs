//! What people see of a fleet that runs: the page at `/` of the admin routes, its stream of events, and the balance hint.
//!
//! `seen` asks each worker, `picture` makes one picture of all of them in each interval, `hint` says which pool is short,
//! `failures` remembers what went wrong last, `routes` hands the picture out and `page` draws it. A viewer gets the latest
//! picture when its connection takes one: what a slow one missed is nowhere kept, so that viewers cost no memory (PX-4).

mod failures;
mod hint;
mod page;
mod picture;
mod routes;
mod scrape;
mod seen;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::shared::{Lane, Shared};
use picture::Painter;
use seen::Seen;

pub(crate) use failures::{Failures, What};
pub(crate) use hint::{Hint, PoolLoad};
pub(crate) use picture::Balance;
pub(crate) use routes::{events, gate, overview, page};

/// The latest picture, as an event; `None` once the proxy drains.
type Latest = Option<Arc<Frame>>;

/// One picture.
#[derive(Debug, Default)]
struct Frame {
    /// As one event.
    event: Bytes,
    /// The picture alone.
    json: Bytes,
    /// What a viewer who has just come is shown of the past, as one event.
    past: Bytes,
}

/// Shared by all threads.
#[derive(Debug)]
pub(crate) struct Watch {
    pub(crate) failures: Failures,
    pub(crate) balance: Balance,
    pub(crate) seen: Box<[Seen]>,
    viewers: AtomicUsize,
    latest: watch::Sender<Latest>,
    every: Duration,
}

impl Watch {
    pub(crate) fn new(workers: usize, every: Duration) -> Self {
        Self {
            failures: Failures::default(),
            balance: Balance::default(),
            seen: (0..workers).map(|_| Seen::default()).collect(),
            viewers: AtomicUsize::new(0),
            latest: watch::Sender::new(Some(Arc::default())),
            every,
        }
    }

    /// Ends every viewer's stream: nothing else would end their connections.
    pub(crate) fn end(&self) {
        self.latest.send_replace(None);
    }

    pub(crate) fn viewers(&self) -> usize {
        self.viewers.load(std::sync::atomic::Ordering::Relaxed)
    }
}

/// Watches the fleet for as long as the proxy lives.
pub(crate) async fn keep(lane: Arc<Lane>) {
    let shared = Arc::clone(&lane.shared);
    let mut asking = JoinSet::new();
    for number in 0..shared.workers.len() {
        asking.spawn(seen::ask_again_and_again(Arc::clone(&lane), number));
    }
    let mut painter = Painter::default();
    let mut ticks = interval(shared.watch.every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        paint(&shared, &mut painter);
    }
}

fn paint(shared: &Shared, painter: &mut Painter) {
    let picture = painter.picture(shared);
    shared.watch.latest.send_if_modified(|latest| {
        let Some(frame) = latest else { return false };
        *frame = Arc::new(painter.frame(&picture));
        true
    });
}
