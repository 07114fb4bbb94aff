//! One picture of the fleet in each interval: what the workers said, what the proxy counts, and how it went lately.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use serde::Serialize;

use super::super::Mode;
use super::super::health::{Standing, State};
use super::super::shared::Shared;
use super::super::worker::Worker;
use super::Frame;
use super::failures::{Failed, unix_ms};
use super::hint::{Hint, PoolLoad, Steady, hint};
use super::seen::{Clock, Known};
use crate::control::{LinkTraffic, Role};

/// Pictures of the past that a viewer is shown: five minutes, where `telemetry.watch_interval_s` is 1.
const PAST_MAX: usize = 300;
/// Pictures that a pool's load is the average of.
const LOAD_OVER: usize = 30;
/// Links that are told of, the busiest first.
const LINKS_MAX: usize = 256;

/// The pools' loads and the hint, for the metrics page too.
#[derive(Debug, Default)]
pub(crate) struct Balance(Mutex<(PoolLoad, PoolLoad, Hint)>);

impl Balance {
    fn set(&self, balance: (PoolLoad, PoolLoad, Hint)) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = balance;
    }

    /// Of prefill and of decode.
    pub(crate) fn get(&self) -> (PoolLoad, PoolLoad, Hint) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker in the picture.
#[derive(Debug, Serialize)]
struct Drawn<'a> {
    number: usize,
    name: &'a str,
    url: &'a str,
    role: &'static str,
    gpus: &'a [u32],
    tp: u32,
    state: &'static str,
    kept_out: bool,
    /// Of a quarantine.
    back_in_s: Option<f64>,
    inflight: usize,
    served: u64,
    failed: u64,
    quarantines: u64,
    running: Option<f64>,
    waiting: Option<f64>,
    kv_usage: Option<f64>,
    weight_version: Option<u64>,
    phase: Option<&'static str>,
    held_blocks: Option<u64>,
    transfers_active: Option<u64>,
    clock: Option<Clock>,
}

/// The way from one prefill to one decode worker, by their numbers.
#[derive(Debug, Clone, Serialize)]
struct DrawnLink {
    prefill: usize,
    decode: usize,
    path: &'static str,
    connected: bool,
    done: u64,
    failed: u64,
    bytes: u64,
    gb_per_s: f64,
    wait_ms: f64,
    copy_ms: f64,
    validate_ms: f64,
}

/// One moment of the past.
#[derive(Debug, Clone, Copy, Serialize)]
struct Moment {
    at_unix_ms: u64,
    gb_per_s: f64,
    requests_per_s: f64,
    inflight: usize,
    waiting: f64,
}

#[derive(Debug, Serialize)]
struct Totals {
    #[serde(flatten)]
    moment: Moment,
    transfers_active: u64,
    held_blocks: u64,
    transfers: u64,
    bytes: u64,
    viewers: usize,
}

#[derive(Debug, Serialize)]
struct Weights {
    version: Option<u64>,
    last_failure: Option<String>,
}

#[derive(Debug, Serialize)]
struct Told {
    hint: Hint,
    words: String,
    prefill: PoolLoad,
    decode: PoolLoad,
}

/// All that the page shows.
#[derive(Debug, Serialize)]
pub(super) struct Picture<'a> {
    pdlink: &'static str,
    connector: &'static str,
    plain: bool,
    draining: bool,
    every_s: f64,
    totals: Totals,
    weights: Weights,
    balance: Told,
    workers: Vec<Drawn<'a>>,
    links: Vec<DrawnLink>,
    failures: Vec<Failed>,
}

