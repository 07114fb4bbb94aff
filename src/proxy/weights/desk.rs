//! Where orders for new weights come, and what is known of the fleet's version.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::{RwLock, mpsc, watch};
use tokio::task::JoinSet;

use super::super::health::State;
use super::super::shared::Shared;
use super::super::watch::What;
use super::handoffs::Handoffs;
use super::members::{Failed, Member};
use super::update::{Committed, Times, Update};
use super::versions;
use crate::config::WeightsConfig;
use crate::control::WeightSource;

/// Orders that wait: only one is taken at a time, so that this is for the moment of handing it over.
const ORDERS_MAX: usize = 1;

/// No version: the workers have not said theirs, or take no weights from us.
const UNKNOWN: u64 = u64::MAX;

/// What a caller wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Order {
    /// `None`: the next one.
    pub(super) version: Option<u64>,
    pub(super) source: WeightSource,
}

/// Why an order came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("an update from {source_of_other} is under way; wait for its end")]
    Busy { source_of_other: WeightSource },
    #[error("version {version} is not newer than version {serves}, which serves")]
    NotNewer { version: u64, serves: u64 },
    #[error("no worker here takes weights from pdlink: {why}")]
    NoMembers { why: String },
    #[error(transparent)]
    Failed(#[from] Failed),
    #[error("the proxy is ending")]
    Ending,
}

/// An update that ended well, as it is told.
#[derive(Debug, Clone)]
pub(super) struct Done {
    pub(super) version: u64,
    pub(super) committed: Committed,
    /// Workers that were down when it began: they catch up before they serve.
    pub(super) left_out: Vec<String>,
}

pub(super) type Outcome = Result<Done, Refused>;

/// The fleet's weights.
#[derive(Debug, Clone, Default)]
pub(super) struct Fleet {
    /// `None` until it has been learnt from the workers, or the first update has been made.
    pub(super) version: Option<u64>,
    pub(super) digest: Option<[u8; 16]>,
    /// Where the version came from; not known of one that was there before the proxy.
    pub(super) source: Option<WeightSource>,
    pub(super) committed_at: Option<SystemTime>,
    /// What the last update that failed said.
    pub(super) last_failure: Option<String>,
}

/// The running update.
#[derive(Debug)]
struct Running {
    order: Order,
    outcome: watch::Receiver<Option<Outcome>>,
}

/// Shared by all threads of the proxy.
#[derive(Debug)]
pub(crate) struct Desk {
    pub(crate) handoffs: Handoffs,
    pub(crate) times: Times,
    pub(super) fleet: Mutex<Fleet>,
    /// The fleet's version once more, for every answer; [`UNKNOWN`] until it is known.
    serves: AtomicU64,
    /// Held for writing by an update, for reading by workers that catch up.
    pub(super) turn: RwLock<()>,
    /// Changes when an update wants its turn: workers that catch up give theirs up, and begin again after it.
    pub(super) wanted: watch::Sender<u64>,
    /// Whether the fleet's version may still be learnt from what workers say.
    pub(super) learning: AtomicBool,
    /// Told when the fleet's version changes, and after every update.
    pub(super) changed: watch::Sender<u64>,
    running: Mutex<Option<Running>>,
    orders: mpsc::Sender<(Order, watch::Sender<Option<Outcome>>)>,
}

/// Orders on their way to the keeper.
#[derive(Debug)]
pub(crate) struct Orders(mpsc::Receiver<(Order, watch::Sender<Option<Outcome>>)>);

impl Desk {
    pub(crate) fn new(config: &WeightsConfig) -> (Self, Orders) {
        let (orders, queue) = mpsc::channel(ORDERS_MAX);
        let desk = Self {
            handoffs: Handoffs::default(),
            times: Times::of(config),
            fleet: Mutex::default(),
            serves: AtomicU64::new(UNKNOWN),
            turn: RwLock::default(),
            wanted: watch::Sender::default(),
            learning: AtomicBool::new(true),
            changed: watch::Sender::default(),
            running: Mutex::default(),
            orders,
        };
        (desk, Orders(queue))
    }

    /// The version that a request gets that begins now, if the workers take weights from us.
    pub(crate) fn serves(&self) -> Option<u64> {
        Some(self.serves.load(Ordering::Acquire)).filter(|version| *version != UNKNOWN)
    }

    /// The fleet's version is this one from now on.
    pub(super) fn now_serves(&self, version: u64) {
        self.serves.store(version, Ordering::Release);
        self.changed.send_replace(version);
    }