/// Names a link's counters: the decode worker, its runtime's life, the prefill worker, the path.
type LinkKey = (usize, u64, usize, &'static str);

/// When a link's bytes were told, how many they were, and the rate that came of it.
type Carried = (Instant, u64, f64);

/// What a link carried since it was looked at last.
fn since(before: Option<Carried>, at: Instant, bytes: u64) -> Carried {
    let gb_per_s = match before {
        Some((before, _, rate)) if before == at => rate,
        Some((before, then, _)) => rate(bytes.saturating_sub(then), at - before) / 1e9,
        None => 0.0,
    };
    (at, bytes, gb_per_s)
}

/// Remembers what a picture is held against.
#[derive(Debug, Default)]
pub(super) struct Painter {
    past: VecDeque<Moment>,
    links: HashMap<LinkKey, Carried>,
    served: Option<(Instant, u64)>,
    prefill: VecDeque<PoolLoad>,
    decode: VecDeque<PoolLoad>,
    steady: Steady,
}

impl Painter {
    pub(super) fn picture<'a>(&mut self, shared: &'a Shared) -> Picture<'a> {
        let now = Instant::now();
        let known: Vec<Known> = shared.watch.seen.iter().map(super::Seen::known).collect();
        let links = self.links(shared, &known);
        let balance = self.balance(shared, &known, now);
        let sum = |of: fn(&crate::control::RuntimeStatus) -> u64| -> u64 {
            known.iter().filter_map(|known| known.traffic.as_ref()).map(|(_, traffic)| of(&traffic.status)).sum()
        };
        let moment = Moment {
            at_unix_ms: unix_ms(),
            gb_per_s: links.iter().map(|link| link.gb_per_s).sum(),
            requests_per_s: self.requests_per_s(shared, now),
            inflight: shared.inflight.load(Relaxed),
            waiting: known.iter().filter_map(|known| known.queues).map(|queues| queues.waiting).sum(),
        };
        self.past.push_back(moment);
        if self.past.len() > PAST_MAX {
            self.past.pop_front();
        }
        let (version, last_failure) = shared.weights.told();
        Picture {
            pdlink: env!("CARGO_PKG_VERSION"),
            connector: shared.connector.name(),
            plain: shared.mode == Mode::Plain,
            draining: shared.is_draining(),
            every_s: shared.watch.every.as_secs_f64(),
            totals: Totals {
                moment,
                transfers_active: sum(|status| status.transfers_active),
                held_blocks: sum(|status| status.held_blocks),
                transfers: links.iter().map(|link| link.done).sum(),
                bytes: links.iter().map(|link| link.bytes).sum(),
                viewers: shared.watch.viewers(),
            },
            weights: Weights { version, last_failure },
            balance,
            workers: shared.workers.iter().zip(&known).map(|(worker, known)| draw(worker, known, now)).collect(),
            links: busiest(links),
            failures: shared.watch.failures.all(),
        }
    }

    /// The picture and the past as they go out.
    pub(super) fn frame(&self, picture: &Picture<'_>) -> Frame {
        let json = serde_json::to_vec(picture).unwrap_or_default();
        let past = serde_json::to_vec(&self.past).unwrap_or_default();
        Frame { event: event(b"picture", &json), past: event(b"past", &past), json: Bytes::from(json) }
    }

    fn requests_per_s(&mut self, shared: &Shared, now: Instant) -> f64 {
        let of_decode = shared.workers.iter().filter(|worker| worker.role == Role::Decode);
        let served = of_decode.map(|worker| worker.served.load(Relaxed)).sum();
        let before = self.served.replace((now, served));
        before.map_or(0.0, |(at, before)| rate(served.saturating_sub(before), now - at))
    }

    /// Every pair that is connected, or has moved something. A worker that restarted has another engine id: what went to its
    /// former self is nobody's.
    fn links(&mut self, shared: &Shared, known: &[Known]) -> Vec<DrawnLink> {
        let engine = |number: usize| known[number].traffic.as_ref().map(|(_, traffic)| &traffic.status.engine_id);
        let prefill_of = |engine_id: &String| {
            let mut workers = shared.workers.iter().filter(|worker| worker.role == Role::Prefill);
            workers.find(|worker| engine(worker.number) == Some(engine_id)).map(|worker| worker.number)
        };
        let mut links: Vec<DrawnLink> = Vec::new();
        let mut rates = HashMap::new();
        for worker in shared.workers.iter().filter(|worker| worker.role == Role::Decode) {
            let Some((at, traffic)) = &known[worker.number].traffic else { continue };
            let idle = traffic.connected.iter().filter(|(engine_id, path)| {
                !traffic.links.iter().any(|link| link.peer_engine_id == *engine_id && link.path == Some(*path))
            });
            let idle = idle.map(|(engine_id, path)| LinkTraffic {
                peer_engine_id: engine_id.clone(),
                path: Some(*path),
                ..LinkTraffic::default()
            });
            for link in traffic.links.iter().cloned().chain(idle) {
                // What decode had in its own cache went over no link.
                if link.path.is_none() && link.failed == 0 {
                    continue;
                }
                let Some(prefill) = prefill_of(&link.peer_engine_id) else { continue };
                let path = link.path.map_or("none", |path| path.name());
                let key = (worker.number, traffic.status.incarnation, prefill, path);
                let before = self.links.get(&key).copied();
                // Where a rank's bytes are missing nothing is held against them: its return would look like a burst.
                let held = if traffic.unheard.is_empty() { Some(since(before, *at, link.bytes)) } else { before };
                if let Some(held) = held {
                    rates.insert(key, held);
                }
                let gb_per_s = held.map_or(0.0, |(_, _, rate)| rate);
                let connected =
                    traffic.connected.iter().any(|(id, path)| *id == link.peer_engine_id && Some(*path) == link.path);
                links.push(drawn(prefill, worker.number, path, connected, &link, gb_per_s));
            }
        }
        self.links = rates;
        links
    }

    fn balance(&mut self, shared: &Shared, known: &[Known], now: Instant) -> Told {
        let prefill = averaged(&mut self.prefill, load(shared, known, Role::Prefill, now));
        let decode = averaged(&mut self.decode, load(shared, known, Role::Decode, now));
        let found = hint((shared.mode == Mode::Disaggregated).then_some(prefill), decode);
        if let Some(hint) = self.steady.feed(found) {
            tracing::info!(
                prefill_waiting = prefill.waiting,
                prefill_utilisation = prefill.utilisation,
                decode_waiting = decode.waiting,
                decode_utilisation = decode.utilisation,
                "balance of the pools: {hint}"
            );
        }
        let shown = self.steady.shown();
        shared.watch.balance.set((prefill, decode, shown));
        Told { hint: shown, words: shown.to_string(), prefill, decode }
    }
}

/// What a pool carries now. A worker that says nothing of its queue is judged by what the proxy has sent it: prefill works on
/// one prompt after the other.
fn load(shared: &Shared, known: &[Known], role: Role, now: Instant) -> PoolLoad {
    let mut load = PoolLoad::default();
    let (mut used, mut said) = (0.0, 0_u32);
    let serving = shared.workers.iter().filter(|worker| worker.role == role);
    for worker in serving.filter(|worker| worker.health.standing(now) >= Standing::OnTrial) {
        load.workers += 1;
        let inflight = count(worker.inflight());
        let queues = known[worker.number].queues;
        load.running += queues.map_or_else(|| inflight.min(1.0), |queues| queues.running.max(inflight.min(1.0)));
        load.waiting += match (queues, role) {
            (Some(queues), _) => queues.waiting,
            (None, Role::Prefill) => (inflight - 1.0).max(0.0),
            (None, _) => 0.0,
        };
        let usage = match role {
            Role::Prefill => Some(f64::from(u8::from(inflight > 0.0 || queues.is_some_and(|it| it.running > 0.0)))),
            _ => queues.and_then(|queues| queues.kv_usage),
        };
        used += usage.unwrap_or_default();
        said += u32::from(usage.is_some());
    }
    load.utilisation = (said > 0).then(|| used / f64::from(said));
    load
}

fn averaged(loads: &mut VecDeque<PoolLoad>, now: PoolLoad) -> PoolLoad {
    loads.push_back(now);
    if loads.len() > LOAD_OVER {
        loads.pop_front();
    }
    let over = count(loads.len());
    let said: Vec<f64> = loads.iter().filter_map(|load| load.utilisation).collect();
    PoolLoad {
        workers: now.workers,
        running: loads.iter().map(|load| load.running).sum::<f64>() / over,
        waiting: loads.iter().map(|load| load.waiting).sum::<f64>() / over,
        utilisation: (!said.is_empty()).then(|| said.iter().sum::<f64>() / count(said.len())),
    }
}

fn draw<'a>(worker: &'a Worker, known: &Known, now: Instant) -> Drawn<'a> {
    let state = worker.health.state();
    let status = known.traffic.as_ref().map(|(_, traffic)| &traffic.status);
    Drawn {
        number: worker.number,
        name: worker.address.name.as_deref().unwrap_or_else(|| worker.name()),
        url: worker.name(),
        role: worker.role.name(),
        gpus: &worker.address.gpus,
        tp: worker.address.tp,
        state: state.name(),
        kept_out: worker.health.is_barred(),
        back_in_s: match state {
            State::Quarantined { until } => Some(until.saturating_duration_since(now).as_secs_f64()),
            _ => None,
        },
        inflight: worker.inflight(),
        served: worker.served.load(Relaxed),
        failed: worker.failed.load(Relaxed),
        quarantines: worker.quarantines.load(Relaxed),
        running: known.queues.map(|queues| queues.running),
        waiting: known.queues.map(|queues| queues.waiting),
        kv_usage: known.queues.and_then(|queues| queues.kv_usage),
        weight_version: known
            .weights
            .map(|(version, _)| version)
            .or_else(|| status.map(|status| status.weight_version)),
        phase: known.weights.map(|(_, phase)| phase.name()),
        held_blocks: status.map(|status| status.held_blocks),
        transfers_active: status.map(|status| status.transfers_active),
        clock: known.clock,
    }
}

fn drawn(
    prefill: usize,
    decode: usize,
    path: &'static str,
    connected: bool,
    link: &LinkTraffic,
    gb_per_s: f64,
) -> DrawnLink {
    let mean_ms = |micros: u64| if link.done == 0 { 0.0 } else { micros as f64 / link.done as f64 / 1e3 };
    DrawnLink {
        prefill,
        decode,
        path,
        connected,
        done: link.done,
        failed: link.failed,
        bytes: link.bytes,
        gb_per_s,
        wait_ms: mean_ms(link.wait_us),
        copy_ms: mean_ms(link.copy_us),
        validate_ms: mean_ms(link.validate_us),
    }
}

fn busiest(mut links: Vec<DrawnLink>) -> Vec<DrawnLink> {
    if links.len() > LINKS_MAX {
        links.sort_by(|a, b| b.gb_per_s.total_cmp(&a.gb_per_s).then(b.bytes.cmp(&a.bytes)));
        links.truncate(LINKS_MAX);
    }
    links.sort_by_key(|link| (link.prefill, link.decode, link.path));
    links
}

fn rate(amount: u64, over: std::time::Duration) -> f64 {
    if over.is_zero() { 0.0 } else { amount as f64 / over.as_secs_f64() }
}

fn count(number: usize) -> f64 {
    number as f64
}

/// One event of an event stream. JSON has no line breaks of its own.
fn event(name: &[u8], data: &[u8]) -> Bytes {
    Bytes::from([b"event: ", name, b"\ndata: ", data, b"\n\n"].concat())
}