    pub(super) fn fleet(&self) -> MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For people: the fleet's version, and what the last update that failed said.
    pub(crate) fn told(&self) -> (Option<u64>, Option<String>) {
        let fleet = self.fleet();
        (fleet.version.or_else(|| self.serves()), fleet.last_failure.clone())
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The order that is being carried out.
    pub(super) fn under_way(&self) -> Option<Order> {
        self.running().as_ref().map(|running| running.order.clone())
    }

    /// Has an order carried out and waits for its end, whoever leaves meanwhile. One that is under way already is joined:
    /// a caller that lost its connection asks again.
    pub(super) async fn order(&self, order: Order) -> Outcome {
        let mut outcome = {
            let mut running = self.running();
            match &*running {
                Some(running) if running.order == order => running.outcome.clone(),
                Some(running) => return Err(Refused::Busy { source_of_other: running.order.source.clone() }),
                None => {
                    let (sender, outcome) = watch::channel(None);
                    self.orders.try_send((order.clone(), sender)).map_err(|_| Refused::Ending)?;
                    *running = Some(Running { order, outcome: outcome.clone() });
                    outcome
                }
            }
        };
        let ended = outcome.wait_for(Option::is_some).await;
        ended.ok().and_then(|outcome| outcome.clone()).unwrap_or(Err(Refused::Ending))
    }
}

/// Carries orders out, one after the other, and watches the workers' versions, for as long as the proxy lives.
pub(crate) async fn keep(shared: Arc<Shared>, mut orders: Orders) {
    let mut watches = JoinSet::new();
    for member in members(&shared) {
        watches.spawn(versions::watch(Arc::clone(&shared), member));
    }
    while let Some((order, outcome)) = orders.0.recv().await {
        let ended = carry_out(&shared, &order).await;
        shared.metrics.weights_updated(match &ended {
            Ok(_) => "committed",
            Err(Refused::Failed(failed)) => failed.doing,
            Err(_) => "refused",
        });
        match &ended {
            Ok(done) => tracing::info!(version = done.version, source = %order.source, "new weights serve"),
            Err(error) => {
                tracing::error!(source = %order.source, %error, "no new weights");
                shared.watch.failures.note(What::Weights, None, &error.to_string());
                shared.weights.fleet().last_failure = Some(error.to_string());
            }
        }
        // However it ended, each worker is held against the fleet at once.
        shared.weights.changed.send_modify(|_| {});
        *shared.weights.running() = None;
        outcome.send_replace(Some(ended));
    }
}

/// All workers that may take weights from us, each by its first rank.
pub(super) fn members(shared: &Shared) -> Vec<Member> {
    let with = shared.workers.iter().zip(&shared.doors);
    with.filter_map(|(worker, client)| Some(Member { worker: Arc::clone(worker), rank: 0, client: client.clone()? }))
        .collect()
}

async fn carry_out(shared: &Arc<Shared>, order: &Order) -> Outcome {
    let desk = &shared.weights;
    desk.wanted.send_modify(|times| *times += 1);
    let _turn = desk.turn.write().await;
    let all = members(shared);
    if all.len() < shared.workers.len() {
        let without = shared.workers.iter().find(|worker| shared.doors[worker.number].is_none());
        let why = format!("worker {} has no address for it", without.map_or("?", |worker| worker.name()));
        return Err(Refused::NoMembers { why });
    }
    // A worker that is down serves nothing; when it is back it catches up first.
    let (down, members): (Vec<_>, Vec<_>) = all
        .into_iter()
        .partition(|member| member.worker.health.state() == State::Down || member.worker.health.is_barred());
    if members.is_empty() {
        return Err(Refused::NoMembers { why: "every worker is down".to_owned() });
    }
    let (serves, members) = versions::all_ranks(shared, &members).await?;
    let version = order.version.unwrap_or(serves + 1);
    if version <= serves {
        return Err(Refused::NotNewer { version, serves });
    }
    let update = Update { shared, members: &members, id: rand::random(), version, source: order.source.clone() };
    let serve = |committed: &Committed| {
        desk.learning.store(false, Ordering::Release);
        let fleet = Fleet {
            version: Some(version),
            digest: committed.digest,
            source: Some(order.source.clone()),
            committed_at: Some(SystemTime::now()),
            last_failure: None,
        };
        *desk.fleet() = fleet;
        for member in committed.behind.iter().map(|(member, _)| member).chain(&down) {
            member.worker.health.bar(true);
        }
        desk.now_serves(version);
    };
    let committed = update.run(serve).await?;
    for (member, why) in &committed.behind {
        tracing::warn!(worker = member.worker.name(), why, "a worker did not commit; it catches up before it serves");
    }
    shared.metrics.weights_seconds(committed.staging, committed.paused);
    let left_out = down.iter().map(|member| member.worker.name().to_owned()).collect();
    Ok(Done { version, committed, left_out })
}
